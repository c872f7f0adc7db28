"""Which examples make a step and share its rows: numbers of tokens only, no tokens.

A program is compiled for one shape, so every step computes as many positions as the fullest one.
`draw` therefore deals examples so that steps have about as many tokens each, and `lay_out` chooses
the length of rows that the steps fill best.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
_CANDIDATES = 32  # lengths of rows that are tried, from the longest example's to twice as much
_TRIED = 64  # fullest steps, that a length is tried on
_SAMPLE = 2048  # texts, that a length is tried on


def pack_rows(lengths: Sequence[int], row_length: int, max_slots: int) -> list[list[int]]:
    """First-fit-decreasing: indices of the examples of each row.

    A longer example than a row is a ValueError.
    """
    rows: list[list[int]] = []
    # The room of all rows, those not begun among them, under a tree of maxima: node n lies over 2n
    # and 2n + 1, so the first row with room is found in log(rows) steps.
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [row_length] * (2 * leaves)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > row_length:
            raise ValueError(
                f"an example of {lengths[i]} positions does not fit a row of {row_length}"
            )
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < lengths[i]
        row = node - leaves
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        room[node] = room[node] - lengths[i] if len(rows[row]) < max_slots else -1
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Fixed shapes of a batch: rows a micro-batch, tokens and slots a row, micro-batches a step."""

    micro_rows: int
    row_length: int
    slots: int
    micro_batches: int

    @property
    def n_rows(self) -> int:
        return self.micro_rows * self.micro_batches


