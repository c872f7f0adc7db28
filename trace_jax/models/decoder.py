"""One decoder for three families: Llama 3, Qwen2.5 and Gemma 2.

Axes: B rows, L tokens, D width, V vocabulary, N layers, H query heads, K key-value heads,
C channels of a head, S cache slots.

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

from trace_jax import sharding
from trace_jax.models import attention, block_attention, model_config

Draw = Callable[[float, tuple[int, ...]], np.ndarray | jax.Array]  # (std, shape) -> initial values

# What the backward pass finds stored. layer: the input of every layer. dots: also what matrix
# products gave, so that it repeats only cheap operations. none: everything.
REMAT = ("layer", "dots", "none")


class Linear(nnx.Module):
    """x @ kernel + bias, plus the low-rank update that `lora.add` gives it.

    cut: the dimension of the kernel that tensor parallelism cuts, -1 or -2.
    """

    def __init__(self, kernel: jax.Array, bias: jax.Array | None = None, cut: int = -1):
        self.kernel = nnx.Param(kernel)  # [in, out], and [N, in, out] while the layers are stacked
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))  # [out]
        self.lora_a = nnx.data(None)  # [in, rank]
        self.lora_b = nnx.data(None)  # [rank, out]
        self.lora_scale = 0.0
        self.cut = cut

    def __call__(self, x: jax.Array) -> jax.Array:
        y = sharding.product(x, self.kernel[...].astype(x.dtype), self.cut)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)[None, None, :]
        if self.lora_a is None:
            return y
        low = x @ self.lora_a[...].astype(x.dtype)
        return y + low @ self.lora_b[...].astype(x.dtype) * self.lora_scale


class Norm(nnx.Module):
    """RMSNorm, computed in float32; `offset` 1 where the weight is stored less 1 (Gemma)."""

    def __init__(self, weight: jax.Array, eps: float, offset: float):
        self.weight = nnx.Param(weight)
        self.eps = eps
        self.offset = offset

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        x = x_BLD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        if self.offset:  # the families differ in where they round to the dtype of activations
            weight_D = self.offset + self.weight[...].astype(jnp.float32)
            return (x * weight_D[None, None, :]).astype(x_BLD.dtype)
        return x.astype(x_BLD.dtype) * self.weight[...].astype(x_BLD.dtype)[None, None, :]


class Layer(nnx.Module):
    """A transformer block. Built stacked over all layers; called on one of them."""

    def __init__(self, config: model_config.ModelConfig, draw: Draw, dtype: jnp.dtype):
        N, D, F = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        q = config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim

        def linear(rows: int, columns: int, *, bias: bool = False) -> Linear:
            kernel = jnp.asarray(draw(rows**-0.5, (N, rows, columns)), dtype)
            return Linear(kernel, jnp.zeros((N, columns), dtype) if bias else None)

        def writer(rows: int) -> Linear:  # to the residual stream
            std = rows**-0.5 / math.sqrt(2 * N)
            return Linear(jnp.asarray(draw(std, (N, rows, D)), dtype), cut=-2)

        def norm() -> Norm:
            return _norm(config, (N, D), dtype)

        self.attention_norm = norm()
        self.q = linear(D, q, bias=config.has_qkv_bias)
        self.k = linear(D, kv, bias=config.has_qkv_bias)
        self.v = linear(D, kv, bias=config.has_qkv_bias)
        self.o = writer(q)
        self.mlp_norm = norm()
        self.gate, self.up = linear(D, F), linear(D, F)
        self.down = writer(F)
        self.post_attention_norm = nnx.data(norm() if config.is_gemma else None)
        self.post_mlp_norm = nnx.data(norm() if config.is_gemma else None)
        self.config = config

    def qkv(
        self, x_BLD: jax.Array, angles: attention.Rotary
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(q_BLHC, k_BLKC, v_BLKC), rotated."""
        h_BLD = self.attention_norm(x_BLD)
        shape = (*x_BLD.shape[:2], -1, self.config.head_dim)
        q, k, v = (sharding.heads(m(h_BLD).reshape(shape)) for m in (self.q, self.k, self.v))
        q, k = attention.rotate(q, angles), attention.rotate(k, angles)
        return q, k, v

    def finish(self, x_BLD: jax.Array, attended_BLHC: jax.Array) -> jax.Array:
        """Adds the attention's output and the MLP's to the residual stream."""
        a_BLD = self.o(attended_BLHC.reshape(*x_BLD.shape[:2], -1))
        if self.post_attention_norm is not None:
            a_BLD = self.post_attention_norm(a_BLD)
        x_BLD = sharding.rows(x_BLD + a_BLD)
        h_BLD = self.mlp_norm(x_BLD)
        gate = self.gate(h_BLD)
        gate = jax.nn.gelu(gate, approximate=True) if self.config.is_gemma else jax.nn.silu(gate)
        m_BLD = self.down(gate * self.up(h_BLD))
        if self.post_mlp_norm is not None:
            m_BLD = self.post_mlp_norm(m_BLD)
        return sharding.rows(x_BLD + m_BLD)

    def __call__(
        self,
        x_BLD: jax.Array,
        angles: attention.Rotary,
        seen: attention.Visible | block_attention.Blocks,
        is_local: jax.Array,
    ) -> jax.Array:
        q, k, v = self.qkv(x_BLD, angles)
        k_BKCL, v_BKCL = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1)
        attended = seen.attend(q, k_BKCL, v_BKCL, self.config, is_local)
        return self.finish(x_BLD, attended)


