import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trace_jax import models
from trace_jax.models import attention

forward = jax.jit(lambda module, *inputs: module(*inputs))
TINY = models.ModelConfig(61, 24, 40, 3, 4, 2, 6, 64)


def random_tokens(seed, *shape, vocab=61):
    return np.random.default_rng(seed).integers(2, vocab, shape)


@pytest.fixture(scope="module")
def module():
    """A random model of our own, with a head that makes the logits as large as in real ones."""
    module = models.init(TINY, seed=0)
    module.head.kernel[...] *= 20
    return module


PACKED = dict(
    positions_BL=np.array([[0, 1, 2, 3, 2, 3, 0, 1, 0, 1]]),
    segments_BL=np.array([[1, 1, 1, 1, 1, 1, 2, 2, 0, 0]]),
    branches_BL=np.array([[0, 0, 1, 1, 2, 2, 0, 0, 0, 0]]),
)


@pytest.mark.parametrize("window", [None, 2])
def test_visible_is_the_rule_written_out(window):
    positions, segments, branches = PACKED.values()
    seen = attention.visible(attention.Tokens(*PACKED.values()), window=window)
    local, everywhere = (np.asarray(seen.of_layer(is_local))[0] == 0 for is_local in (True, False))
    for i in range(10):
        for j in range(10):
            same = segments[0, i] == segments[0, j] and branches[0, j] in (0, branches[0, i])
            near = window is None or positions[0, i] - positions[0, j] < window
            assert everywhere[i, j] == (j <= i and same)
            assert local[i, j] == (j <= i and same and near)


def test_no_masks_mean_one_segment_and_one_branch(module):
    tokens = random_tokens(0, 2, 9)
    ones, zeros = np.ones_like(tokens), np.zeros_like(tokens)
    positions = np.broadcast_to(np.arange(9), (2, 9))
    given = forward(module, tokens, positions, ones, zeros)
    np.testing.assert_array_equal(given, forward(module, tokens))


def test_padding_and_other_branches_do_not_matter(module):
    tokens = random_tokens(0, 1, 10)
    changed = tokens.copy()
    changed[:, [4, 5, 8, 9]] = 0  # y1 of the first example, and the padding
    before, after = (forward(module, t, *PACKED.values()) for t in (tokens, changed))
    kept = [0, 1, 2, 3, 6, 7]
    np.testing.assert_array_equal(before[:, kept], after[:, kept])
    assert np.abs(before - after)[:, [4, 5]].max() > 0.01


@pytest.mark.parametrize("cap", [None, 2.0])
def test_blocks_of_queries_equal_one_softmax(cap):
    config = dataclasses.replace(TINY, attn_logit_softcapping=cap, query_pre_attn_scalar=9)
    draw = np.random.default_rng(0).normal
    q, k, v = (draw(size=(2, 150, heads, 6)).astype(np.float32) for heads in (4, 2, 2))
    segments = np.arange(300).reshape(2, 150) // 90
    positions = np.broadcast_to(np.arange(150), (2, 150))
    tokens = attention.Tokens(positions, segments, np.zeros_like(segments))
    bias = np.asarray(attention.visible(tokens).bias_BLS)
    scores = np.einsum("blhc,bshc->bhls", q, np.repeat(k, 2, axis=2)) / 3
    scores = scores if cap is None else cap * np.tanh(scores / cap)
    weights = np.where(bias[:, None] == 0, np.exp(scores), 0.0)
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhls,bshc->blhc", weights, np.repeat(v, 2, axis=2))
    out = jax.jit(attention.attend_causal, static_argnums=4)(
        q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1), bias, config
    )
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_scan_equals_layer_by_layer(module):
    tokens = random_tokens(0, 2, 9)
    positions = jnp.broadcast_to(jnp.arange(9)[None], (2, 9))
    angles = attention.rotary(TINY, positions)
    seen = attention.visible(attention.Tokens(positions, *[jnp.zeros_like(positions)] * 2))
    x = module.embed[...][tokens]
    graphdef, stacked = nnx.split(module.layers)
    for n in range(3):
        layer = nnx.merge(graphdef, jax.tree.map(lambda leaf, n=n: leaf[n], stacked))
        x = layer(x, angles, seen, jnp.array(False))
    np.testing.assert_allclose(module.hidden(tokens), module.norm(x), atol=1e-5)


def test_logits_are_the_head_of_hidden_with_and_without_a_tie(module):
    tokens = random_tokens(0, 2, 9)
    tied = models.init(dataclasses.replace(TINY, tie_word_embeddings=True), seed=0)
    for each, kernel in ((module, module.head.kernel[...]), (tied, tied.embed[...].T)):
        logits = each.hidden(tokens)[0] @ kernel
        np.testing.assert_allclose(each(tokens)[0], logits, atol=1e-5)


@pytest.mark.parametrize("attention_block", [-1, 0])
@pytest.mark.parametrize("window", [None, 4])
def test_cached_decoding_equals_the_full_forward_pass(window, attention_block):
    """Prompts of 7 and 4 tokens, padded on the right, then one token at a time; in used slots."""
    config = dataclasses.replace(TINY, sliding_window=window)
    module = models.init(config, seed=0)
    module.attention_block = attention_block
    module = nnx.merge(*nnx.split(module))
    tokens = random_tokens(0, 2, 12)
    expected = forward(module, tokens)
    decode = jax.jit(lambda module, *inputs: module.decode(*inputs))
    cache = jax.tree.map(lambda x: x + 7.0, module.init_cache(2, 12))  # what others left there
    prompt = np.array([7, 4])
    first = np.where(np.arange(7) < prompt[:, None], tokens[:, :7], 0)
    hidden, cache = decode(module, first, np.zeros(2, int), cache)
    logits = module.logits(hidden)
    for row, n in enumerate(prompt):
        np.testing.assert_allclose(logits[row, :n], expected[row, :n], atol=1e-4)
    for step in range(5):
        at = prompt + step
        hidden, cache = decode(module, tokens[np.arange(2), at][:, None], at, cache)
        logits = module.logits(hidden)
        assert np.all(np.isfinite(logits))
        for row in range(2):
            np.testing.assert_allclose(logits[row, 0], expected[row, at[row]], atol=1e-4)


