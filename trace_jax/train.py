"""The train step: one pure function for every method, and the loop around it.

Legend: R rows of a micro-batch, L tokens, S example slots of a row. A step is one completed update.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from trace_jax import batches, logprobs, losses, preemption, sharding
from trace_jax.errors import InputError

Array = jax.Array

_TIE = 1e-3  # nats; logratios closer than this differ by rounding: at theta_ref nothing is won


class TrainState(NamedTuple):
    """step: updates completed, int32. params: trainable leaves, float32. opt_state: optax's."""

    step: Array
    params: nnx.State
    opt_state: optax.OptState


class Hyper(NamedTuple):
    """Values that may change without recompiling. learning_rate is the peak of the schedule."""

    learning_rate: Array
    beta: Array
    tau: Array


@dataclasses.dataclass(frozen=True)
class Options:
    """What the step is compiled for.

    Attributes:
      preference: "logistic" or "squared".
      npo_scale: "plain" or "two_over_beta".
      length_normalised: divide each logratio of the preference loss by its response's length.
      n_conflict, n_retain: examples a step; the conflict loss is a sum over n_conflict, the KL loss
        a sum over n_retain.
      total_steps, warmup_steps: of the schedule (linear warm-up, cosine to final_fraction of the
        peak).
      weight_decay, clip_norm, b1, b2: AdamW.
      mu_dtype: of AdamW's first moment, "float32" or "bfloat16" (half its memory).
      drift: weight of the mean squared distance of the trainable leaves from where they began.
    """

    preference: str
    npo_scale: str
    length_normalised: bool
    n_conflict: int
    n_retain: int
    total_steps: int
    warmup_steps: int
    final_fraction: float
    weight_decay: float
    clip_norm: float
    b1: float
    b2: float
    mu_dtype: str = "float32"
    drift: float = 0.0


def optimizer(options: Options) -> optax.GradientTransformation:
    """AdamW with clipping, without its learning rate, which the step applies."""
    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.scale_by_adam(b1=options.b1, b2=options.b2, mu_dtype=options.mu_dtype),
        optax.add_decayed_weights(options.weight_decay),
    )


