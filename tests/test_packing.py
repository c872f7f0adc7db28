"""Which examples make a step and share rows: every one once, balanced, in rows that pay."""

import time

import numpy as np
import pytest

from tests import tiny
from trace_jax import encoding, packing


def first_fit(lengths, row_length, max_slots):
    """Every row looked at for every example."""
    rows = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = (
            row
            for row in rows
            if sum(lengths[j] for j in row) + lengths[i] <= row_length and len(row) < max_slots
        )
        row = next(fits, None)
        if row is None:
            rows.append(row := [])
        row.append(i)
    return rows


@pytest.mark.parametrize("n", [1, 2, 17, 64, 200])
@pytest.mark.parametrize("max_slots", [1, 3, 50])
def test_pack_rows_is_the_plain_first_fit(n, max_slots):
    lengths = np.random.default_rng(n).integers(1, 41, n).tolist()
    assert packing.pack_rows(lengths, 40, max_slots) == first_fit(lengths, 40, max_slots)


def test_pack_rows_of_many_examples_takes_seconds():
    lengths = np.random.default_rng(0).integers(10, 500, 60_000).tolist()
    start = time.process_time()
    packing.pack_rows(lengths, 1024, 64)
    assert time.process_time() - start < 4  # 0.3 s, and 13 where every row is looked at


def test_pack_rows_is_first_fit_decreasing():
    assert packing.pack_rows([3, 7, 5, 2, 5], 10, 4) == [[1, 0], [2, 4], [3]]
    assert packing.pack_rows([3, 3, 3], 10, 2) == [[0, 1], [2]]  # no more slots
    assert packing.pack_rows([], 10, 2) == []
    with pytest.raises(ValueError, match="11 positions"):
        packing.pack_rows([11], 10, 1)


def plan(lengths, **changes) -> packing.PackPlan:
    values = dict(per_step=4, total_steps=9, seed=3, balanced=False, row_length=20, micro_rows=2)
    values |= changes
    rows = {name: values.pop(name) for name in ("row_length", "micro_rows")}
    return packing.PackPlan(lengths, packing.draw(lengths, **values), **rows)


def test_a_plan_has_exactly_per_step_examples_and_one_shape():
    lengths = np.random.default_rng(0).integers(3, 20, 10).tolist()
    p = plan(lengths)
    for members, rows in zip(p.members, p.rows, strict=True):
        assert sorted(i for row in rows for i in row) == sorted(members) and len(members) == 4
        assert all(sum(lengths[i] for i in row) <= 20 for row in rows)
        assert len(rows) <= p.layout.n_rows and max(map(len, rows)) <= p.layout.slots
    assert p.layout.n_rows % 2 == 0


def test_a_plan_is_a_function_of_its_seed_and_each_epoch_a_permutation():
    lengths = [5] * 12
    first, again, other = plan(lengths), plan(lengths), plan(lengths, seed=4)
    assert first.rows == again.rows and first.rows != other.rows
    epochs = first.members.reshape(3, 12)
    assert (np.sort(epochs, axis=1) == np.arange(12)).all()
    assert not (epochs[0] == epochs[1]).all()
    longer = plan(lengths, total_steps=12)
    np.testing.assert_array_equal(longer.members[:9], first.members)


def test_real_token_share_by_hand():
    p = plan([5, 15, 20, 20], total_steps=2)  # rows (15, 5), 20, 20, and one empty for micro_rows=2
    assert p.layout.n_rows == 4
    assert p.real_token_share([5, 15, 20, 20]) == 60 / 80
    assert p.positions([5, 15, 20, 20]) == (120, 160)  # two steps


def lengths_like_hh(n: int) -> list[int]:
    """Log-normal, as lengths of dialogues are: mean 211, longest 4.5 times as long."""
    drawn = np.exp(np.random.default_rng(0).normal(5.1, 0.65, n))
    return np.clip(drawn, 20, 950).astype(int).tolist()


