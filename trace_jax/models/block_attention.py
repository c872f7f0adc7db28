"""Causal attention of packed rows in blocks of queries, with only the keys that a block can see.

A row holds several examples, and of each prompt two responses, so that most of a long row's scores
are masked. Every device goes through the blocks of its rows and takes of the keys before a block's
end as many as one of its queries sees (rounded up to a power of two of blocks, as shapes are
static; `lax.switch` picks the program). The backward pass computes a block again from what `attend`
was given, so no scores are stored.

Axes as in attention.py; N blocks of a row, Q queries of a block, W keys that a block takes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from trace_jax import sharding
from trace_jax.models import attention, model_config

OUTPUT = "attended"  # name of the output, for the policy of `jax.checkpoint` around a layer


def queries_at_once(setting: int, length: int, platform: str) -> int:
    """Queries of a block in rows of so many tokens, by `Decoder.attention_block`; 0: whole rows."""
    if setting < 0:
        setting = 32 if platform == "cpu" and length >= 256 else 0
    return setting if setting < length else 0


def reads_used_slots(setting: int, platform: str) -> bool:
    """Whether a token that is decoded reads the slots in use alone, by `Decoder.attention_block`.

    Not on accelerators unless asked for: a choice a layer was not timed there.
    """
    return setting > 0 or (setting < 0 and platform == "cpu")


def position_flops(
    config: model_config.ModelConfig, setting: int, longest: int, platform: str
) -> Callable[[int], float]:
    """FLOPs of a position in rows of so many, in which no example is longer than `longest`."""

    def flops(length: int) -> float:
        block = queries_at_once(setting, length, platform)
        return config.forward_flops(min(length, longest + block) if block else length)

    return flops


class Blocks(NamedTuple):
    """Who may attend to whom, as `attention.Visible`, and how far back each block has to look."""

    tokens: attention.Tokens  # [B, N * Q], with padding of segment -1 at the end
    reach_BN: jax.Array  # blocks of keys, with the one of the queries
    near_BN: jax.Array  # the same in layers with a sliding window

    def attend(
        self,
        q_BLHC: jax.Array,
        k_BKCL: jax.Array,
        v_BKCL: jax.Array,
        config: model_config.ModelConfig,
        is_local: jax.Array,
    ) -> jax.Array:
        """What the tokens attend to, [B, L, H, C]."""
        L = q_BLHC.shape[1]
        more = self.tokens.positions_BL.shape[1] - L
        q_BLHC = jnp.pad(q_BLHC, ((0, 0), (0, more), (0, 0), (0, 0)))
        k_BKCL, v_BKCL = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more))) for x in (k_BKCL, v_BKCL))

        def of_rows(q, k, v, seen: tuple, is_local):
            def of_row(row: tuple) -> jax.Array:
                return _attend_row(*row, is_local, config)

            return jax.lax.map(jax.checkpoint(of_row, prevent_cse=False), (q, k, v, *seen))

        reach_BN = jnp.where(is_local, self.near_BN, self.reach_BN)
        out = sharding.on_own_heads(
            of_rows, q_BLHC, k_BKCL, v_BKCL, (self.tokens, reach_BN), is_local
        )
        return checkpoint_name(out[:, :L], OUTPUT)


def blocks(tokens: attention.Tokens, queries: int, window: int | None) -> Blocks:
    """Blocks of so many queries; window: of layers with a sliding window."""
    B, L = tokens.positions_BL.shape
    n_blocks = -(-L // queries)
    padded = ((0, 0), (0, n_blocks * queries - L))
    tokens = attention.Tokens(
        jnp.pad(tokens.positions_BL, padded),
        jnp.pad(tokens.segments_BL, padded, constant_values=-1),
        jnp.pad(tokens.branches_BL, padded),
    )
    index = jnp.arange(n_blocks * queries)

    def reach(window: int | None) -> jax.Array:
        see_BLS = attention.sees(tokens, index, tokens, index, window=window)
        first_BL = jnp.min(jnp.where(see_BLS, index, len(index)), axis=-1)
        first_BN = jnp.min(first_BL.reshape(B, n_blocks, queries), axis=-1) // queries
        return jnp.arange(n_blocks)[None] - first_BN + 1

    reach_BN = reach(None)
    return Blocks(tokens, reach_BN, reach_BN if window is None else reach(window))


def _attend_row(
    q_LHC: jax.Array,
    k_KCL: jax.Array,
    v_KCL: jax.Array,
    tokens: attention.Tokens,  # [L]
    reach_N: jax.Array,
    is_local: jax.Array,
    config: model_config.ModelConfig,
) -> jax.Array:
    L, H, C = q_LHC.shape
    N = len(reach_N)
    Q = L // N
    widths = [*(2**i for i in range(N.bit_length()) if 2**i < N), N]

    def of_width(width: int):
        W = width * Q

        def attend(q_QHC: jax.Array, of_q: attention.Tokens, n: jax.Array) -> jax.Array:
            start = jnp.maximum((n + 1) * Q - W, 0)

            def cut(x: jax.Array) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(x, start, W, -1)

            of_k = attention.Tokens(*(cut(x)[None] for x in tokens))
            of_q = attention.Tokens(*(x[None] for x in of_q))
            see_1QW = attention.sees(
                of_q, n * Q + jnp.arange(Q), of_k, start + jnp.arange(W),
                window=config.sliding_window, is_local=is_local,
            )  # fmt: skip
            bias_QW = jnp.where(see_1QW[0], 0.0, attention.MASKED)
            return attention.attend_row(q_QHC, cut(k_KCL), cut(v_KCL), bias_QW, config)

        # Or the choice below would keep what every branch needs, zeros for those not taken.
        return jax.checkpoint(attend, prevent_cse=False)

    def body(carry: None, block: tuple) -> tuple[None, jax.Array]:
        q_QHC, of_q, n, reach = block
        width = jnp.searchsorted(jnp.asarray(widths), reach)
        return carry, jax.lax.switch(width, [of_width(w) for w in widths], q_QHC, of_q, n)

    of_block = jax.tree.map(lambda x: x.reshape(N, Q, *x.shape[1:]), (q_LHC, tokens))
    body = jax.checkpoint(body, prevent_cse=False)
    _, out_NQHC = jax.lax.scan(body, None, (*of_block, jnp.arange(N), reach_N))
    return out_NQHC.reshape(L, H, C)
