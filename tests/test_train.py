"""The train step against an independent one: no packing, no scan, whole log-softmax, optax.adamw.

Legend: n examples, B responses (two an example), L tokens, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from tiny import quick_compiles  # noqa: F401

from trace_jax import batches, logprobs, packing, preemption, train
from trace_jax.errors import InputError

CONFLICT = [
    tiny.example("a", pref=1.5),
    tiny.example("b", npo0=1.0, npo1=2.0),
    tiny.example("c", nll=1.0),
    tiny.example("d", pref=0.5),
    tiny.example("e", y1=None, npo0=-0.5, nll=-0.1),
]
RETAIN = [tiny.example("f", y1=None, kl=0.5), tiny.example("g", y1=None, kl=2.0)]
ROW = 24


@pytest.fixture(scope="module")
def data():
    """(model, reference model, texts of CONFLICT, their reference log-probs, texts of RETAIN)."""
    rng = np.random.default_rng(0)
    shapes = [(4, 3, 5), (2, 4, 2), (5, 2, 3), (1, 6, 6), (3, 5)]
    texts = [tiny.text(rng, *shape) for shape in shapes]
    texts[2] = tiny.text(rng, 5, 4, 3, skip=(2, 0))
    model, ref = tiny.module(0), tiny.module(1)
    ref_logp = tiny.reference(model, texts) + rng.normal(0, 2, (5, 2)).astype(np.float32)
    return model, ref, texts, ref_logp, [tiny.text(rng, 3, 6), tiny.text(rng, 2, 4)]


def options(**changes) -> train.Options:
    return tiny.options(**dict(n_conflict=5, n_retain=2) | changes)


def step_of(data, micro_rows=1, *, conflict=CONFLICT, retain=RETAIN) -> batches.Step:
    """All examples in packed rows: 4 rows of conflicts, 1 or more of KL examples."""
    _, _, texts, ref_logp, kl_texts = data
    plans = [tiny.plan(t, row_length=ROW) for t in (texts, kl_texts)]
    used = [plan for plan, examples in zip(plans, (conflict, retain), strict=True) if examples]
    packing.share_micro_batches(used, micro_rows=micro_rows, shards=1)
    return batches.Step(
        conflict and tiny.batch(texts, conflict, ref_logp, packed=plans[0]),
        retain and tiny.batch(kl_texts, retain, packed=plans[1]),
    )


def run_steps(data, step, options, n=1, hyper=None):
    """n updates on one step, from the model: (state, metrics of the last)."""
    graphdef, params, frozen = tiny.split(data[0])
    ref_params = tiny.split(data[1])[1]
    state = train.init_state(params, options)
    for _ in range(n):
        state, metrics = train.train_step(
            state,
            frozen,
            ref_params,
            step,
            hyper or tiny.hyper(),
            graphdef=graphdef,
            options=options,
        )
    return state, jax.device_get(metrics)


def log_sigmoid(x):
    return -jnp.log1p(jnp.exp(-x))


def plain_losses(logp, data, options, hyper) -> list:
    """The loss of every example of CONFLICT from its log-probs [n, 2], formula by formula."""
    _, _, texts, ref_logp, _ = data
    n_tokens = np.maximum(tiny.separate(texts)[1].sum(1).reshape(-1, 2), 1)
    r = logp - ref_logp
    margin = r / n_tokens if options.length_normalised else r
    margin = margin[:, 0] - margin[:, 1]
    npo_factor = {"plain": 1.0, "two_over_beta": 2 / hyper.beta}[options.npo_scale]
    out = []
    for i, e in enumerate(CONFLICT):
        if options.preference == "logistic":
            loss = e.pref * -log_sigmoid(hyper.beta * margin[i])
        else:
            loss = e.pref * (margin[i] - 1 / (2 * hyper.tau)) ** 2
        for c, r_i in ((e.npo0, r[i, 0]), (e.npo1, r[i, 1])):
            loss += c * npo_factor * -log_sigmoid(-hyper.beta * r_i)
        out.append(loss + e.nll * -logp[i, 0] / n_tokens[i, 0])
    return out


def plain_loss(model, data, options, hyper):
    """Sum of the conflict losses over their number, and of the KL terms over theirs."""
    _, ref, texts, _, kl_texts = data
    logp = tiny.plain_logprobs(model, *tiny.separate(texts))
    conflict = sum(plain_losses(logp, data, options, hyper)) / len(CONFLICT)
    return conflict + plain_kl(model, ref, kl_texts) / len(RETAIN)


def plain_kl(model, ref, texts):
    tokens, counts = tiny.separate(texts)
    p, q = (jax.nn.softmax(m(tokens)[:, :-1]) for m in (ref, model))
    kl_BL = jnp.sum(p * (jnp.log(p) - jnp.log(q)), axis=-1) * counts[:, 1:]
    kl_B = kl_BL.sum(1) / np.maximum(counts[:, 1:].sum(1), 1)
    return sum(e.kl * kl for e, kl in zip(RETAIN, kl_B[::2], strict=True))


def plain_steps(data, options, n):
    """n updates by jax.grad and optax.adamw: (params, the last loss, the last gradient)."""
    hyper = tiny.hyper()
    graphdef, params, _ = tiny.split(data[0])

    def rate(count):  # linear warm-up, then cosine to final_fraction
        w, t, f = options.warmup_steps, options.total_steps, options.final_fraction
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * (count - w) / (t - w)))
        return 1e-3 * jnp.where(count < w, count / w, f + (1 - f) * cosine)

    adamw = optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.adamw(rate, b1=options.b1, b2=options.b2, weight_decay=options.weight_decay),
    )

    @jax.jit
    def update(params, opt_state):
        loss, grads = jax.value_and_grad(
            lambda p: plain_loss(nnx.merge(graphdef, p), data, options, hyper)
        )(params)
        updates, opt_state = adamw.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, grads

    opt_state = adamw.init(params)
    for _ in range(n):
        params, opt_state, loss, grads = update(params, opt_state)
    return params, loss, grads


def test_steps_equal_an_independent_implementation(data):
    """Three updates (the first has learning rate 0) of pref, npo, nll and KL examples together."""
    state, metrics = run_steps(data, step_of(data), options(), n=3)
    params, loss, grads = plain_steps(data, options(), n=3)
    start = tiny.leaves(tiny.split(data[0])[1])
    moved = [np.abs(a - b).max() for a, b in zip(tiny.leaves(params), start, strict=True)]
    assert min(moved) > 1e-4 and max(moved) > 1e-3
    tiny.assert_close(state.params, params, atol=2e-6, rtol=0)
    np.testing.assert_allclose(metrics["loss/total"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["train/grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    assert metrics["train/skipped"] == 0 and int(state.step) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(preference="squared"),
        dict(npo_scale="two_over_beta"),
        dict(length_normalised=True),
        dict(preference="squared", length_normalised=True),
    ],
)
def test_example_losses_follow_the_options(data, changes):
    """Per example and by name, against the formulas, from the log-probs of packed rows."""
    model, _, texts, ref_logp, _ = data
    batch = jax.tree.map(lambda a: a[0], step_of(data, micro_rows=4).conflict)
    logp = tiny.reference(model, texts)
    n = batch.ref_logp.shape[-1]
    # (row, slot) in the order of CONFLICT: an example is found by its reference log-prob.
    where = [tuple(np.argwhere(batch.ref_logp[:, ::2] == r)[0]) for r in ref_logp[:, 0]]
    logp_R2S = np.zeros_like(batch.ref_logp)
    for (row, slot), pair in zip(where, logp, strict=True):
        logp_R2S[row, 2 * slot : 2 * slot + 2] = pair
    lengths = logprobs.response_lengths(batch.rows, n)
    hyper, chosen = tiny.hyper(), options(**changes)
    loss_RS, parts = train.example_losses(logp_R2S, lengths, batch, hyper, chosen)
    expected = plain_losses(logp, data, chosen, hyper)
    found = np.array([loss_RS[row, slot] for row, slot in where])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.count_nonzero(loss_RS) == len(CONFLICT)  # an empty slot is exactly 0
    total = sum(np.sum(parts[name]) for name in ("preference", "npo", "nll"))
    np.testing.assert_allclose(total, np.sum(expected), rtol=1e-5)


jitted_gradient = jax.jit(train.gradient, static_argnames=("graphdef", "options"))


@pytest.fixture(scope="module")
def one_gradient(data):
    """(step, reference model) -> (gradient of the step's loss, metrics)."""
    graphdef, params, frozen = tiny.split(data[0])

    def compute(step, ref=data[1]):
        ref_params = tiny.split(ref)[1]
        static = dict(graphdef=graphdef, options=options())
        return jitted_gradient(params, frozen, ref_params, step, tiny.hyper(), **static)

    return compute


def test_gradient_accumulation_changes_nothing(data, one_gradient):
    """1, 2 and 4 rows a micro-batch: padded with rows of nothing, the same gradient and metrics."""
    steps = [step_of(data, micro_rows, retain=None) for micro_rows in (1, 2, 4)]
    assert [s.conflict.ref_logp.shape[:2] for s in steps] == [(3, 1), (1, 3), (1, 3)]
    first, *others = (one_gradient(step) for step in steps)
    for other in others:
        tiny.assert_close(first, other, atol=1e-6, rtol=1e-5)


def test_diagnostics_are_means_over_pairs(data, one_gradient):
    model, _, texts, ref_logp, _ = data
    metrics = one_gradient(step_of(data, retain=None))[1]
    r = (tiny.reference(model, texts) - ref_logp)[[0, 3]]  # the two examples with pref
    np.testing.assert_allclose(metrics["train/logratio_0"], r[:, 0].mean(), atol=1e-5)
    np.testing.assert_allclose(metrics["train/logratio_1"], r[:, 1].mean(), atol=1e-5)
    np.testing.assert_allclose(metrics["train/pairs_won"], (r[:, 0] > r[:, 1]).mean())


def test_kl_of_the_reference_itself_is_zero_with_zero_gradient(data, one_gradient):
    grads, metrics = one_gradient(step_of(data, conflict=None), ref=data[0])
    assert abs(float(metrics["loss/total"])) < 1e-6
    tiny.assert_close(grads, jax.tree.map(jnp.zeros_like, grads), atol=1e-6)
    grads, metrics = one_gradient(step_of(data, conflict=None))
    assert float(metrics["train/kl"]) > 0.1 and float(optax.tree.norm(grads)) > 0.1


def test_a_loss_that_overflows_counts_nothing_where_its_coefficient_is_zero():
    """0 * inf would be NaN: the first of two slots has a logratio of -1e30, squared."""
    rng = np.random.default_rng(0)
    texts, examples = [tiny.text(rng, 3, 2, 2)] * 2, [tiny.example(), tiny.example(pref=1.0)]
    ref = np.array([[1e30, 0.0], [0.0, 0.0]], np.float32)
    batch = jax.tree.map(lambda a: a[0], tiny.batch(texts, examples, ref))
    chosen = options(preference="squared")

    def total(logp):
        return train.example_losses(logp, jnp.ones((1, 4)), batch, tiny.hyper(), chosen)[0].sum()

    loss, gradient = jax.value_and_grad(total)(jnp.zeros((1, 4)))
    np.testing.assert_allclose(loss, (1 / (2 * 0.2)) ** 2, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0, 0, -5, 5]], rtol=1e-6)


