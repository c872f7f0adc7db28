"""Attention in blocks of queries equals that of whole rows and reads no more than it sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from trace_jax import batches, logprobs, models, packing
from trace_jax.models import attention, block_attention

LLAMA = models.ModelConfig(48, 16, 32, 2, 4, 2, 8, 128)
GEMMA = dataclasses.replace(
    LLAMA, family="gemma2", tie_word_embeddings=True, sliding_window=5,
    attn_logit_softcapping=5.0, final_logit_softcapping=3.0, query_pre_attn_scalar=12.0,
)  # fmt: skip


def packed(n: int = 12, row_length: int = 45) -> tuple[batches.Rows, int]:
    """Rows with several examples of two responses each, and the slots of a row."""
    rng = np.random.default_rng(0)
    encoded = [tiny.text(rng, *rng.integers(2, 12, 3)) for _ in range(n)]
    plan = packing.pack_rows([e.row_length for e in encoded], row_length, 8)
    return batches.write_rows(encoded, plan, (len(plan), row_length, 8)), 16


def tokens_of(rows: batches.Rows) -> attention.Tokens:
    return attention.Tokens(*map(jnp.asarray, (rows.positions, rows.segments, rows.branches)))


@pytest.mark.parametrize(
    ("config", "block"), [(LLAMA, 8), (LLAMA, 44), (GEMMA, 8)], ids=["llama", "ragged", "gemma"]
)
def test_blocks_give_the_values_gradients_and_derivatives_of_whole_rows(config, block):
    rows, n_responses = packed()
    module = models.init(config, seed=0)
    direction = nnx.state(models.init(config, seed=1), nnx.Param)

    def along(params, graphdef):
        def logp(params):
            return logprobs.response_logprobs(nnx.merge(graphdef, params), rows, n_responses)

        gradient = jax.grad(lambda p: jnp.sum(jnp.sin(logp(p))))(params)
        return *jax.jvp(logp, (params,), (direction,)), gradient

    found = []
    for queries in (0, block):
        module.attention_block = queries
        graphdef, params = nnx.split(module)
        found.append(jax.jit(along, static_argnums=1)(params, graphdef))
    for whole, blocks in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(blocks, whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("window", [None, 5])
def test_reach_is_the_farthest_key_that_a_block_sees(window):
    rows, _ = packed()
    tokens, L, Q = tokens_of(rows), rows.tokens.shape[1], 8
    seen = attention.visible(tokens, window=window)
    blocks = block_attention.blocks(tokens, Q, window)
    for is_local, reach in ((False, blocks.reach_BN), (True, blocks.near_BN)):
        sees = np.asarray(seen.of_layer(is_local)) == 0
        for b in range(len(sees)):
            for n in range(L // Q):
                first = sees[b, n * Q : (n + 1) * Q].any(axis=0).argmax() // Q
                assert reach[b, n] == n - first + 1
    assert np.asarray(blocks.reach_BN).max() > 1
    nearer = np.asarray(blocks.near_BN) < np.asarray(blocks.reach_BN)
    assert nearer.any() == (window is not None)


def test_keys_that_no_query_sees_are_not_read():
    rng = np.random.default_rng(0)
    L, Q, H, K, C = 64, 8, 4, 2, 6
    config = dataclasses.replace(LLAMA, query_pre_attn_scalar=9)
    segments = np.repeat([1, 2], L // 2)[None]
    tokens = attention.Tokens(np.arange(L)[None] % 32, segments, np.zeros_like(segments))
    q, k, v = (
        rng.normal(size=(1, *s)).astype(np.float32) for s in ((L, H, C), (K, C, L), (K, C, L))
    )
    blocks = block_attention.blocks(tokens, Q, None)
    whole = attention.visible(tokens).attend(q, k, v, config, jnp.array(False))
    k[..., : 3 * Q], v[..., : 3 * Q] = np.nan, np.nan  # the first example but for its last block
    out = blocks.attend(q, k, v, config, jnp.array(False))
    np.testing.assert_allclose(out[:, L // 2 :], whole[:, L // 2 :], atol=1e-5)


def test_scores_of_a_row_are_never_held():
    rows, n_responses = packed(n=24, row_length=512)
    found = {}
    for queries in (0, 32):
        module = models.init(LLAMA, seed=0)
        module.attention_block = queries
        graphdef, params = nnx.split(module)

        def loss(params, graphdef=graphdef):
            return jnp.sum(
                logprobs.response_logprobs(nnx.merge(graphdef, params), rows, n_responses)
            )

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        found[queries] = compiled.memory_analysis().temp_size_in_bytes
    assert found[32] < found[0] / 2


def test_long_rows_are_cut_on_cpu_and_short_ones_are_not(monkeypatch):
    module = models.init(LLAMA, seed=0)

    def kind(L: int) -> type:
        ids = jnp.zeros((1, L), jnp.int32)
        return type(module._seen(attention.Tokens(ids, ids, ids)))

    assert kind(255) is attention.Visible
    assert kind(256) is block_attention.Blocks
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert kind(256) is attention.Visible
    module.attention_block = 64
    assert kind(64) is attention.Visible
    assert kind(65) is block_attention.Blocks
