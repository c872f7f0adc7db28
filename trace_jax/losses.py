"""Per-example losses: pure, unreduced, in float32.

Legend: B examples, L tokens, V vocabulary, T tokens of a chunk, D width.
A logratio is r(y) = log p_theta(y|x) - log p_ref(y|x), summed over response tokens. Nothing here
shifts labels: position t of a logits array predicts the target t of `batches.py`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
LogitsFn = Callable[[Array], Array]  # hidden [..., D] -> float32 logits [..., V]

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


def token_logprobs(logits_fn: LogitsFn, hidden_BLD: Array, targets_BL: Array) -> Array:
    """log p(target) at every position, [B, L]; the LM head in chunks of tokens, never [B, L, V]."""

    def chunk(inputs: tuple[Array, Array]) -> Array:
        hidden_TD, targets_T = inputs
        logits_TV = logits_fn(hidden_TD)
        picked_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
        return picked_T - jax.nn.logsumexp(logits_TV, axis=-1)

    return _over_chunks(chunk, logits_fn, (hidden_BLD, targets_BL))


def token_kl(
    ref_logits_fn: LogitsFn, ref_hidden_BLD: Array, logits_fn: LogitsFn, hidden_BLD: Array
) -> Array:
    """KL(p_ref || p_theta) at every position, [B, L], through both LM heads in chunks of tokens."""

    def chunk(inputs: tuple[Array, Array]) -> Array:
        ref_hidden_TD, hidden_TD = inputs
        return _kl(ref_logits_fn(ref_hidden_TD), logits_fn(hidden_TD))

    return _over_chunks(chunk, logits_fn, (ref_hidden_BLD, hidden_BLD))


def _kl(ref_logits: Array, logits: Array) -> Array:
    ref_logp = jax.nn.log_softmax(ref_logits.astype(jnp.float32), axis=-1)
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.sum(jnp.exp(ref_logp) * (ref_logp - logp), axis=-1)


def _over_chunks(
    chunk: Callable[[tuple[Array, Array]], Array], logits_fn: LogitsFn, arrays: tuple[Array, Array]
) -> Array:
    """Maps `chunk` over token chunks of [B, L, ...]; the backward pass computes logits anew."""
    B, L = arrays[0].shape[:2]
    hidden = next(a for a in arrays if a.ndim == 3)
    V = jax.eval_shape(logits_fn, jax.ShapeDtypeStruct((1, hidden.shape[-1]), hidden.dtype)).shape[
        -1
    ]
    size = max(128, _CHUNK_BYTES // (4 * V))
    flat = jax.tree.map(lambda a: a.reshape(B * L, *a.shape[2:]), arrays)
    if size >= B * L:
        return jax.checkpoint(chunk)(flat).reshape(B, L)
    n_chunks = -(-B * L // size)
    size = -(-B * L // n_chunks)
    padded = jax.tree.map(
        lambda a: jnp.pad(a, [(0, n_chunks * size - B * L)] + [(0, 0)] * (a.ndim - 1)), flat
    )
    stacked = jax.tree.map(lambda a: a.reshape(n_chunks, size, *a.shape[1:]), padded)
    return jax.lax.map(jax.checkpoint(chunk), stacked).reshape(-1)[: B * L].reshape(B, L)
