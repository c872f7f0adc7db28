"""Rotary positions, who may attend to whom, and grouped-query attention in plain XLA operations.

Axes: B rows, L tokens, H query heads, K key-value heads, C channels of a head, S keys,
F = C / 2. No fused kernel: `jax.jvp` has to pass, and so do branch masks and soft-caps.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trace_jax.models import model_config

MASKED = -1e30  # added to a score; finite, so that a row with no key to attend to stays finite


class Rotary(NamedTuple):
    """Cosine and sine of every position's angles."""

    cos_BLF: jax.Array
    sin_BLF: jax.Array


class Tokens(NamedTuple):
    """What says who may attend to whom, of each token of rows (`batches.Rows`)."""

    positions_BL: jax.Array
    segments_BL: jax.Array
    branches_BL: jax.Array


class Visible(NamedTuple):
    """Who may attend to whom. `far` marks keys outside a sliding window; None: there are none."""

    bias_BLS: jax.Array  # 0, or MASKED
    far_BLS: jax.Array | None

    def attend(
        self,
        q_BLHC: jax.Array,
        k_BKCL: jax.Array,
        v_BKCL: jax.Array,
        config: model_config.ModelConfig,
        is_local: jax.Array | None,
    ) -> jax.Array:
        """What the tokens of rows attend to, [B, L, H, C]."""
        return attend_causal(q_BLHC, k_BKCL, v_BKCL, self.of_layer(is_local), config)

    def of_layer(self, is_local: jax.Array | None) -> jax.Array:
        """The bias of a layer, which is local (sliding window) or global."""
        if self.far_BLS is None:
            return self.bias_BLS
        return jnp.where(self.far_BLS & is_local, MASKED, self.bias_BLS)


def rotary(config: model_config.ModelConfig, positions_BL: jax.Array) -> Rotary:
    """Angles of every position, in float32."""
    freq_F = config.rope_theta ** (
        -jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    )
    scaling = config.rope_scaling
    if (
        scaling is not None
    ):  # long waves are slowed by `factor`, short ones kept, those between blended
        turns_F = scaling.original_max_position_embeddings * freq_F / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep_F = jnp.clip((turns_F - low) / (high - low), 0.0, 1.0)
        freq_F = keep_F * freq_F + (1.0 - keep_F) * freq_F / scaling.factor
    angle_BLF = positions_BL[:, :, None].astype(jnp.float32) * freq_F[None, None, :]
    return Rotary(jnp.cos(angle_BLF), jnp.sin(angle_BLF))