def schedule(options: Options) -> optax.Schedule:
    """Linear warm-up and cosine decay of a peak of 1."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=1.0,
        warmup_steps=options.warmup_steps,
        decay_steps=max(options.total_steps, options.warmup_steps + 1),
        end_value=options.final_fraction,
    )


@functools.partial(jax.jit, static_argnames=("options",))
def init_state(params: nnx.State, options: Options) -> TrainState:
    """A fresh state on float32 copies of `params` (the step donates its state), sharded like them.

    The originals stay, in the dtype they have.
    """
    params = jax.tree.map(lambda x: jnp.array(x, dtype=jnp.float32, copy=True), params)
    opt_state = optimizer(options).init(params)
    return TrainState(
        jnp.zeros((), jnp.int32),
        sharding.constrain_tree(params),
        sharding.constrain_tree(opt_state),
    )


def example_losses(
    logp_R2S: Array, lengths_R2S: Array, batch: batches.Batch, hyper: Hyper, options: Options
) -> tuple[Array, dict[str, Array]]:
    """Loss of every slot without its KL part, [R, S], and its parts; an empty slot is exactly 0."""
    R, S2 = logp_R2S.shape
    logratio = (logp_R2S - batch.ref_logp).reshape(R, S2 // 2, 2)
    n_tokens = jnp.maximum(lengths_R2S.reshape(R, S2 // 2, 2), 1.0)
    r0_RS, r1_RS = logratio[..., 0], logratio[..., 1]
    c = batch.coefficients
    scaled = logratio / n_tokens if options.length_normalised else logratio
    if options.preference == "logistic":
        preference_RS = losses.logistic_preference(scaled[..., 0], scaled[..., 1], hyper.beta)
    else:
        preference_RS = losses.squared_preference(scaled[..., 0], scaled[..., 1], hyper.tau)
    nll_RS = -logp_R2S.reshape(R, S2 // 2, 2)[..., 0] / n_tokens[..., 0]
    parts = {
        "preference": _weighted(c["pref"], preference_RS),
        "npo": _weighted(c["npo0"], losses.npo(r0_RS, hyper.beta, options.npo_scale))
        + _weighted(c["npo1"], losses.npo(r1_RS, hyper.beta, options.npo_scale)),
        "nll": _weighted(c["nll"], nll_RS),
    }
    is_pair_RS = (c["pref"] != 0).astype(jnp.float32)
    diagnostics = {
        "n_pairs": is_pair_RS,
        "logratio_0": is_pair_RS * r0_RS,
        "logratio_1": is_pair_RS * r1_RS,
        "logp_0": is_pair_RS * logp_R2S.reshape(R, S2 // 2, 2)[..., 0],
        "logp_1": is_pair_RS * logp_R2S.reshape(R, S2 // 2, 2)[..., 1],
        "pairs_won": is_pair_RS * (r0_RS - r1_RS > _TIE),
    }
    return sum(parts.values()), {**parts, **diagnostics}


def _weighted(coefficient_RS: Array, loss_RS: Array) -> Array:
    """coefficient * loss, exactly 0 (value and gradient) where the coefficient is 0."""
    used = coefficient_RS != 0
    return jnp.where(used, coefficient_RS * jnp.where(used, loss_RS, 0.0), 0.0)


def conflict_loss(
    module, hidden_RLD: Array, batch: batches.Batch, hyper: Hyper, options: Options
) -> tuple[Array, dict[str, Array]]:
    """Losses of one micro-batch, summed over n_conflict, and its parts (diagnostics unscaled)."""
    n = batch.ref_logp.shape[-1]
    logp = logprobs.of_hidden(module, hidden_RLD, batch.rows, n)
    lengths = logprobs.response_lengths(batch.rows, n)
    loss_RS, parts = example_losses(logp, lengths, batch, hyper, options)
    return jnp.sum(loss_RS) / options.n_conflict, {k: jnp.sum(v) for k, v in parts.items()}


def retain_loss(
    module, hidden_RLD: Array, ref_module, batch: batches.Batch, options: Options
) -> tuple[Array, dict[str, Array]]:
    """Sum of kl * mean-over-tokens KL(ref || theta) of one micro-batch over n_retain."""
    rows, n = batch.rows, batch.ref_logp.shape[-1]
    kl_RL = losses.token_kl(
        ref_module.logits,
        jax.lax.stop_gradient(logprobs.hidden(ref_module, rows)),
        module.logits,
        hidden_RLD,
        logprobs.counted(rows, n),
        module.head_chunk,
    )
    lengths = jnp.maximum(logprobs.response_lengths(rows, n), 1.0)
    kl_RS = (logprobs.sum_by_response(kl_RL, rows.responses, n) / lengths)[:, ::2]
    loss = jnp.sum(_weighted(batch.coefficients["kl"], kl_RS)) / options.n_retain
    return loss, {"kl": jnp.sum(jnp.where(batch.coefficients["kl"] != 0, kl_RS, 0.0))}


def _accumulate(
    loss_fn: Callable, params: nnx.State, batch: batches.Batch | batches.Step
) -> tuple[nnx.State, Array, dict]:
    """Gradient (summed in float32), loss and parts, summed over micro-batches by a scan.

    One micro-batch needs no scan, and so no second copy of the gradient.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    first = jax.tree.map(lambda a: a[0], batch)
    if jax.tree.leaves(batch)[0].shape[0] == 1:
        (loss, parts), grads = grad_fn(params, first)
        return sharding.constrain_tree(grads), loss, parts

    def body(carry, micro):
        (loss, parts), grads = grad_fn(params, micro)
        total, *sums = jax.tree.map(jnp.add, carry, (grads, loss, parts))
        return (sharding.constrain_tree(total), *sums), None

    shapes = jax.eval_shape(grad_fn, params, first)[0]
    loss, parts = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    return jax.lax.scan(body, (sharding.constrain_tree(zeros), loss, parts), batch)[0]