def test_the_schedule_by_hand():
    rate = train.schedule(tiny.options(warmup_steps=4, total_steps=12, final_fraction=0.2))
    expected = {0: 0.0, 1: 0.25, 4: 1.0, 6: 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2, 8: 0.6, 12: 0.2}
    for step, value in expected.items():
        np.testing.assert_allclose(rate(step), value, rtol=1e-6, err_msg=str(step))
    assert train.schedule(tiny.options(warmup_steps=0))(0) == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(data, bad):
    step = step_of(data)
    nll = step.conflict.coefficients["nll"]
    nll[nll != 0] = bad
    params = tiny.split(data[0])[1]
    before = train.init_state(params, options())
    state, metrics = run_steps(data, step, options())
    assert metrics["train/skipped"] == 1 and not np.isfinite(metrics["loss/total"])
    tiny.assert_same((state.params, state.opt_state), (before.params, before.opt_state))


def test_init_state_copies(data):
    """The step donates its state; the model's own arrays have to survive it."""
    params = tiny.split(data[0])[1]
    run_steps(data, step_of(data), options())
    assert all(np.isfinite(leaf).all() for leaf in tiny.leaves(params))


def loop(total_steps, bad_step=None, start=0, save_every=3, due=None):
    """Runs `train.loop` on a fake step; returns (what happened in order, the exception)."""
    events = []

    def step_fn(state, step):
        events.append(("run", step))
        values = {"loss/total": np.float32(step), "train/skipped": np.float32(step == bad_step)}
        return state + 1, values

    try:
        train.loop(
            start,
            iter(range(start, total_steps)),
            step_fn,
            start=start,
            total_steps=total_steps,
            record_ids=lambda step: [f"r{step}", "shared", f"r{step}"],
            on_metrics=lambda step, values: (
                events.append(("metrics", step)) or not values["train/skipped"]
            ),
            save=lambda step, state: events.append(("save", step, state)),
            save_every=save_every,
            due=lambda step: step == due,
        )
    except (InputError, preemption.Preempted) as error:
        return events, str(error)
    return events, None