class Cache(NamedTuple):
    """Keys and values of the tokens decoded so far: slot s of a row holds its position s.

    An array [B, K, S, C] a layer: of one array of all layers each would be cut out for every token.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


class Decoder(nnx.Module):
    """A causal language model. Set these at any time:

    Attributes:
      dtype: of activations.
      remat: one of REMAT. On one CPU core "layer" also takes less time (0.6 at 4 x 256 tokens).
      attention_block: queries that attend at once, to no keys but those that one of them sees
        (`block_attention`), and a decoded token to the slots in use; 0: whole rows and caches; -1:
        32 on CPU in rows of 256 tokens and more, else 0.
      head_chunk: tokens of a data shard whose logits the losses hold at once; 0: 4 MiB of them.
      layer_rows: rows of a data shard that a layer works on at once; 0: all. A layer's parameters
        are gathered once for all of them, so that it takes the memory of few rows and the
        communication of many.
    """

    def __init__(
        self, config: model_config.ModelConfig, draw: Draw, dtype: jnp.dtype = jnp.float32
    ):
        V, D = config.vocab_size, config.hidden_size
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = "layer"
        self.attention_block = -1
        self.head_chunk = 0
        self.layer_rows = 0
        self.embed = nnx.Param(jnp.asarray(draw(2 * D**-0.5, (V, D)), dtype))
        self.layers = Layer(config, draw, dtype)
        self.norm = _norm(config, (D,), dtype)
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

        Without positions they count from 0 along the row, padding included; without segments and
        branches a row is one text; `attention.sees` has the rest.
        """
        if positions_BL is None:
            positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1])[None], tokens_BL.shape)
        angles = attention.rotary(self.config, positions_BL)
        ids = (jnp.zeros_like(tokens_BL) if x is None else x for x in (segments_BL, branches_BL))
        seen = self._seen(attention.Tokens(positions_BL, *ids))
        graphdef, stacked = nnx.split(self.layers)

        def body(x: jax.Array, layer_and_kind: tuple) -> tuple[jax.Array, None]:
            layer, is_local = layer_and_kind

            def of_rows(few: tuple) -> jax.Array:
                x_BLD, angles, seen = few
                return nnx.merge(graphdef, layer)(x_BLD, angles, seen, is_local)

            if groups == 1:
                return of_rows((x, angles, seen)), None
            layer = sharding.gathered_layer(layer, self.dtype)
            return jax.lax.map(self._rematerialised(of_rows), (x, angles, seen)), None

        x_BLD = self._embed(tokens_BL)
        groups = sharding.groups_of_rows(len(tokens_BL), self.layer_rows)
        if groups > 1:
            x_BLD, angles, seen = sharding.grouped((x_BLD, angles, seen), groups)
        x_BLD, _ = jax.lax.scan(self._rematerialised(body), x_BLD, (stacked, self._local_layers()))
        return self.norm(sharding.ungrouped(x_BLD) if groups > 1 else x_BLD)

    def _rematerialised(self, body: Callable) -> Callable:
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r} is unknown; use one of {', '.join(REMAT)}")
        if self.remat == "none":
            return body
        policies = jax.checkpoint_policies
        policy = policies.save_only_these_names(block_attention.OUTPUT)
        if self.remat == "dots":
            policy = policies.save_from_both_policies(
                policy, policies.dots_with_no_batch_dims_saveable
            )
        # In a scan nothing can be merged with the recomputation, so it needs no barrier against it.
        return jax.checkpoint(body, policy=policy, prevent_cse=False)

    def _seen(self, tokens: attention.Tokens) -> attention.Visible | block_attention.Blocks:
        L = tokens.positions_BL.shape[1]
        block = block_attention.queries_at_once(self.attention_block, L, jax.default_backend())
        window = self._window(L)
        if block:
            return block_attention.blocks(tokens, block, window)
        return attention.visible(tokens, window=window)

    def position_flops(self, longest: int) -> Callable[[int], float]:
        """`block_attention.position_flops` of this model, here."""
        return block_attention.position_flops(
            self.config, self.attention_block, longest, jax.default_backend()
        )

    def _window(self, reach: int) -> int | None:
        """The sliding window, where positions that lie up to `reach` apart can leave it."""
        window = self.config.sliding_window
        return window if window is not None and reach > window else None

    def _local_layers(self) -> jax.Array:
        """[N] bool: layers with a sliding window, every other one from the first."""
        return jnp.arange(self.config.num_hidden_layers) % 2 == 0

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits [B, ..., V] of activations [B, ..., D]."""
        hidden = sharding.gathered(hidden)
        contract = (((hidden.ndim - 1,), (1 if self.head is None else 0,)), ((), ()))
        kernel = self.embed[...] if self.head is None else self.head.kernel[...]
        logits = jax.lax.dot_general(
            hidden, kernel.astype(self.dtype), contract, preferred_element_type=jnp.float32
        )
        cap = self.config.final_logit_softcapping
        return sharding.logits(logits if cap is None else cap * jnp.tanh(logits / cap))

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows of at most `length` tokens."""
        heads, channels = self.config.num_key_value_heads, self.config.head_dim
        shape = (batch, heads, length, channels)
        empty = sharding.keys(jnp.zeros(shape, self.dtype))
        layers = (empty,) * self.config.num_hidden_layers
        return Cache(layers, layers)

    def decode(
        self, tokens_BL: jax.Array, start_B: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Writes tokens at positions start_B, start_B + 1, ... : (activations [B, L, D], cache).

        A token sees the slots up to its own position. Padding on the right of a prompt lands in
        slots that no earlier token sees and that the tokens decoded next overwrite.
        """
        L, S = tokens_BL.shape[1], cache.keys[0].shape[2]
        positions_BL = start_B[:, None] + jnp.arange(L)[None]
        seen = attention.visible_slots(positions_BL, S, window=self._window(S))
        angles = attention.rotary(self.config, positions_BL)
        used = None
        if L == 1 and block_attention.reads_used_slots(self.attention_block, jax.default_backend()):
            used = jnp.max(start_B) + 1
        graphdef, stacked = nnx.split(self.layers)

        def body(x_BLD: jax.Array, of_layer: tuple) -> tuple[jax.Array, Cache]:
            layer, is_local, (keys, values) = of_layer
            layer = nnx.merge(graphdef, layer)
            q, k, v = layer.qkv(x_BLD, angles)
            keys, values = _written(keys, k, start_B), _written(values, v, start_B)
            bias = seen.of_layer(is_local)
            attended = attention.attend_cached(q, keys, values, bias, layer.config, used)
            return layer.finish(x_BLD, attended), Cache(keys, values)

        x_BLD, layers = self._embed(tokens_BL), (stacked, self._local_layers())
        of_layers = [Cache(*pair) for pair in zip(*cache, strict=True)]
        if L == 1:  # unrolled, a step of one token writes to the cache in place
            for n, of_layer in enumerate(of_layers):
                layer = jax.tree.map(lambda leaf, n=n: leaf[n], layers)
                x_BLD, of_layers[n] = body(x_BLD, (*layer, of_layer))
        else:
            together = jax.tree.map(lambda *of_each: jnp.stack(of_each), *of_layers)
            x_BLD, together = jax.lax.scan(body, x_BLD, (*layers, together))
            of_layers = [Cache(*(x[n] for x in together)) for n in range(len(of_layers))]
        return self.norm(x_BLD), Cache(*zip(*of_layers, strict=True))

    def _embed(self, tokens_BL: jax.Array) -> jax.Array:
        """Every part of the vocabulary looks up all tokens; what comes out goes to the rows."""
        x_BLD = self.embed[...][sharding.gathered(tokens_BL)].astype(self.dtype)
        if self.config.is_gemma:
            x_BLD = x_BLD * jnp.asarray(self.config.hidden_size**0.5, self.dtype)
        return sharding.rows(x_BLD)


def _norm(config: model_config.ModelConfig, shape: tuple[int, ...], dtype: jnp.dtype) -> Norm:
    """A norm that changes no scale yet."""
    weight = jnp.zeros(shape, dtype) if config.is_gemma else jnp.ones(shape, dtype)
    return Norm(weight, config.rms_norm_eps, 1.0 if config.is_gemma else 0.0)


def _written(cache_BKSC: jax.Array, x_BLKC: jax.Array, start_B: jax.Array) -> jax.Array:
    """The cache with x from slot start_B of every row; in place where XLA may.

    Under `vmap` the partitioner sees that a row is written by its own device; with an index of rows
    it does not, and sends the keys and values of every token to all devices.
    """

    def of_row(cache_KSC: jax.Array, x_LKC: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(cache_KSC, x_LKC.swapaxes(0, 1), (0, start, 0))

    return jax.vmap(of_row)(cache_BKSC, x_BLKC, start_B)


def init(config: model_config.ModelConfig, seed: int, dtype: jnp.dtype = jnp.float32) -> Decoder:
    """Random weights: normal, std inputs^-0.5, over sqrt(2 N) where they write to the residual.

    Embeddings have std 2 D^-0.5.
    """
    rng = np.random.default_rng(seed)  # nothing to compile, and the same on every backend
    return Decoder(config, lambda std, shape: std * rng.standard_normal(shape, np.float32), dtype)
