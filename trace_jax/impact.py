"""Impact of conflicts on a global objective J: scores <g_J, g_i> at theta_ref, and weights.

Method: arXiv 2511.02623, theta*(w) = argmin sum w_i L_i with H ~ gamma I. Positive = a step on
record i lowers J.

At theta_ref every logratio is 0, so one directional derivative per response, d(y) = <g_J, grad log
p(y|x)>, gives the score of every loss (`score`). Three paths compute the same numbers:

    jvp          d(y) by one forward-mode pass over packed, unique responses (the default)
    jvp_losses   jvp of the batched per-example losses, packed
    vmap_grad    explicit per-example gradients dotted with g_J: the reference

Legend: R rows, L tokens, S example slots of a row, G gold batches (one tangent each).
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trace_jax import batches, logprobs, methods, sharding, train
from trace_jax.errors import InputError

Array = jax.Array
PATHS = ("jvp", "jvp_losses", "vmap_grad")


@functools.partial(jax.jit, static_argnames=("graphdef", "options"))
def objective_gradient(
    params: nnx.State,
    frozen: nnx.State,
    step: batches.Step,
    hyper: train.Hyper,
    *,
    graphdef: nnx.GraphDef,
    options: train.Options,
) -> nnx.State:
    """g_J over the trainable leaves: gradient of the gold pairs' mean preference loss.

    In the dtype of the leaves, which a tangent must have (summed in float32 all the same). The
    step's ref_logp are those of theta_ref itself, so every logratio is 0 up to rounding.
    """
    grads, _ = train.gradient(params, frozen, None, step, hyper, graphdef=graphdef, options=options)
    return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)


@functools.partial(jax.jit, static_argnames=("graphdef", "n_responses"))
def response_derivatives(
    params: nnx.State,
    frozen: nnx.State,
    tangents_G: nnx.State,
    rows: batches.Rows,
    *,
    graphdef: nnx.GraphDef,
    n_responses: int,
) -> Array:
    """d(y) of every response of rows [M, R, ...] along each tangent, [M, R, n_responses, G]."""

    def derivatives(few: batches.Rows) -> Array:
        def logp(params: nnx.State) -> Array:
            return logprobs.response_logprobs(nnx.merge(graphdef, params, frozen), few, n_responses)

        def along(tangent: nnx.State) -> Array:
            return jax.jvp(logp, (params,), (tangent,))[1]

        if len(jax.tree.leaves(tangents_G)[0]) == 1:  # vmap would turn whole matrices round
            return along(jax.tree.map(lambda t: t[0], tangents_G))[..., None]
        return jax.vmap(along, out_axes=-1)(tangents_G)

    def computed(micro: batches.Rows) -> Array:
        return _few_at_a_time(derivatives, micro)

    def skipped(micro: batches.Rows) -> Array:
        one = jax.eval_shape(computed, micro)
        return jnp.zeros(one.shape, one.dtype)

    def body(carry: None, micro: batches.Rows) -> tuple[None, Array]:
        holds_text = jnp.any(micro.segments != 0)
        return carry, jax.lax.cond(holds_text, computed, skipped, micro)

    return sharding.replicated(jax.lax.scan(body, None, rows)[1])


@functools.partial(jax.jit, static_argnames=("graphdef", "options"))
def loss_derivatives(
    params: nnx.State,
    frozen: nnx.State,
    tangent: nnx.State,
    batch: batches.Batch,
    hyper: train.Hyper,
    *,
    graphdef: nnx.GraphDef,
    options: train.Options,
) -> Array:
    """<g_J, g_i> by jvp of the per-example losses of batch [M, R, ...], [M, R, S].

    Also valid away from theta_ref.
    """

    def derivatives(few: batches.Batch) -> Array:
        loss_fn = example_losses(frozen, few, hyper, graphdef, options)
        return jax.jvp(loss_fn, (params,), (tangent,))[1]

    def body(carry: None, micro: batches.Batch) -> tuple[None, Array]:
        return carry, _few_at_a_time(derivatives, micro)

    return sharding.replicated(jax.lax.scan(body, None, batch)[1])


@functools.partial(jax.jit, static_argnames=("graphdef", "options"))
def per_example_gradient_dots(
    params: nnx.State,
    frozen: nnx.State,
    tangent: nnx.State,
    batch: batches.Batch,
    hyper: train.Hyper,
    *,
    graphdef: nnx.GraphDef,
    options: train.Options,
) -> Array:
    """The same by vmap(grad): a gradient per example, one a row, dotted with g_J, [M, R, S]."""

    def dot(row: batches.Batch) -> Array:
        one = jax.tree.map(lambda a: a[None], row)
        loss_fn = example_losses(frozen, one, hyper, graphdef, options)
        gradients = jax.grad(lambda p: jnp.sum(loss_fn(p)))(params)
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradients, tangent)))

    def body(carry: None, micro: batches.Batch) -> tuple[None, Array]:
        return carry, jax.vmap(dot)(micro)[:, None]

    return sharding.replicated(jax.lax.scan(body, None, batch)[1])


def _few_at_a_time(derivatives: Callable, micro: batches.Rows | batches.Batch) -> Array:
    """`derivatives` over rows [R, ...], a quarter of them at a time, or as few as divides R.

    Forward mode keeps nothing for a backward pass, so its temporaries shrink with the rows.
    """
    R, shards = jax.tree.leaves(micro)[0].shape[0], sharding.shards_in_context()
    parts = next((n for n in (4, 3, 2) if R % (n * shards) == 0), 1)
    if parts == 1:
        return derivatives(micro)
    few = jax.tree.map(lambda a: a.reshape(parts, R // parts, *a.shape[1:]), micro)
    out = jax.lax.map(derivatives, few)
    return out.reshape(R, *out.shape[2:])


def example_losses(frozen, batch, hyper, graphdef, options) -> Callable[[nnx.State], Array]:
    """Trainable leaves -> losses of the examples of batch [R, ...] without KL, [R, S]."""
    n = batch.ref_logp.shape[-1]

    def loss_fn(params: nnx.State) -> Array:
        logp = logprobs.response_logprobs(nnx.merge(graphdef, params, frozen), batch.rows, n)
        lengths = logprobs.response_lengths(batch.rows, n)
        return train.example_losses(logp, lengths, batch, hyper, options)[0]

    return loss_fn


def score(
    example: methods.Example,
    d0: np.ndarray,
    d1: np.ndarray,
    *,
    options: train.Options,
    beta: float,
    tau: float,
    lengths: tuple[int, int] = (1, 1),
) -> np.ndarray:
    """<g_J, g_i> of an example with unit weight, from d(y0) and d(y1) at theta_ref (closed form).

    logistic: (beta / 2)(d1 - d0); squared: (1 / tau)(d1 - d0); NPO: (beta / 2) d, times 2 / beta in
    the NPO paper's scale; NLL: -nll * d0 a token. lengths: tokens of y0 and y1.
    """
    n0, n1 = lengths if options.length_normalised else (1, 1)
    total = -example.nll * d0 / lengths[0]
    if example.pref:
        slope = beta / 2 if options.preference == "logistic" else 1 / tau
        total = total + slope * (d1 / n1 - d0 / n0)
    npo = 1.0 if options.npo_scale == "two_over_beta" else beta / 2
    return total + npo * (bool(example.npo0) * d0 + bool(example.npo1) * d1)


def weights(
    scores: np.ndarray, *, normalisation: str, clamp: bool = True, strength: float = 1.0
) -> np.ndarray:
    """Weights of n scores: clamped at 0, then

    mean_one     n s / sum(s), so that the mean weight is 1 (comparable with w = 1; the default)
    sum_to_one   s / sum(s), as the paper has it (the conflict : KL ratio falls by a factor n)

    strength: share of a weight that its score decides; the rest is equal for all. 1: as the paper.
    """
    if normalisation not in ("mean_one", "sum_to_one"):
        raise InputError(
            f"impact.normalisation={normalisation!r} is unknown; use 'mean_one' or 'sum_to_one'"
        )
    clamped = np.maximum(scores, 0.0) if clamp else scores
    total = np.abs(clamped).sum()
    if not np.isfinite(total):
        raise InputError(
            "impact scores are not finite; look for broken weights or records, or score in float32"
        )
    if total <= 0:
        raise InputError(
            f"all {len(scores)} impact scores are negative, so every weight would be 0; use "
            "--config.impact.weights=uniform, "
            "punish with corrections (train.punish='correction'), or a larger impact.gold_size"
        )
    mean = 1.0 if normalisation == "mean_one" else 1 / len(scores)
    share = clamped / total  # first, so that no factor can make the smallest numbers vanish
    return mean * (strength * share * len(scores) + (1 - strength))


def weigh(
    scores: np.ndarray,
    actions: np.ndarray,
    is_gold: np.ndarray,
    *,
    normalisation: str,
    within: str = "all",
    clamp: bool = True,
    strength: float = 1.0,
    shuffle_seed: int | None = None,
) -> np.ndarray:
    """Weights of n conflicts; a gold record gets its action's mean, for its score sees itself.

    within: "all", or "action" to give each action the mean 1 that all have together. shuffle_seed:
    deals the weights of an action to its records at random (a control).
    """
    of_scores = functools.partial(
        weights, normalisation=normalisation, clamp=clamp, strength=strength
    )
    found = np.zeros(len(scores))
    scored = ~is_gold
    if within == "all":
        found[scored] = of_scores(scores[scored])
    for action in sorted(set(actions)):
        of_action = actions == action
        used = of_action & scored
        if not used.any():
            continue
        if within == "action":
            share = used.sum() / scored.sum() if normalisation == "sum_to_one" else 1.0
            found[used] = share * of_scores(scores[used])
        if shuffle_seed is not None:
            found[used] = np.random.default_rng([shuffle_seed, 0x5DEA]).permutation(found[used])
        found[of_action & is_gold] = found[used].mean()
    return found


def exponentiated(scores: np.ndarray, omega: np.ndarray, eta: float) -> np.ndarray:
    """U2A's step on the simplex, omega * exp(eta * score), scaled to mean 1 where omega > 0.

    The sign descends J: a positive score is a record whose unlearning lowers it. (The authors'
    public code has the sign reversed against its own selection.)
    """
    kept = omega > 0
    if not kept.any():
        raise InputError("no record is left to unlearn; raise u2a.top, or look at the triage")
    grown = np.where(kept, omega * np.exp(eta * (scores - scores[kept].max())), 0.0)
    return grown * kept.sum() / grown.sum()


def top(scores: np.ndarray, allowed: np.ndarray, k: int) -> np.ndarray:
    """1 for the k largest scores among those allowed, 0 elsewhere."""
    order = np.argsort(np.where(allowed, -scores, np.inf), kind="stable")
    found = np.zeros(len(scores))
    found[order[: min(k, int(allowed.sum()))]] = 1.0
    return found


def draw_gold(
    triaged: Sequence, corrections: dict, *, size: int, seed: int, draw: str = "thirds"
) -> tuple[list[methods.Example], list[str]]:
    """The gold pairs of J, preferred response first, and warnings.

    A third RETAIN as (y_w, y_l), a third INVERT as (y_l, y_w), the rest PUNISH as (y_c, y_w), where
    y_c is the record's own correction or, without one, a random compliant response to another
    prompt (the paper's form). draw="proportional" takes actions as often as triage found them.
    """
    rng = np.random.default_rng([seed, 0x601D])
    by_action = {a: [t for t in triaged if t.action == a] for a in ("RETAIN", "INVERT", "PUNISH")}
    third = size // 3
    wanted = {"RETAIN": third, "INVERT": third, "PUNISH": size - 2 * third}
    if draw == "proportional":
        share = size / max(1, sum(len(items) for items in by_action.values()))
        wanted = {a: round(share * len(items)) for a, items in by_action.items()}
    compliant = [t.record.chosen for t in by_action["RETAIN"]] + [
        t.record.rejected for t in by_action["INVERT"]
    ]
    pairs, warnings = [], []
    for action, items in by_action.items():
        n = min(wanted[action], len(items) // 2)
        if n < wanted[action]:
            warnings.append(
                f"gold batch: {wanted[action]} {action} records wanted, {n} taken of {len(items)}"
            )
        for i in sorted(rng.permutation(len(items))[:n]):
            better, worse = _gold_pair(items[i], corrections, compliant, rng)
            record = items[i].record
            pairs.append(methods.Example(record.id, action, record.prompt, better, worse, pref=1.0))
    if not pairs:
        raise InputError(
            "no gold pairs: triage left too few records; add records or use impact.weights=uniform"
        )
    order = rng.permutation(len(pairs))
    return [pairs[i] for i in order], warnings


def _gold_pair(item, corrections: dict, compliant: list, rng: np.random.Generator) -> tuple:
    record = item.record
    if item.action == "RETAIN":
        return record.chosen, record.rejected
    if item.action == "INVERT":
        return record.rejected, record.chosen
    if record.id in corrections:
        return corrections[record.id], record.chosen
    if not compliant:
        raise InputError(
            "no compliant response in the data to stand against PUNISH records; make corrections "
            "first"
        )
    return compliant[int(rng.integers(len(compliant)))], record.chosen
