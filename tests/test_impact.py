"""Scores: three paths and a plain loop agree; weights; the gold batch.

Legend: n examples, G tangents, R rows, S slots.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import quick_compiles  # noqa: F401

from trace_jax import batches, impact, logprobs, methods, packing, records, train
from trace_jax.errors import InputError
from trace_jax.models import lora

BETA, TAU = 0.3, 0.2
INVERT, NPO = dict(pref=1.0), dict(npo0=1.0, npo1=1.0)
# INVERT, PUNISH against a correction (the same loss on other texts), dual NPO, and NPO of y0 alone.
EXAMPLES = [
    tiny.example("invert", **INVERT),
    tiny.example("npo", **NPO),
    tiny.example("punish", **INVERT),
    tiny.example("npo again", **NPO),
    tiny.example("no triage", y1=None, npo0=1.0),
    tiny.example("invert again", nll=0.2, **INVERT),
    tiny.example("gradient ascent", y1=None, nll=-1.0),
]
ROW = 24


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    shapes = [(4, 3, 5), (2, 4, 2), (5, 2, 3), (1, 6, 6), (3, 5), (3, 2, 4), (2, 5)]
    return [tiny.text(rng, *shape) for shape in shapes]


@pytest.fixture(scope="module")
def gold():
    rng = np.random.default_rng(1)
    return [tiny.text(rng, *shape) for shape in [(3, 4, 4), (2, 3, 5), (4, 4, 2)]]


class Problem:
    """A model split for scoring, with the log-probs of theta_ref and g_J; adapters are fresh."""

    def __init__(self, adapters: str, texts, gold):
        base = tiny.module()
        self.kind = nnx.LoRAParam if adapters == "lora" else nnx.Param
        fresh = lora.add(base, rank=2, alpha=4.0, targets="all", seed=1)
        self.model = fresh if adapters == "lora" else base
        self.graphdef, self.params, self.frozen = tiny.split(self.model, self.kind)
        self.texts, self.ref, self.gold = texts, tiny.reference(self.model, texts), gold
        self.gold_ref = tiny.reference(self.model, gold)
        pairs = [tiny.example(**INVERT)] * len(gold)
        batch = tiny.batch(gold, pairs, self.gold_ref, micro_rows=2, row_length=ROW)
        self.g_j = impact.objective_gradient(
            self.params,
            self.frozen,
            batches.Step(batch, None),
            tiny.hyper(beta=0.1),
            graphdef=self.graphdef,
            options=tiny.options(n_conflict=len(gold)),
        )

    def by_response(self, tangents: list, options: train.Options) -> np.ndarray:
        """Path jvp, [n, G]."""
        d_n2G = self.derivatives(tangents)
        lengths = [tuple(len(b) for b in e.branches) + (1,) for e in self.texts]
        found = [
            impact.score(e, d[0], d[1], options=options, beta=BETA, tau=TAU, lengths=n[:2])
            for e, d, n in zip(EXAMPLES, d_n2G, lengths, strict=True)
        ]
        return np.stack(found)

    def derivatives(self, tangents: list) -> np.ndarray:
        stacked = jax.tree.map(lambda *g: jnp.stack(g), *tangents)

        def compute(rows, n_responses):
            static = dict(graphdef=self.graphdef, n_responses=n_responses)
            return impact.response_derivatives(self.params, self.frozen, stacked, rows, **static)

        packed = logprobs.packed_groups(self.texts, row_length=ROW, micro_rows=2)
        return logprobs.map_packed(compute, self.texts, packed)

    def by_loss(self, function, rows: list, options: train.Options) -> np.ndarray:
        """Paths jvp_losses and vmap_grad, [n]; `rows` says which examples share a row."""
        layout = packing.Layout(2, ROW, max(map(len, rows)), -(-len(rows) // 2))
        batch = batches.make_batch(rows, layout, self.texts, EXAMPLES, self.ref)
        values_MRS = function(
            self.params,
            self.frozen,
            self.g_j,
            batch,
            tiny.hyper(beta=BETA, tau=TAU),
            graphdef=self.graphdef,
            options=options,
        )
        flat = np.asarray(values_MRS).reshape(layout.n_rows, layout.slots)
        out = np.zeros(len(self.texts))
        for r, members in enumerate(rows):
            out[members] = flat[r, : len(members)]
        return out


@pytest.fixture(scope="module")
def problem(texts, gold):
    return functools.cache(lambda adapters: Problem(adapters, texts, gold))


def assert_agree(found, expected) -> None:
    """As the acceptance check has it: 1e-4 of the root mean square score."""
    scale = np.sqrt(np.mean(np.square(expected)))
    assert scale > 1e-4
    assert np.abs(found - expected).max() <= 1e-4 * scale


def packed(texts) -> list:
    return packing.pack_rows([e.row_length for e in texts], ROW, 9)


CASES = {
    "full, logistic, NPO": ("full", {}),
    "full, squared, 2/beta": ("full", dict(preference="squared", npo_scale="two_over_beta")),
    "LoRA, logistic, 2/beta": ("lora", dict(npo_scale="two_over_beta")),
    "LoRA, squared, by length": ("lora", dict(preference="squared", length_normalised=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_three_paths_agree(problem, texts, case):
    adapters, changes = CASES[case]
    p, options = problem(adapters), tiny.options(**changes)
    one_a_row = [[i] for i in range(len(texts))]
    explicit = p.by_loss(impact.per_example_gradient_dots, one_a_row, options)
    assert_agree(p.by_loss(impact.loss_derivatives, packed(texts), options), explicit)
    assert_agree(p.by_response([p.g_j], options)[:, 0], explicit)
    assert (np.abs(explicit) > 1e-5).all()


@pytest.fixture(scope="module")
def plain_gradients(problem, texts):
    """g_i by jax.grad, one example at a time, from the whole log-softmax of separate rows."""
    p = problem("full")
    tokens, counts = tiny.separate(texts)

    @jax.jit
    def gradient(params, tokens, counts, ref, coefficients):
        def loss(params):
            model = nnx.merge(p.graphdef, params, p.frozen)
            r = tiny.plain_logprobs(model, tokens, counts)[0] - ref
            parts_3 = jnp.log1p(jnp.exp(BETA * jnp.stack([r[1] - r[0], r[0], r[1]])))
            nll = -(r[0] + ref[0]) / counts[0].sum()
            return jnp.dot(coefficients, jnp.append(parts_3, nll))

        return jax.grad(loss)(params)

    def of(i: int, e: methods.Example):
        rows = slice(2 * i, 2 * i + 2)
        coefficients = np.array([e.pref, e.npo0, e.npo1, e.nll])
        return gradient(p.params, tokens[rows], counts[rows], p.ref[i], coefficients)

    return [of(i, e) for i, e in enumerate(EXAMPLES)]


@pytest.fixture(scope="module")
def plain_objective(problem):
    """J: mean over the gold pairs of -log sigma(0.1 (r0 - r1)), as a function of params."""
    p = problem("full")

    @jax.jit
    def objective(params):
        model = nnx.merge(p.graphdef, params, p.frozen)
        r = tiny.plain_logprobs(model, *tiny.separate(p.gold)) - p.gold_ref
        return jnp.mean(jnp.log1p(jnp.exp(-0.1 * (r[:, 0] - r[:, 1]))))

    return objective


def dot(a, b) -> float:
    return float(sum(np.vdot(x, y) for x, y in zip(tiny.leaves(a), tiny.leaves(b), strict=True)))


def test_scores_equal_a_loop_of_jax_grad(problem, texts, plain_gradients, plain_objective):
    p = problem("full")
    g_j = jax.grad(plain_objective)(p.params)
    tiny.assert_close(p.g_j, g_j, atol=1e-6)
    loop = np.array([dot(g_j, g_i) for g_i in plain_gradients])
    assert_agree(p.by_response([p.g_j], tiny.options())[:, 0], loop)


def test_a_step_on_the_best_scored_example_lowers_the_objective(
    problem, plain_gradients, plain_objective
):
    """By its score, to first order; a step on the worst one raises it."""
    p, rate = problem("full"), 1e-3
    scores = p.by_response([p.g_j], tiny.options())[:, 0]
    assert scores.min() < 0 < scores.max()
    for i in (int(scores.argmax()), int(scores.argmin())):
        after = jax.tree.map(lambda x, g: x - rate * g, p.params, plain_gradients[i])
        fall = float(plain_objective(p.params) - plain_objective(after))
        np.testing.assert_allclose(fall, rate * scores[i], rtol=0.1)


def test_two_tangents_are_two_passes_and_linear(problem):
    p = problem("lora")
    rng = np.random.default_rng(2)
    other = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), p.g_j)
    both = p.derivatives([p.g_j, other])
    for g, tangent in enumerate((p.g_j, other)):
        np.testing.assert_allclose(
            both[..., g], p.derivatives([tangent])[..., 0], rtol=1e-4, atol=1e-6
        )
    half = p.derivatives([jax.tree.map(lambda a, b: (a + b) / 2, p.g_j, other)])[..., 0]
    np.testing.assert_allclose(half, both.mean(-1), rtol=1e-4, atol=1e-5)


def test_score_by_hand():
    d0, d1 = np.float64(2.0), np.float64(5.0)

    def score(coefficients, **changes):
        e = tiny.example(**coefficients)
        values = dict(beta=0.5, tau=0.25, lengths=(4, 10))
        return impact.score(e, d0, d1, options=tiny.options(**changes), **values)

    assert score(INVERT) == 0.25 * 3
    assert score(INVERT, preference="squared") == 4 * 3
    assert score(INVERT, length_normalised=True) == 0.25 * (0.5 - 0.5)
    assert score(NPO) == 0.25 * 7
    assert score(NPO, npo_scale="two_over_beta") == 7
    assert score(dict(npo0=3.0)) == 0.25 * 2  # of unit weight
    assert score(dict(nll=-1.0)) == 2 / 4
    assert score(INVERT | dict(nll=0.1)) == pytest.approx(0.25 * 3 - 0.1 * 2 / 4)


def test_weights_by_hand():
    scores = np.array([1.0, -5.0, 3.0])
    np.testing.assert_allclose(impact.weights(scores, normalisation="mean_one"), [0.75, 0, 2.25])
    np.testing.assert_allclose(impact.weights(scores, normalisation="sum_to_one"), [0.25, 0, 0.75])
    half = impact.weights(scores, normalisation="mean_one", strength=0.5)
    np.testing.assert_allclose(half, [0.875, 0.5, 1.625])
    none = impact.weights(scores, normalisation="sum_to_one", strength=0.0)
    np.testing.assert_allclose(none, [1 / 3, 1 / 3, 1 / 3])
    free = impact.weights(scores, normalisation="sum_to_one", clamp=False)
    np.testing.assert_allclose(free, [1 / 9, -5 / 9, 3 / 9])


def test_weights_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="all 2 impact scores are negative.*weights=uniform"):
        impact.weights(np.array([-1.0, -2.0]), normalisation="mean_one")
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError, match="not finite"):
            impact.weights(np.array([1.0, bad]), normalisation="mean_one")
    with pytest.raises(InputError, match="'softmax'.*mean_one"):
        impact.weights(np.ones(2), normalisation="softmax")


ACTIONS = np.array(["INVERT", "INVERT", "PUNISH", "PUNISH", "PUNISH"])
GOLD = np.array([False, True, False, False, True])
SCORES = np.array([1.0, 9.0, 2.0, 6.0, 9.0])


def weigh(**changes) -> np.ndarray:
    return impact.weigh(SCORES, ACTIONS, GOLD, **dict(normalisation="mean_one") | changes)


def test_a_gold_record_gets_the_mean_of_its_action():
    np.testing.assert_allclose(weigh(), [1 / 3, 1 / 3, 2 / 3, 2, 4 / 3])
    np.testing.assert_allclose(weigh(normalisation="sum_to_one")[[0, 2, 3]].sum(), 1)


def test_within_an_action_every_action_has_the_same_mean():
    np.testing.assert_allclose(weigh(within="action"), [1, 1, 0.5, 1.5, 1])
    paper = weigh(within="action", normalisation="sum_to_one")
    np.testing.assert_allclose(paper, np.array([1, 1, 0.5, 1.5, 1]) / 3)


def test_shuffled_weights_stay_within_their_action():
    rng = np.random.default_rng(0)
    scores, actions = rng.random(40), np.array(["INVERT", "PUNISH"] * 20)
    none = np.zeros(40, bool)
    straight = impact.weigh(scores, actions, none, normalisation="mean_one")
    dealt = impact.weigh(scores, actions, none, normalisation="mean_one", shuffle_seed=1)
    assert not np.allclose(straight, dealt)
    for action in ("INVERT", "PUNISH"):
        of = actions == action
        np.testing.assert_allclose(np.sort(straight[of]), np.sort(dealt[of]))


def test_signed_weights_keep_their_sign():
    found = impact.weigh(
        np.array([3.0, -1.0]), ACTIONS[:2], np.zeros(2, bool), normalisation="mean_one", clamp=False
    )
    np.testing.assert_allclose(found, [1.5, -0.5])


def test_top_takes_the_largest_allowed():
    scores, allowed = np.array([5.0, 1.0, 9.0, 3.0]), np.array([True, True, False, True])
    np.testing.assert_array_equal(impact.top(scores, allowed, 2), [1, 0, 0, 1])
    np.testing.assert_array_equal(impact.top(scores, allowed, 9), [1, 1, 0, 1])


def test_exponentiated_weights_grow_with_the_score_and_keep_their_mean():
    omega = np.array([1.0, 1.0, 0.0, 2.0])
    found = impact.exponentiated(np.array([1.0, 3.0, 99.0, 1.0]), omega, eta=0.5)
    assert found[2] == 0
    np.testing.assert_allclose(found.sum(), 3)
    np.testing.assert_allclose(found[1] / found[0], np.exp(1.0))
    np.testing.assert_allclose(found[3] / found[0], 2)
    huge = impact.exponentiated(np.array([1e4, -1e4]), np.ones(2), eta=1.0)
    np.testing.assert_allclose(huge, [2, 0])
    with pytest.raises(InputError, match="no record is left to unlearn"):
        impact.exponentiated(np.ones(2), np.zeros(2), eta=1.0)


def triaged(action: str, i: int) -> records.TriagedRecord:
    name = f"{action}{i}"
    verdict = records.Verdict("compliant", None, {})  # the gold batch goes by the action alone
    record = records.PreferenceRecord(name, f"x {name}", f"w {name}", f"l {name}")
    return records.TriagedRecord(record, verdict, verdict, action)


def data(retain=12, invert=12, punish=12) -> list[records.TriagedRecord]:
    counts = {"RETAIN": retain, "INVERT": invert, "PUNISH": punish, "UNRESOLVED": 5}
    return [triaged(action, i) for action, n in counts.items() for i in range(n)]


CORRECTIONS = {f"PUNISH{i}": f"c PUNISH{i}" for i in range(6)}


def test_the_gold_batch_is_a_third_of_each_action_once_each():
    pairs, warnings = impact.draw_gold(data(), CORRECTIONS, size=11, seed=0)
    actions = [e.action for e in pairs]
    assert [actions.count(a) for a in ("RETAIN", "INVERT", "PUNISH")] == [3, 3, 5]
    assert len({e.record_id for e in pairs}) == 11 and warnings == []
    assert all(e.pref == 1.0 and not (e.npo0 or e.npo1 or e.kl or e.nll) for e in pairs)
    assert actions != sorted(actions)  # mixed, since every other pair makes a half


def test_a_proportional_gold_batch_follows_the_triage():
    gold, _ = impact.draw_gold(data(24, 48, 8), {}, size=20, seed=0, draw="proportional")
    counts = {a: sum(e.action == a for e in gold) for a in ("RETAIN", "INVERT", "PUNISH")}
    assert counts == {"RETAIN": 6, "INVERT": 12, "PUNISH": 2}


def test_gold_pairs_put_the_preferred_response_first():
    pairs, _ = impact.draw_gold(data(), CORRECTIONS, size=18, seed=0)
    compliant = {f"w RETAIN{i}" for i in range(12)} | {f"l INVERT{i}" for i in range(12)}
    fallbacks = 0
    for e in pairs:
        assert e.prompt == f"x {e.record_id}"
        if e.action == "RETAIN":
            assert (e.y0, e.y1) == (f"w {e.record_id}", f"l {e.record_id}")
        elif e.action == "INVERT":
            assert (e.y0, e.y1) == (f"l {e.record_id}", f"w {e.record_id}")
        elif e.record_id in CORRECTIONS:
            assert (e.y0, e.y1) == (f"c {e.record_id}", f"w {e.record_id}")
        else:  # without a correction: a compliant response to another prompt
            fallbacks += 1
            assert e.y0 in compliant and e.y1 == f"w {e.record_id}"
    assert 0 < fallbacks < 6


def test_the_gold_batch_is_a_function_of_the_seed():
    first = impact.draw_gold(data(), CORRECTIONS, size=12, seed=0)
    assert first == impact.draw_gold(data(), CORRECTIONS, size=12, seed=0)
    assert first != impact.draw_gold(data(), CORRECTIONS, size=12, seed=1)


def test_the_gold_batch_leaves_half_of_every_action_to_be_scored_and_says_so():
    pairs, warnings = impact.draw_gold(data(punish=5), {}, size=12, seed=0)
    assert [e.action for e in pairs].count("PUNISH") == 2
    assert warnings == ["gold batch: 4 PUNISH records wanted, 2 taken of 5"]


def test_a_gold_batch_that_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match="no gold pairs"):
        impact.draw_gold(data(1, 1, 1), {}, size=12, seed=0)
    with pytest.raises(InputError, match="make corrections first"):
        impact.draw_gold(data(0, 0, 12), {}, size=12, seed=0)
    assert (
        len(
            impact.draw_gold(
                data(0, 0, 12), {f"PUNISH{i}": "c" for i in range(12)}, size=12, seed=0
            )[0]
        )
        == 4
    )