def gradient(
    params: nnx.State,
    frozen: nnx.State,
    ref_params: nnx.State | None,
    step: batches.Step,
    hyper: Hyper,
    *,
    graphdef: nnx.GraphDef,
    options: Options,
) -> tuple[nnx.State, dict[str, Array]]:
    """Gradient of the step's loss over the trainable leaves, and metrics (device scalars)."""

    def conflict(params: nnx.State, micro: batches.Batch):
        module = nnx.merge(graphdef, params, frozen)
        return conflict_loss(module, logprobs.hidden(module, micro.rows), micro, hyper, options)

    def retain(params: nnx.State, micro: batches.Batch):
        module, reference = (nnx.merge(graphdef, p, frozen) for p in (params, ref_params))
        hidden_RLD = logprobs.hidden(module, micro.rows)
        return retain_loss(module, hidden_RLD, reference, micro, options)

    def both(params: nnx.State, micro: batches.Step):
        module, reference = (nnx.merge(graphdef, p, frozen) for p in (params, ref_params))
        rows = _interleaved(micro.conflict.rows, micro.retain.rows)
        of_conflict, of_retain = _apart(
            logprobs.hidden(module, rows), micro.conflict.rows, micro.retain.rows
        )
        loss, parts = conflict_loss(module, of_conflict, micro.conflict, hyper, options)
        kl_loss, kl_parts = retain_loss(module, of_retain, reference, micro.retain, options)
        return loss + kl_loss, {**parts, **kl_parts}

    if step.retain is None:
        grads, loss, parts = _accumulate(conflict, params, step.conflict)
    elif step.conflict is None:
        grads, loss, parts = _accumulate(retain, params, step.retain)
    else:  # one pass through the layers, and one gradient, for both
        grads, loss, parts = _accumulate(both, params, step)
    return grads, _metrics(loss, parts, options)


def _interleaved(a: batches.Rows, b: batches.Rows) -> batches.Rows:
    """Rows of both, so ordered that none leaves the data shard that has it."""
    n = _parts(a.tokens, b.tokens)

    def together(x: Array, y: Array) -> Array:
        parts = (z.reshape(n, -1, z.shape[-1]) for z in (x, y))
        return sharding.rows(jnp.concatenate(list(parts), axis=1).reshape(-1, x.shape[-1]))

    return jax.tree.map(together, a, b)