FAMILIES = {
    "llama": TINY,
    "qwen2": dataclasses.replace(TINY, family="qwen2"),
    "gemma2": dataclasses.replace(
        TINY, family="gemma2", sliding_window=2, query_pre_attn_scalar=9,
        attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
    ),
}  # fmt: skip


def loss_of(module):
    """(state, its loss on a packed row)."""
    graphdef, state = nnx.split(module)
    inputs = (random_tokens(0, 1, 10), *PACKED.values())
    return state, lambda state: jnp.sum(jnp.sin(nnx.merge(graphdef, state)(*inputs)))


@pytest.fixture(scope="module", params=FAMILIES)
def of_family(request):
    module = models.init(FAMILIES[request.param], seed=0)
    module.head.kernel[...] *= 20
    return module


@pytest.fixture(scope="module")
def gradient(of_family):
    state, loss = loss_of(of_family)
    return jax.jit(jax.grad(loss))(state)


def test_jvp_equals_the_gradient_dotted_with_the_tangent(of_family, gradient):
    state, loss = loss_of(of_family)
    leaves, structure = jax.tree.flatten(state)
    draw = np.random.default_rng(1).normal
    draws = [jnp.asarray(draw(size=leaf.shape), jnp.float32) for leaf in leaves]
    tangent = jax.tree.unflatten(structure, draws)
    _, slope = jax.jit(lambda s, t: jax.jvp(loss, (s,), (t,)))(state, tangent)
    dots = [np.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), draws, strict=True)]
    assert all(np.all(np.isfinite(g)) and np.any(g != 0) for g in jax.tree.leaves(gradient))
    np.testing.assert_allclose(slope, sum(dots), rtol=1e-4)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_remat_changes_no_gradient(of_family, gradient, remat):
    kept = nnx.merge(*nnx.split(of_family))
    kept.remat = remat
    state, loss = loss_of(kept)
    jaxprs = [str(jax.make_jaxpr(f)(state)) for f in (loss, loss_of(of_family)[1])]
    assert ["remat" in text for text in jaxprs] == [remat == "dots", True]
    assert jaxprs[0] != jaxprs[1]
    other = jax.jit(jax.grad(loss))(state)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_an_unknown_remat_is_refused(module):
    other = nnx.merge(*nnx.split(module))
    other.remat = "some"
    with pytest.raises(ValueError, match="use one of layer, dots, none"):
        other(random_tokens(0, 1, 4))


def test_per_example_gradients_by_vmap(module):
    graphdef, state = nnx.split(module)
    tokens = random_tokens(0, 3, 8)

    def loss(state, tokens_L):
        return jnp.sum(nnx.merge(graphdef, state).hidden(tokens_L[None]) ** 2)

    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(state, tokens)
    alone = jax.jit(jax.grad(loss))(state, tokens[1])
    for a, b in zip(jax.tree.leaves(each), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-3, atol=1e-4)


def test_activations_have_their_own_dtype(module):
    half = nnx.merge(*nnx.split(module))
    half.dtype = jnp.bfloat16
    tokens = random_tokens(0, 2, 9)
    hidden, logits = half.hidden(tokens), half(tokens)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    assert half.layers.q.kernel[...].dtype == jnp.float32
    assert 1e-6 < np.abs(logits - module(tokens)).max() < 0.05 * np.abs(logits).max()


def test_init_is_a_function_of_the_seed_and_scales_the_outputs():
    a, b, c = (models.init(TINY, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(a.layers.q.kernel[...], b.layers.q.kernel[...])
    assert np.any(a.layers.q.kernel[...] != c.layers.q.kernel[...])
    assert np.std(a.layers.up.kernel[...]) == pytest.approx(24**-0.5, rel=0.1)
    assert np.std(a.layers.down.kernel[...]) == pytest.approx(240**-0.5, rel=0.1)
    assert np.std(a.embed[...]) == pytest.approx(2 * 24**-0.5, rel=0.1)
    assert models.init(TINY, seed=0, dtype=jnp.bfloat16).embed[...].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "remat", ["layer", *(pytest.param(r, marks=pytest.mark.soak) for r in ("dots", "none"))]
)
def test_rows_of_a_layer_in_groups_change_nothing(of_family, remat):
    tokens = random_tokens(0, 4, 10)
    few = nnx.merge(*nnx.split(of_family))
    few.remat, few.layer_rows = remat, 3  # which does not divide 4: two groups of 2

    def loss_of(module):
        graphdef, state = nnx.split(module)
        of_row = jnp.arange(1.0, 5.0)[:, None, None]  # so that rows may not change places
        return state, lambda state: jnp.sum(of_row * jnp.sin(nnx.merge(graphdef, state)(tokens)))

    found = []
    for module, scans in ((of_family, 1), (few, 2)):  # over layers, and over groups of rows
        state, loss = loss_of(module)
        assert str(jax.make_jaxpr(loss)(state)).count("scan[") == scans
        found.append(jax.jit(jax.value_and_grad(loss))(state))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        rounded = 2e-7 * np.abs(b).max()  # float32 beside the largest of the sums
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=max(1e-5, rounded))
