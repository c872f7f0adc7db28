"""One decoder for every family we train: Llama today (grouped queries, RoPE, RMSNorm, SwiGLU).

Axes: B rows, L tokens, D width, V vocabulary, N layers, H query heads, K key-value heads,
C channels of a head, S keys (L in training, cache slots in decoding), F = C / 2.

Parameters are stacked over layers ([N, ...] leaves) and scanned; one-token steps unroll the scan.
Everything is plain XLA operations, because `jax.jvp` has to pass through all of it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trace_jax.models import model_config

Draw = Callable[[float, tuple[int, ...]], np.ndarray | jax.Array]  # (std, shape) -> initial values

_MASKED = -1e30  # added to a score; finite, so that a row with no key to attend to stays finite


class Rotary(NamedTuple):
    """Cosine and sine of every position's angles."""

    cos_BLF: jax.Array
    sin_BLF: jax.Array


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
    q_BLHC: jax.Array, k_BKSC: jax.Array, v_BKSC: jax.Array, bias_BLS: jax.Array
) -> jax.Array:
    """Grouped-query attention [B, L, H, C]; scores and softmax are float32, divided last."""
    B, L, H, C = q_BLHC.shape
    K, S = k_BKSC.shape[1:3]
    groups, flat = (B, K, H // K, L, S), (B, K, H // K * L, S)
    q_BKXC = (q_BLHC * C**-0.5).transpose(0, 2, 1, 3).reshape(B, K, -1, C)  # X = G * L
    scores = jnp.einsum("bkxc,bksc->bkxs", q_BKXC, k_BKSC, preferred_element_type=jnp.float32)
    scores = scores.reshape(groups) + bias_BLS[:, None, None]
    # The softmax does not change with the shift, so the shift needs no gradient.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total_BKX1 = jnp.sum(weights, axis=-1).reshape(B, K, -1, 1)
    weights = weights.astype(v_BKSC.dtype).reshape(flat)
    out_BKXC = jnp.einsum("bkxs,bksc->bkxc", weights, v_BKSC, preferred_element_type=jnp.float32)
    out = (out_BKXC / total_BKX1).astype(q_BLHC.dtype)
    return out.reshape(B, H, L, C).transpose(0, 2, 1, 3)


def attend_causal(
    q_BLHC: jax.Array, k_BKLC: jax.Array, v_BKLC: jax.Array, bias_BLL: jax.Array
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
            attend(q_BLHC[:, i:j], k_BKLC[:, :, :j], v_BKLC[:, :, :j], bias_BLL[:, i:j, :j])
            for i, j in ends
        ],
        axis=1,
    )


class Linear(nnx.Module):
    """x @ kernel, plus the low-rank update that `lora.add` gives it."""

    def __init__(self, kernel: jax.Array):
        self.kernel = nnx.Param(kernel)  # [in, out], and [N, in, out] while the layers are stacked
        self.lora_a = nnx.data(None)  # [in, rank]
        self.lora_b = nnx.data(None)  # [rank, out]
        self.lora_scale = 0.0

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        if self.lora_a is None:
            return y
        low = x @ self.lora_a[...].astype(x.dtype)
        return y + low @ self.lora_b[...].astype(x.dtype) * self.lora_scale


class Norm(nnx.Module):
    """RMSNorm, computed in float32."""

    def __init__(self, weight: jax.Array, eps: float):
        self.weight = nnx.Param(weight)
        self.eps = eps

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        x = x_BLD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x.astype(x_BLD.dtype) * self.weight[...].astype(x_BLD.dtype)[None, None, :]