def _apart(x: Array, a: batches.Rows, b: batches.Rows) -> tuple[Array, Array]:
    """What `_interleaved` put together."""
    n = _parts(a.tokens, b.tokens)
    parts = jnp.split(x.reshape(n, -1, *x.shape[1:]), [a.tokens.shape[0] // n], axis=1)
    of_a, of_b = (sharding.rows(part.reshape(-1, *x.shape[1:])) for part in parts)
    return of_a, of_b


def _parts(*tokens: Array) -> int:
    n = sharding.shards_in_context()
    return 1 if any(t.shape[0] % n for t in tokens) else n


def _metrics(loss: Array, parts: dict[str, Array], options: Options) -> dict[str, Array]:
    parts, found = dict(parts), {"loss/total": loss}
    if "kl" in parts:
        found["train/kl"] = parts.pop("kl") / options.n_retain
    if parts:
        n_pairs = jnp.maximum(parts.pop("n_pairs"), 1.0)
        for name in ("logratio_0", "logratio_1", "logp_0", "logp_1", "pairs_won"):
            found[f"train/{name}"] = parts.pop(name) / n_pairs
    return found | {f"loss/{k}": v / options.n_conflict for k, v in parts.items()}


def _drift(params: nnx.State, origin: nnx.State) -> Array:
    """Mean squared distance of the trainable leaves from where they began."""
    squares = jax.tree.map(lambda p, o: jnp.sum(jnp.square(p - o)), params, origin)
    return sum(jax.tree.leaves(squares)) / sum(p.size for p in jax.tree.leaves(params))


@functools.partial(jax.jit, static_argnames=("graphdef", "options"), donate_argnames=("state",))
def train_step(
    state: TrainState,
    frozen: nnx.State,
    ref_params: nnx.State | None,
    step: batches.Step,
    hyper: Hyper,
    origin: nnx.State | None = None,
    *,
    graphdef: nnx.GraphDef,
    options: Options,
) -> tuple[TrainState, dict[str, Array]]:
    """One update. origin: the trainable leaves as they began, where options.drift is not 0.

    A non-finite loss or gradient leaves params and optimizer alone and sets train/skipped to 1.
    """
    grads, metrics = gradient(
        state.params, frozen, ref_params, step, hyper, graphdef=graphdef, options=options
    )
    if options.drift:
        loss, pull = jax.value_and_grad(_drift)(state.params, origin)
        grads = jax.tree.map(lambda g, p: g + options.drift * p, grads, pull)
        metrics["loss/total"] += options.drift * loss
        metrics["train/drift"] = loss
    rate = hyper.learning_rate * schedule(options)(state.step)
    updates, opt_state = optimizer(options).update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss/total"]) & jnp.isfinite(norm)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    metrics |= {
        "train/grad_norm": norm,
        "train/learning_rate": rate,
        "train/skipped": 1.0 - finite.astype(jnp.float32),
    }
    params, opt_state = sharding.constrain_tree(params), sharding.constrain_tree(opt_state)
    return TrainState(state.step + 1, params, opt_state), sharding.replicated(metrics)


def loop(
    state: TrainState,
    data: Iterator[batches.Step],
    step_fn: Callable[[TrainState, batches.Step], tuple[TrainState, dict[str, Array]]],
    *,
    start: int,
    total_steps: int,
    record_ids: Callable[[int], list[str]],
    on_metrics: Callable[[int, dict[str, float]], bool],
    save: Callable[[int, TrainState], None],
    save_every: int,
    due: Callable[[int], bool] = lambda step: False,
) -> TrainState:
    """Runs steps start..total_steps-1. Metrics of step n are read after step n + 1 was dispatched.

    on_metrics: called once for every step; false where a step that was not finite, which changed
    nothing, is one too many. due: asked after every step; where it is true the step is saved and
    the run ends.

    Raises:
      InputError: on_metrics was false; the records of the step are named.
      preemption.Preempted: due was true.
    """
    pending: tuple[int, dict[str, Array]] | None = None
    for index in range(start, total_steps):
        state, metrics = step_fn(state, next(data))
        if pending is not None:
            _report(*pending, record_ids, on_metrics)
        pending = (index, metrics)
        if (index + 1) % save_every == 0 or index + 1 == total_steps:
            _report(*pending, record_ids, on_metrics)
            pending = None
            save(index + 1, state)
        if due(index + 1):
            if pending is not None:
                _report(*pending, record_ids, on_metrics)
            save(index + 1, state)
            raise preemption.Preempted(f"step {index + 1} is saved")
    return state


def _report(
    index: int,
    metrics: dict[str, Array],
    record_ids: Callable[[int], list[str]],
    on_metrics: Callable[[int, dict[str, float]], bool],
) -> None:
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    if not on_metrics(index + 1, values):
        raise InputError(
            f"step {index + 1}: the loss or its gradient is not finite "
            f"(loss {values['loss/total']}); stopped, the last good checkpoint is kept. "
            f"Records of that step: {', '.join(sorted(set(record_ids(index))))}. "
            "Look at those records, lower train.learning_rate, or let train.skip_steps be more."
        )