@pytest.mark.parametrize("n", [100, 103, 7])
def test_balanced_steps_are_the_same_examples_dealt_anew(n):
    lengths = lengths_like_hh(n)
    how = dict(per_step=8, total_steps=30, seed=1)
    random = packing.draw(lengths, **how, balanced=False)
    dealt = packing.draw(lengths, **how)
    window = max(1, n // 8)
    for at in range(0, 30 - window, window):
        rows = slice(at, at + window)
        assert sorted(dealt[rows].ravel()) == sorted(random[rows].ravel())
    np.testing.assert_array_equal(dealt, packing.draw(lengths, **how))
    assert (dealt != packing.draw(lengths, **how | {"seed": 2})).any()
    np.testing.assert_array_equal(packing.draw(lengths, **how | {"total_steps": 17}), dealt[:17])


def test_balanced_steps_have_about_as_many_tokens():
    lengths = np.array(lengths_like_hh(1600))
    how = dict(per_step=16, total_steps=200, seed=0)
    fullest = [
        lengths[packing.draw(lengths, **how, balanced=b)].sum(axis=1).max() / (16 * lengths.mean())
        for b in (False, True)
    ]
    assert fullest[0] > 1.4 and fullest[1] < 1.12


def test_every_example_is_as_likely_in_every_step_and_meets_others():
    """Nothing of the order in which steps come, or of who meets whom, follows from a length."""
    lengths = lengths_like_hh(32)
    draws = np.stack([
        packing.draw(lengths, per_step=4, total_steps=8, seed=s) for s in range(600)
    ])  # fmt: skip
    steps = np.argmax((draws[..., None] == np.arange(32)).any(axis=2), axis=1)  # [seed, example]
    shares = np.stack([(steps == k).mean(axis=0) for k in range(8)])
    assert abs(shares - 1 / 8).max() < 5 * (1 / 8 * 7 / 8 / 600) ** 0.5
    longest, next_ones = np.argmax(lengths), np.argsort(lengths)[::-1][8:16]  # of the next stratum
    together = [(steps[:, i] == steps[:, longest]).mean() for i in next_ones]
    assert abs(np.array(together) - 1 / 8).max() < 5 * (1 / 8 * 7 / 8 / 600) ** 0.5


def plans(lengths: list[int], per_step: int, **changes) -> packing.PackPlan:
    how = dict(total_steps=100, seed=0, balanced=True, row_length=0, micro_rows=8, shards=1)
    how |= dict(flops=lambda length: 50_000 + length, platform="cpu")
    (found,) = packing.plan_steps([(lengths, per_step)], **how | changes)
    return found


@pytest.mark.parametrize("per_step", [16, 32])
def test_nine_tenths_of_what_is_computed_is_real(per_step):
    lengths = lengths_like_hh(1600)
    assert plans(lengths, per_step).real_token_share(lengths) > 0.9
    assert plans(lengths, per_step, balanced=False).real_token_share(lengths) < 0.8


def test_rows_are_as_long_as_costs_least():
    lengths = lengths_like_hh(400)
    longest = packing.round_row(max(lengths), "cpu")

    def cost(plan: packing.PackPlan, flops) -> float:
        length = plan.layout.row_length
        return plan.layout.n_rows * length * flops(length)

    for flops in (lambda _: 1.0, lambda length: length**3.0):
        found = plans(lengths, 16, flops=flops, total_steps=20)
        tried = [longest + longest * i // 32 for i in range(33)]
        # rows of longer examples are fewer at once, so that a micro-batch takes no more memory
        others = [
            plans(lengths, 16, row_length=packing.round_row(n, "cpu"), flops=flops, total_steps=20,
                  micro_rows=max(1, 8 * longest // packing.round_row(n, "cpu")))
            for n in tried
        ]  # fmt: skip
        assert cost(found, flops) == min(cost(other, flops) for other in others)
    assert found.layout.row_length == longest  # where attention is all that costs
    assert plans(lengths, 16, row_length=2048).layout.row_length == 2048


@pytest.mark.parametrize("shards", [1, 4])
def test_texts_lie_in_rows_that_cost_least(shards):
    """By a search over every length, padding to whole micro-batches counted."""
    lengths = lengths_like_hh(150)
    longest = packing.round_row(max(lengths), "cpu")

    def cost(length: int, flops) -> float:
        at_once = max(1, 4 * longest // length) * shards
        n_rows = len(packing.pack_rows(lengths, length, len(lengths)))
        return packing.round_up(n_rows, at_once) * length * flops(length)

    for flops in (lambda _: 1.0, lambda length: length**9.0):
        length, at_once = packing.best_row(
            lengths, micro_rows=4, shards=shards, flops=flops, platform="cpu"
        )
        assert at_once == max(1, 4 * longest // length)
        tried = {packing.round_row(longest + longest * i // 32, "cpu") for i in range(33)}
        assert cost(length, flops) == min(cost(n, flops) for n in tried)
    assert length == longest  # where attention is all that costs


def test_the_longest_of_many_texts_fits_its_row():
    """Lengths are tried on a sample of them."""
    lengths = [*[40] * 9999, 399]
    length, _ = packing.best_row(
        lengths, micro_rows=4, shards=1, flops=lambda _: 1.0, platform="cpu"
    )
    assert length >= 399


@pytest.mark.parametrize(
    "n_rows, micro_rows, shards, expected",
    [
        ((22, 3), 4, 1, [(6, 4), (6, 1)]),  # 30 rows for 25, where 7 micro-batches would take 35
        ((16, 16), 2, 16, [(1, 16), (1, 16)]),
        ((20, 14), 2, 16, [(1, 32), (1, 16)]),
        ((64, 64), 2, 16, [(4, 16), (4, 16)]),
        ((3,), 4, 1, [(1, 3)]),
        ((9,), 4, 1, [(3, 3)]),
        ((1, 1), 1, 8, [(1, 8), (1, 8)]),
    ],
)
def test_plans_of_a_step_share_their_micro_batches(n_rows, micro_rows, shards, expected):
    plans = [tiny.plan([ROW] * n, row_length=32) for n in n_rows]
    assert [plan.most_rows for plan in plans] == list(n_rows)
    packing.share_micro_batches(plans, micro_rows=micro_rows, shards=shards)
    assert [(p.layout.micro_batches, p.layout.micro_rows) for p in plans] == expected


ROW = encoding.Encoded(tuple(range(17)), (tuple(range(16)),), (0,))  # fills a row of 32


def test_rows_are_as_long_as_the_devices_need():
    assert packing.round_row(193, "cpu") == 200 and packing.round_row(193, "tpu") == 256
    assert packing.round_row(200) == 200  # the tests run on CPU


def test_longer_rows_are_fewer_at_once():
    """A micro-batch of rows twice as long takes no more memory than of the longest example's."""
    lengths = [100] * 40 + [68] * 40
    found = plans(lengths, 40, micro_rows=4, flops=lambda _: 1.0, total_steps=8)
    assert found.layout.row_length > 150
    assert found.layout.micro_rows * found.layout.row_length <= 1.5 * 4 * 104