def test_the_loop_reads_metrics_one_step_late_and_saves():
    events, _ = loop(5)
    assert events == [
        ("run", 0),
        ("run", 1),
        ("metrics", 1),
        ("run", 2),
        ("metrics", 2),
        ("metrics", 3),
        ("save", 3, 3),
        ("run", 3),
        ("run", 4),
        ("metrics", 4),
        ("metrics", 5),
        ("save", 5, 5),
    ]
    assert loop(5, start=3)[0] == events[7:]
    assert loop(5, start=5)[0] == []


def test_a_preempted_loop_saves_its_step_and_goes_on_from_there():
    events, said = loop(5, due=2)
    assert said == "step 2 is saved"
    assert events == [
        ("run", 0), ("run", 1), ("metrics", 1), ("metrics", 2), ("save", 2, 2)
    ]  # fmt: skip
    assert [e for e in loop(5, start=2)[0] if e[0] == "run"] == [("run", 2), ("run", 3), ("run", 4)]


@pytest.mark.parametrize("bad_step", [1, 2, 4])
def test_a_step_that_is_not_finite_stops_the_loop_and_names_its_records(bad_step):
    events, error = loop(5, bad_step)
    assert error.startswith(f"step {bad_step + 1}: ") and f": r{bad_step}, shared." in error
    saved = [event[1] for event in events if event[0] == "save"]
    assert all(step <= bad_step for step in saved)  # no checkpoint after the bad step