def rotate(x_BLHC: jax.Array, angles: Rotary) -> jax.Array:
    """Rotates channel i with channel i + C/2, the order of Hugging Face's weights."""
    cos, sin = (a[:, :, None, :].astype(x_BLHC.dtype) for a in angles)
    a, b = jnp.split(x_BLHC, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(
    q_BLHC: jax.Array,
    k_BKCS: jax.Array,
    v_BKCS: jax.Array,
    bias_BLS: jax.Array,
    config: model_config.ModelConfig,
) -> jax.Array:
    """Grouped-query attention of rows, [B, L, H, C]."""

    def of_row(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
        return attend_row(q, k, v, bias, config)

    return jax.vmap(of_row)(q_BLHC, k_BKCS, v_BKCS, bias_BLS)


def attend_cached(
    q_BLHC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    bias_BLS: jax.Array,
    config: model_config.ModelConfig,
    used: jax.Array | None = None,
) -> jax.Array:
    """`attend` to a cache, of which no token sees more than the first `used` slots; None: all.

    It reads a quarter of the slots, two, three or all of them: most rows of a sampler are short,
    and on CPU a step takes the time of its reads.
    """

    def first(end: int) -> Callable[..., jax.Array]:
        def of(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
            k_BKCS, v_BKCS = (x[:, :, :end].swapaxes(2, 3) for x in (k, v))
            return attend(q, k_BKCS, v_BKCS, bias[..., :end], config)

        return of

    S = k_BKSC.shape[2]
    if used is None:
        return first(S)(q_BLHC, k_BKSC, v_BKSC, bias_BLS)
    ends = sorted({-(-S * n // 4) for n in range(1, 5)})
    which = jnp.searchsorted(jnp.asarray(ends), used)
    return jax.lax.switch(which, [first(end) for end in ends], q_BLHC, k_BKSC, v_BKSC, bias_BLS)


def attend_row(
    q_LHC: jax.Array,
    k_KCS: jax.Array,
    v_KCS: jax.Array,
    bias_LS: jax.Array,
    config: model_config.ModelConfig,
) -> jax.Array:
    """Of one row, [L, H, C]; scores and softmax are float32, divided last.

    Channels stand before keys: the products that give their gradients then take a fifth of the time
    on CPU where heads are small.
    """
    L, H, C = q_LHC.shape
    K, _, S = k_KCS.shape
    groups, flat = (K, H // K, L, S), (K, H // K * L, S)
    q_KXC = (q_LHC * config.query_scale).transpose(1, 0, 2).reshape(K, -1, C)  # X = G * L
    scores = jnp.einsum("kxc,kcs->kxs", q_KXC, k_KCS, preferred_element_type=jnp.float32)
    cap = config.attn_logit_softcapping
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    scores = scores.reshape(groups) + bias_LS[None, None]
    # The softmax does not change with the shift, so the shift needs no gradient.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total_KX1 = jnp.sum(weights, axis=-1).reshape(K, -1, 1)
    weights = weights.astype(v_KCS.dtype).reshape(flat)
    out_KXC = jnp.einsum("kxs,kcs->kxc", weights, v_KCS, preferred_element_type=jnp.float32)
    out = (out_KXC / total_KX1).astype(q_LHC.dtype)
    return out.reshape(H, L, C).transpose(1, 0, 2)


def attend_causal(
    q_BLHC: jax.Array,
    k_BKCL: jax.Array,
    v_BKCL: jax.Array,
    bias_BLL: jax.Array,
    config: model_config.ModelConfig,
) -> jax.Array:
    """`attend` where no token sees a later row index.

    Up to 4 blocks of queries, each with the keys up to its end, skip 3/8 of the scores: forward and
    gradient of 256 tokens took 0.7 of the time on one CPU core.
    """
    L = q_BLHC.shape[1]
    block = max(64, -(-L // 4))
    ends = [(start, min(start + block, L)) for start in range(0, L, block)]
    return jnp.concatenate(
        [
            attend(q_BLHC[:, i:j], k_BKCL[..., :j], v_BKCL[..., :j], bias_BLL[:, i:j, :j], config)
            for i, j in ends
        ],
        axis=1,
    )


def sees(
    of_q: Tokens,
    index_L: jax.Array,
    of_k: Tokens,
    index_S: jax.Array,
    *,
    window: int | None = None,
    is_local: jax.Array | bool = True,
) -> jax.Array:
    """May a token attend to another, [B, L, S]? index: where in the row each of them stands.

    The key not later along the row, both in one segment, and the key in branch 0 (the shared
    prompt) or in the query's. Segment 0 is padding: it attends to padding, so it stays finite, and
    touches nothing else. In a local layer a key is out of sight where its position is `window` or
    more before the query's.
    """
    of_j = of_k.branches_BL[:, None, :]
    see_BLS = (index_S[None, None, :] <= index_L[None, :, None]) & (
        of_q.segments_BL[:, :, None] == of_k.segments_BL[:, None, :]
    )
    see_BLS &= (of_j == 0) | (of_j == of_q.branches_BL[:, :, None])
    far_BLS = _far(of_q.positions_BL, of_k.positions_BL, window)
    return see_BLS if far_BLS is None else see_BLS & ~(far_BLS & is_local)


def visible(tokens: Tokens, *, window: int | None = None) -> Visible:
    """`sees` for whole rows, as what is added to scores."""
    index_L = jnp.arange(tokens.positions_BL.shape[1])
    see_BLL = sees(tokens, index_L, tokens, index_L)
    return Visible(_bias(see_BLL), _far(tokens.positions_BL, tokens.positions_BL, window))


def visible_slots(positions_BL: jax.Array, slots: int, *, window: int | None = None) -> Visible:
    """The same for a cache whose slot s holds the token at position s."""
    slots_1S = jnp.arange(slots)[None]
    see_BLS = slots_1S[:, None, :] <= positions_BL[:, :, None]
    return Visible(_bias(see_BLS), _far(positions_BL, slots_1S, window))


def _bias(see: jax.Array) -> jax.Array:
    return jnp.where(see, 0.0, MASKED)


def _far(positions_BL: jax.Array, of_keys_BS: jax.Array, window: int | None) -> jax.Array | None:
    if window is None:
        return None
    return positions_BL[:, :, None] - of_keys_BS[:, None, :] >= window
