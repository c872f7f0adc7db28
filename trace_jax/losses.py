"""Per-example losses: pure, unreduced, in float32.

Legend: B examples, L tokens, V vocabulary, T tokens of a chunk, D width.
A logratio is r(y) = log p_theta(y|x) - log p_ref(y|x), summed over response tokens. Nothing here
shifts labels: position t of a logits array predicts the target t of `batches.py`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from trace_jax import sharding

Array = jax.Array
LogitsFn = Callable[[Array], Array]  # hidden [B, T, D] -> float32 logits [B, T, V]

_CHUNK_BYTES = 4 * 2**20  # float32 logits kept alive at once by the chunked head


def logistic_preference(r0_B: Array, r1_B: Array, beta: float | Array) -> Array:
    """-log sigma(beta (r0 - r1)), y0 preferred: DPO, arXiv 2305.18290 eq. 7 (TRACE's "IPO")."""
    return -jax.nn.log_sigmoid(beta * (r0_B - r1_B))


def squared_preference(r0_B: Array, r1_B: Array, tau: float | Array) -> Array:
    """(r0 - r1 - 1 / (2 tau))^2, y0 preferred: IPO, arXiv 2310.12036 eq. 17."""
    return jnp.square(r0_B - r1_B - 1.0 / (2.0 * tau))


def npo(r_B: Array, beta: float | Array, scale: str = "plain") -> Array:
    """-log sigma(-beta r): negative preference, arXiv 2404.05868 eq. 3.

    scale: "plain" as TRACE writes it, or "two_over_beta" with the NPO paper's factor 2 / beta.
    """
    if scale not in ("plain", "two_over_beta"):
        raise ValueError(f"scale={scale!r} is unknown; use 'plain' or 'two_over_beta'")
    loss_B = -jax.nn.log_sigmoid(-beta * r_B)
    return loss_B if scale == "plain" else loss_B * (2.0 / beta)


def forward_kl(ref_logits_BLV: Array, logits_BLV: Array, mask_BL: Array) -> Array:
    """KL(p_ref || p_theta) over the whole vocabulary: mean over positions where mask_BL is 1.

    The whole [B, L, V] form, for small inputs and as the reference of `token_kl`. An empty mask
    gives 0.
    """
    kl_BL = _kl(ref_logits_BLV, logits_BLV)
    mask_BL = mask_BL.astype(kl_BL.dtype)
    return jnp.sum(kl_BL * mask_BL, axis=-1) / jnp.maximum(jnp.sum(mask_BL, axis=-1), 1.0)


def token_logprobs(
    logits_fn: LogitsFn, hidden_BLD: Array, targets_BL: Array, counts_BL: Array, chunk: int = 0
) -> Array:
    """log p(target) where counts_BL, else 0, [B, L]; the LM head in chunks, never [B, L, V].

    chunk: tokens of a data shard at once; 0: so many that their logits take 4 MiB.
    """

    def logprobs(hidden_BTD: Array, targets_BT: Array) -> Array:
        return _of_targets(logits_fn(hidden_BTD), targets_BT)

    return _over_chunks(logprobs, logits_fn, (hidden_BLD, targets_BL), counts_BL, chunk)


def token_shortfalls(
    logits_fn: LogitsFn, hidden_BLD: Array, targets_BL: Array, counts_BL: Array, chunk: int = 0
) -> Array:
    """The target's logit less the largest one where counts_BL, else 0, [B, L].

    Exactly 0 where greedy decoding takes the target.
    """

    def shortfalls(hidden_BTD: Array, targets_BT: Array) -> Array:
        logits_BTV = logits_fn(hidden_BTD)
        is_target = jnp.arange(logits_BTV.shape[-1])[None, None] == targets_BT[..., None]
        picked_BT = jnp.max(jnp.where(is_target, logits_BTV, -jnp.inf), axis=-1)
        return picked_BT - jnp.max(logits_BTV, axis=-1)

    return _over_chunks(shortfalls, logits_fn, (hidden_BLD, targets_BL), counts_BL, chunk)


def token_kl(
    ref_logits_fn: LogitsFn,
    ref_hidden_BLD: Array,
    logits_fn: LogitsFn,
    hidden_BLD: Array,
    counts_BL: Array,
    chunk: int = 0,
) -> Array:
    """KL(p_ref || p_theta) where counts_BL, else 0, [B, L], through both LM heads in chunks.

    The reference has no gradient.
    """

    def kl(ref_hidden_BTD: Array, hidden_BTD: Array) -> Array:
        return _kl_to(logits_fn(hidden_BTD), ref_logits_fn(ref_hidden_BTD))

    return _over_chunks(kl, logits_fn, (ref_hidden_BLD, hidden_BLD), counts_BL, chunk)


def _kl(ref_logits: Array, logits: Array) -> Array:
    ref_logp = jax.nn.log_softmax(ref_logits.astype(jnp.float32), axis=-1)
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.sum(jnp.exp(ref_logp) * (ref_logp - logp), axis=-1)


# Derivatives of both as one sum over the vocabulary of what is kept times the logits' tangent.


@jax.custom_jvp
def _of_targets(logits_BTV: Array, targets_BT: Array) -> Array:
    """log p of each target, [B, T]."""
    # A sum instead of an index: the vocabulary may lie over many devices.
    picked_BT = jnp.sum(jnp.where(_is_target(logits_BTV, targets_BT), logits_BTV, 0.0), axis=-1)
    return picked_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


@_of_targets.defjvp
def _of_targets_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (logits_BTV, targets_BT), (tangent_BTV, _) = primals, tangents
    of_target = _is_target(logits_BTV, targets_BT)
    slope_BTV = jnp.where(of_target, 1.0, 0.0) - jax.nn.softmax(logits_BTV, axis=-1)
    return _of_targets(logits_BTV, targets_BT), _dot(slope_BTV, tangent_BTV)


def _is_target(logits_BTV: Array, targets_BT: Array) -> Array:
    return jnp.arange(logits_BTV.shape[-1])[None, None] == targets_BT[..., None]


@jax.custom_jvp
def _kl_to(logits_BTV: Array, ref_logits_BTV: Array) -> Array:
    """KL(p_ref || p_theta) of each token, [B, T]."""
    ref_logp_BTV = jax.nn.log_softmax(ref_logits_BTV, axis=-1)
    logp_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    return _dot(jnp.exp(ref_logp_BTV), ref_logp_BTV - logp_BTV)


def _kl_to_jvp(tangent_BTV: Array, _: Array, logits_BTV: Array, ref_logits_BTV: Array) -> Array:
    p_BTV, ref_p_BTV = (jax.nn.softmax(x, axis=-1) for x in (logits_BTV, ref_logits_BTV))
    return _dot(p_BTV - ref_p_BTV, tangent_BTV)


_kl_to.defjvps(_kl_to_jvp, None)


def _dot(a_BTV: Array, b_BTV: Array) -> Array:
    """Sum over the vocabulary of the products, [B, T].

    In arrays of two dimensions, as XLA's CPU compiler takes ten to thirty times as long for a sum
    of products where one of the dimensions is 1, as B is of a device (jax 0.10).
    """
    B, T, V = a_BTV.shape
    return jnp.sum(a_BTV.reshape(B * T, V) * b_BTV.reshape(B * T, V), axis=-1).reshape(B, T)


def _over_chunks(
    of_chunk: Callable[..., Array],
    logits_fn: LogitsFn,
    arrays: tuple[Array, Array],
    counts_BL: Array,
    chunk: int,
) -> Array:
    """Maps `of_chunk` over chunks of the tokens of [B, L, ...]; the backward pass repeats them.

    Tokens that count come first and chunks without any are skipped: of prompts there are no logits.
    Every data shard sorts its own tokens and works on each chunk. Where one chunk holds all tokens,
    nothing is sorted and those that do not count are computed as well.
    """
    B, L = arrays[0].shape[:2]
    if not chunk:
        hidden = next(a for a in arrays if a.ndim == 3)
        V = jax.eval_shape(logits_fn, hidden[:, :1]).shape[-1]
        chunk = max(128, _CHUNK_BYTES // (4 * V))
    n = sharding.shards_in_context()
    n = n if B % n == 0 else 1
    N = B // n * L  # tokens of a data shard
    n_chunks = -(-N // chunk)
    if n_chunks == 1:
        out_BL = jax.checkpoint(of_chunk)(*arrays)
        return sharding.rows(jnp.where(counts_BL, out_BL, 0.0))
    T = -(-N // n_chunks)
    order_nN = jnp.argsort(~counts_BL.reshape(n, N), axis=1, stable=True)

    def cut(a: Array) -> Array:
        flat = sharding.rows(a.reshape(n, N, *a.shape[2:]))
        in_order = jax.vmap(lambda of_shard, order_N: of_shard[order_N])(flat, order_nN)
        padded = jnp.pad(in_order, [(0, 0), (0, n_chunks * T - N)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(padded.reshape(n, n_chunks, T, *a.shape[2:]), 1, 0)

    def computed(of_shards: tuple) -> Array:
        return of_chunk(*of_shards)

    def skipped(of_shards: tuple) -> Array:
        return jnp.zeros(of_shards[0].shape[:2], jnp.float32)

    def one(chunk_and_counts: tuple) -> Array:
        of_shards, counts_nT = chunk_and_counts
        return jax.lax.cond(jnp.any(counts_nT), computed, skipped, of_shards)

    # Around the choice, not in it, or the heads' parameters would be kept for every chunk.
    checkpointed = jax.checkpoint(one, prevent_cse=False)
    out_CnT = jax.lax.map(checkpointed, (jax.tree.map(cut, arrays), cut(counts_BL)))
    out_nN = jnp.moveaxis(out_CnT, 0, 1).reshape(n, n_chunks * T)[:, :N]
    out_nN = jnp.take_along_axis(out_nN, jnp.argsort(order_nN, axis=1), axis=1)
    return sharding.rows(jnp.where(counts_BL, out_nN.reshape(B, L), 0.0))