def test_drift_adds_its_share_of_the_squared_distance(data):
    graphdef, params, frozen = tiny.split(data[0])
    origin = jax.tree.map(lambda x: x - 0.5, params)
    step = step_of(data)

    def one(drift: float):
        options_ = options(drift=drift)
        return train.train_step(
            train.init_state(params, options_),
            frozen,
            tiny.split(data[1])[1],
            step,
            tiny.hyper(),
            origin,
            graphdef=graphdef,
            options=options_,
        )[1]

    without, found = one(0.0), one(4.0)
    np.testing.assert_allclose(found["train/drift"], 0.25, rtol=1e-4)
    np.testing.assert_allclose(found["loss/total"] - without["loss/total"], 1.0, rtol=1e-3)
    n = sum(x.size for x in jax.tree.leaves(params))
    grads, _ = train.gradient(
        params, frozen, tiny.split(data[1])[1], step, tiny.hyper(), graphdef=graphdef,
        options=options(),
    )  # fmt: skip
    pulled = [np.asarray(g) + 4.0 * 2 * 0.5 / n for g in jax.tree.leaves(grads)]
    norm = np.sqrt(sum(np.square(g).sum() for g in pulled))
    np.testing.assert_allclose(found["train/grad_norm"], norm, rtol=1e-4)