def round_up(n: int, multiple: int) -> int:
    """The next multiple that is at least n."""
    return -(-n // multiple) * multiple


def round_row(tokens: int, platform: str | None = None) -> int:
    """Length of rows that hold so many tokens: a multiple of 8 on CPU, of 64 on an accelerator.

    platform: "cpu" or another; by default that of the devices here.
    """
    if platform is None:
        import jax

        platform = jax.default_backend()
    return round_up(tokens, 8 if platform == "cpu" else 64)


def draw(
    lengths: Sequence[int], *, per_step: int, total_steps: int, seed: int, balanced: bool = True
) -> Array:
    """Examples of each step, [total_steps, per_step]: a pure function of the arguments.

    Examples come epoch by epoch, each epoch a permutation of its own, and step k takes the next
    `per_step` of that stream. balanced: the examples of about an epoch's steps are dealt among
    these steps anew, so that each gets as many long ones as any other (`_deal`). Every example is
    as likely in every step as without; fewer steps are the beginning of more.
    """
    n = len(lengths)
    window = max(1, n // per_step)
    n_windows = -(-total_steps // window)
    epochs = -(-n_windows * window * per_step // n)
    stream = np.concatenate(
        [np.random.default_rng([seed, epoch]).permutation(n) for epoch in range(epochs)]
    )
    if not balanced:
        return stream[: total_steps * per_step].reshape(total_steps, per_step)
    windows = stream[: n_windows * window * per_step].reshape(n_windows, window * per_step)
    length_N = np.asarray(lengths)
    dealt = [
        _deal(members, length_N, per_step, np.random.default_rng([seed, 0xDEA1, w]))
        for w, members in enumerate(windows)
    ]
    return np.concatenate(dealt)[:total_steps]


def _deal(members: Array, length_N: Array, per_step: int, rng: np.random.Generator) -> Array:
    """Members of a window dealt to its steps, [n_steps, per_step].

    Sorted by length they are cut into strata, and each step gets one of each stratum: of the first
    two at random, of the others the longest where there are the fewest tokens so far.
    """
    strata = members[np.argsort(-length_N[members], kind="stable")].reshape(per_step, -1)
    tokens = np.zeros(strata.shape[1], np.int64)
    dealt = []
    for i, stratum in enumerate(strata):
        given = rng.permutation(stratum)
        if i >= 2:
            longest_first = given[np.argsort(-length_N[given], kind="stable")]
            given[np.argsort(tokens, kind="stable")] = longest_first
        tokens += length_N[given]
        dealt.append(given)
    return np.stack(dealt, axis=1)


class PackPlan:
    """The rows that the examples of each step share, and the one layout of all steps.

    members: [total_steps, per_step], as of `draw`.
    """

    def __init__(self, lengths: Sequence[int], members: Array, *, row_length: int, micro_rows: int):
        self.members = np.asarray(members)
        max_slots = max(1, row_length // max(1, min(lengths)))
        self.rows = [
            [
                [int(step[j]) for j in row]
                for row in pack_rows([lengths[i] for i in step], row_length, max_slots)
            ]
            for step in self.members
        ]
        self.most_rows = max(len(rows) for rows in self.rows)
        self.slots = max(len(row) for rows in self.rows for row in rows)
        n_rows = round_up(self.most_rows, micro_rows)
        self.layout = Layout(micro_rows, row_length, self.slots, n_rows // micro_rows)

    def positions(self, lengths: Sequence[int]) -> tuple[int, int]:
        """(real, computed) positions of the whole plan."""
        real = sum(lengths[i] for step in self.members for i in step)
        return real, len(self.rows) * self.layout.n_rows * self.layout.row_length

    def real_token_share(self, lengths: Sequence[int]) -> float:
        """Real positions over computed positions, over the whole plan."""
        real, computed = self.positions(lengths)
        return real / computed


def share_micro_batches(plans: Sequence[PackPlan], *, micro_rows: int, shards: int) -> None:
    """Lays plans of one step out in as many micro-batches, so that they are computed together.

    Together they have about `micro_rows` rows on each of `shards` data shards, at most half as many
    again: within that, the number of micro-batches that needs the fewest rows of padding.
    """

    def rows(micro_batches: int) -> list[int]:
        return [round_up(-(-plan.most_rows // micro_batches), shards) for plan in plans]

    n_rows, limit = sum(plan.most_rows for plan in plans), micro_rows * shards
    counts = range(max(1, 2 * n_rows // (3 * limit)), -(-n_rows // limit) + 1)
    fitting = [m for m in counts if 2 * sum(rows(m)) <= 3 * limit] or [counts[-1]]
    micro_batches = min(fitting, key=lambda m: (m * sum(rows(m)), -m))
    for plan, n in zip(plans, rows(micro_batches), strict=True):
        plan.layout = dataclasses.replace(plan.layout, micro_rows=n, micro_batches=micro_batches)


def plan_steps(
    kinds: Sequence[tuple[Sequence[int], int]],
    *,
    total_steps: int,
    seed: int,
    balanced: bool,
    **layout: Any,
) -> list[PackPlan]:
    """`draw` for kinds of (lengths [n], examples a step), and `lay_out` with what it takes."""
    how = {"total_steps": total_steps, "seed": seed, "balanced": balanced}
    return lay_out([(of, draw(of, per_step=n, **how)) for of, n in kinds], **layout)


def lay_out(
    kinds: Sequence[tuple[Sequence[int], Array]],
    *,
    row_length: int,
    micro_rows: int,
    shards: int,
    flops: Callable[[int], float],
    platform: str | None = None,
) -> list[PackPlan]:
    """Plans of the kinds of examples that a step has, in rows of one length.

    Args:
      kinds: of each kind (lengths [n], members of each step as of `draw`).
      row_length: of rows; 0: the length at which a step costs least.
      micro_rows: rows of the longest example that a data shard computes at once; of longer rows
        accordingly fewer.
      flops: what a position costs in a row of so many.
      platform: as in `round_row`.
    """

    def plans(length: int, kinds) -> list[PackPlan]:
        made = [PackPlan(of, m, row_length=length, micro_rows=1) for of, m in kinds]
        at_once = micro_rows if row_length else max(1, micro_rows * longest // length)
        share_micro_batches(made, micro_rows=at_once, shards=shards)
        return made

    def cost(length: int) -> float:
        n_rows = sum(plan.layout.n_rows for plan in plans(length, few))
        return n_rows * length * flops(length)

    if row_length:
        return plans(row_length, kinds)
    longest = round_row(max(max(of) for of, _ in kinds), platform)
    few = [(of, _fullest(np.asarray(of), members)) for of, members in kinds]
    return plans(min(_candidates(longest, platform), key=cost), kinds)


def best_row(
    lengths: Sequence[int],
    *,
    micro_rows: int,
    shards: int,
    flops: Callable[[int], float],
    platform: str | None = None,
) -> tuple[int, int]:
    """(length of rows that texts cost least in, rows that a data shard then computes at once).

    As `lay_out` has it for steps: of texts with no order, tried on a sample of them.
    """
    longest = round_row(max(lengths), platform)
    sample = sorted(lengths, reverse=True)[:: -(-len(lengths) // _SAMPLE)]  # the longest first

    def at_once(length: int) -> int:
        return max(1, micro_rows * longest // length)

    def cost(length: int) -> float:
        n_rows = len(pack_rows(sample, length, len(sample)))
        return round_up(n_rows, at_once(length) * shards) * length * flops(length)

    length = min(_candidates(longest, platform), key=cost)
    return length, at_once(length)


def _candidates(longest: int, platform: str | None) -> list[int]:
    """Lengths of rows from the longest example's to twice as much."""
    lengths = (longest + longest * i // _CANDIDATES for i in range(_CANDIDATES + 1))
    return sorted({round_row(length, platform) for length in lengths})


def _fullest(length_N: Array, members: Array) -> Array:
    """The steps with the most tokens."""
    fullest = np.argsort(-length_N[members].sum(axis=1), kind="stable")
    return members[fullest[:_TRIED]]