class Layer(nnx.Module):
    """A transformer block. Built stacked over all layers; called on one of them."""

    def __init__(self, config: model_config.ModelConfig, draw: Draw, dtype: jnp.dtype):
        N, D, F = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        q = config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim

        def linear(rows: int, columns: int, gain: float = 1.0) -> Linear:
            return Linear(jnp.asarray(draw(gain * rows**-0.5, (N, rows, columns)), dtype))

        out_gain = 1.0 / math.sqrt(2 * N)
        self.attention_norm = Norm(jnp.ones((N, D), dtype), config.rms_norm_eps)
        self.q, self.k, self.v = linear(D, q), linear(D, kv), linear(D, kv)
        self.o = linear(q, D, out_gain)
        self.mlp_norm = Norm(jnp.ones((N, D), dtype), config.rms_norm_eps)
        self.gate, self.up = linear(D, F), linear(D, F)
        self.down = linear(F, D, out_gain)
        self.head_dim = config.head_dim

    def qkv(self, x_BLD: jax.Array, angles: Rotary) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(q_BLHC, k_BKLC, v_BKLC): rotated, keys and values in the layout of the cache."""
        h_BLD = self.attention_norm(x_BLD)
        shape = (*x_BLD.shape[:2], -1, self.head_dim)
        q, k, v = (linear(h_BLD).reshape(shape) for linear in (self.q, self.k, self.v))
        return rotate(q, angles), rotate(k, angles).transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    def finish(self, x_BLD: jax.Array, attended_BLHC: jax.Array) -> jax.Array:
        x_BLD = x_BLD + self.o(attended_BLHC.reshape(*x_BLD.shape[:2], -1))
        h_BLD = self.mlp_norm(x_BLD)
        return x_BLD + self.down(jax.nn.silu(self.gate(h_BLD)) * self.up(h_BLD))

    def __call__(self, x_BLD: jax.Array, angles: Rotary, bias_BLS: jax.Array) -> jax.Array:
        return self.finish(x_BLD, attend_causal(*self.qkv(x_BLD, angles), bias_BLS))


class Cache(NamedTuple):
    """Keys and values of the tokens decoded so far."""

    keys_NBKSC: jax.Array
    values_NBKSC: jax.Array
    valid_BS: jax.Array
    filled: (
        jax.Array
    )  # slots written, a scalar: the same for all rows, since prompts are padded on the left


class Decoder(nnx.Module):
    """A causal language model. Set `dtype`, that of activations, and `remat` at any time.

    `remat` keeps only the input of every layer for the backward pass: less memory, and on one CPU
    core also less time (0.6 of it at 4 x 256 tokens).
    """

    def __init__(
        self, config: model_config.ModelConfig, draw: Draw, dtype: jnp.dtype = jnp.float32
    ):
        V, D = config.vocab_size, config.hidden_size
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = True
        self.embed = nnx.Param(jnp.asarray(draw(2 * D**-0.5, (V, D)), dtype))
        self.layers = Layer(config, draw, dtype)
        self.norm = Norm(jnp.ones((D,), dtype), config.rms_norm_eps)
        self.head = nnx.data(None)
        if not config.tie_word_embeddings:
            self.head = Linear(jnp.asarray(draw(0.02, (D, V)), dtype))

    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segments_BL: jax.Array | None = None,
        branches_BL: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the next token, float32 [B, L, V]; arguments as in `hidden`."""
        return self.logits(self.hidden(tokens_BL, positions_BL, segments_BL, branches_BL))

    def hidden(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segments_BL: jax.Array | None = None,
        branches_BL: jax.Array | None = None,
    ) -> jax.Array:
        """Activations [B, L, D] after the last norm, for losses that run the head in chunks.

        Without positions they count from 0 along the row, padding included; `visible` has the rest.
        """
        if positions_BL is None:
            positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1])[None], tokens_BL.shape)
        angles = rotary(self.config, positions_BL)
        visible_BLL = visible(tokens_BL.shape, segments_BL, branches_BL)
        bias_BLL = jnp.where(visible_BLL, 0.0, _MASKED)
        graphdef, stacked = nnx.split(self.layers)

        def body(x_BLD: jax.Array, layer: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, layer)(x_BLD, angles, bias_BLL), None

        body = jax.checkpoint(body) if self.remat else body
        x_BLD, _ = jax.lax.scan(body, self._embed(tokens_BL), stacked)
        return self.norm(x_BLD)

    @property
    def head_kernel(self) -> jax.Array:
        """[D, V] in the dtype of activations; the transposed embedding where they are tied."""
        kernel_DV = self.embed[...].T if self.head is None else self.head.kernel[...]
        return kernel_DV.astype(self.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of activations [..., D]."""
        return jnp.matmul(hidden, self.head_kernel, preferred_element_type=jnp.float32)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows of at most `length` tokens, padding included."""
        config = self.config
        shape = (
            config.num_hidden_layers,
            batch,
            config.num_key_value_heads,
            length,
            config.head_dim,
        )
        empty = jnp.zeros(shape, self.dtype)
        return Cache(empty, empty, jnp.zeros((batch, length), bool), jnp.zeros((), jnp.int32))

    def decode(
        self, tokens_BL: jax.Array, positions_BL: jax.Array, valid_BL: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Appends left-padded prompts, or one token, to the cache: (activations [B, L, D], cache).

        Tokens with `valid` 0 are padding: nothing attends to them, their activations mean nothing.
        """
        L, S = tokens_BL.shape[1], cache.valid_BS.shape[1]
        valid_BS = jax.lax.dynamic_update_slice(
            cache.valid_BS, valid_BL.astype(bool), (0, cache.filled)
        )
        causal_LS = jnp.arange(S)[None, :] <= cache.filled + jnp.arange(L)[:, None]
        bias_BLS = jnp.where(causal_LS[None] & valid_BS[:, None, :], 0.0, _MASKED)
        angles = rotary(self.config, positions_BL)
        graphdef, stacked = nnx.split(self.layers)

        def body(carry, layer_and_index):
            x_BLD, keys, values = carry
            layer, n = layer_and_index
            layer = nnx.merge(graphdef, layer)
            q, k, v = layer.qkv(x_BLD, angles)
            keys = jax.lax.dynamic_update_slice(keys, k[None], (n, 0, 0, cache.filled, 0))
            values = jax.lax.dynamic_update_slice(values, v[None], (n, 0, 0, cache.filled, 0))
            x_BLD = layer.finish(x_BLD, attend(q, keys[n], values[n], bias_BLS))
            return (x_BLD, keys, values), None

        N = self.config.num_hidden_layers
        carry = (self._embed(tokens_BL), cache.keys_NBKSC, cache.values_NBKSC)
        unroll = N if L == 1 else 1  # unrolled, a one-token step writes to the cache in place
        (x_BLD, keys, values), _ = jax.lax.scan(
            body, carry, (stacked, jnp.arange(N)), unroll=unroll
        )
        return self.norm(x_BLD), Cache(keys, values, valid_BS, cache.filled + L)

    def _embed(self, tokens_BL: jax.Array) -> jax.Array:
        return self.embed[...].astype(self.dtype)[tokens_BL]


def visible(
    shape: tuple[int, int], segments_BL: jax.Array | None, branches_BL: jax.Array | None
) -> jax.Array:
    """[B, L, L]: may token i attend to token j?

    j <= i along the row, both in one segment, and j in branch 0 (the shared prompt) or in i's.
    Segment 0 is padding: it attends to padding, so it stays finite, and touches nothing else.
    """
    B, L = shape
    see_BLL = jnp.broadcast_to(jnp.tril(jnp.ones((L, L), bool))[None], (B, L, L))
    if segments_BL is not None:
        see_BLL &= segments_BL[:, :, None] == segments_BL[:, None, :]
    if branches_BL is not None:
        of_j = branches_BL[:, None, :]
        see_BLL &= (of_j == 0) | (of_j == branches_BL[:, :, None])
    return see_BLL


def init(config: model_config.ModelConfig, seed: int, dtype: jnp.dtype = jnp.float32) -> Decoder:
    """Random weights: normal, std inputs^-0.5, over sqrt(2 N) where they write to the residual.

    Embeddings have std 2 D^-0.5.
    """
    rng = np.random.default_rng(seed)  # nothing to compile, and the same on every backend
    return Decoder(config, lambda std, shape: std * rng.standard_normal(shape, np.float32), dtype)
