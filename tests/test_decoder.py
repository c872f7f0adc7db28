import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trace_jax import errors, models
from trace_jax.models import decoder, model_config

forward = jax.jit(lambda module, *inputs: module(*inputs))
TINY = models.ModelConfig(61, 24, 40, 3, 4, 2, 6, 64)
CHECKPOINTS = {
    "grouped queries, tied head": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "untied head, head_dim of its own": dict(head_dim=6, rope_theta=500.0),
    "llama3 RoPE scaling": dict(
        num_key_value_heads=1,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=50.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
}


@pytest.fixture(scope="module", params=["stories260k", *CHECKPOINTS])
def pair(request, tmp_path_factory):
    """(our module, the same checkpoint in transformers)."""
    pytest.importorskip("torch")
    if request.param == "stories260k":
        path = request.getfixturevalue("shared") / "models" / "stories260k"
    else:
        path = tmp_path_factory.mktemp("checkpoint")
        random_checkpoint(path, **CHECKPOINTS[request.param])
    return models.load(path), reference(path)


def random_checkpoint(path, **options):
    """Llama with weights large enough that a wrong one shows in the logits."""
    import torch
    import transformers

    torch.manual_seed(0)
    shape = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=3)
    more = dict(num_attention_heads=4, max_position_embeddings=256, initializer_range=0.3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | more | options))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(path)


def reference(path):
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(path, dtype="float32").eval()


def reference_logits(model, tokens, positions=None, mask=None):
    import torch

    as_tensor = lambda array: None if array is None else torch.tensor(np.asarray(array))  # noqa: E731
    with torch.no_grad():
        out = model(
            as_tensor(tokens), attention_mask=as_tensor(mask), position_ids=as_tensor(positions)
        )
    return out.logits.numpy()


def random_tokens(seed, *shape, vocab=61):
    return np.random.default_rng(seed).integers(2, vocab, shape)


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_logits_equal_transformers(pair):
    module, model = pair
    tokens_BL = random_tokens(0, 2, 130)  # more than two blocks of queries
    expected = reference_logits(model, tokens_BL)
    assert np.abs(expected).max() > 1  # else 1e-4 would prove nothing
    assert_same(forward(module, tokens_BL), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_transformers(pair, side):
    module, model = pair
    tokens_BL, mask_BL = random_tokens(1, 3, 12), np.ones((3, 12), int)
    for row, pad in enumerate((0, 3, 7)):
        mask_BL[row, slice(0, pad) if side == "left" else slice(12 - pad, 12)] = 0
    tokens_BL *= mask_BL
    positions_BL = np.maximum(np.cumsum(mask_BL, axis=1) - 1, 0)
    ours = forward(module, tokens_BL, positions_BL, mask_BL)
    assert np.all(np.isfinite(ours))
    expected = reference_logits(model, tokens_BL, positions_BL, mask_BL)
    assert_same(ours[mask_BL == 1], expected[mask_BL == 1])


def test_packed_rows_equal_separate_rows_of_transformers(pair):
    module, model = pair
    a, b = random_tokens(2, 1, 5), random_tokens(3, 1, 9)
    packed = np.concatenate([a, b, np.zeros((1, 4), int)], axis=1)
    positions = np.array([[*range(5), *range(9), *range(4)]])
    segments = np.array([[1] * 5 + [2] * 9 + [0] * 4])
    ours = forward(module, packed, positions, segments)
    assert np.all(np.isfinite(ours))
    assert_same(ours[:, :5], reference_logits(model, a))
    assert_same(ours[:, 5:14], reference_logits(model, b))


def test_shared_prompt_equals_separate_rows_of_transformers(pair):
    """Two examples in a row: prompt, y0, y1 with the prompt written once; then another example."""
    module, model = pair
    prompt, y0, y1, other = (random_tokens(4 + i, 1, n) for i, n in enumerate((4, 3, 5, 6)))
    packed = np.concatenate([prompt, y0, y1, other], axis=1)
    positions = np.array([[*range(4), *range(4, 7), *range(4, 9), *range(6)]])
    segments = np.array([[1] * 12 + [2] * 6])
    branches = np.array([[0] * 4 + [1] * 3 + [2] * 5 + [0] * 6])
    ours = forward(module, packed, positions, segments, branches)
    row0 = reference_logits(model, np.concatenate([prompt, y0], axis=1))
    row1 = reference_logits(model, np.concatenate([prompt, y1], axis=1))
    assert_same(ours[:, :7], row0)
    assert_same(ours[:, 7:12], row1[:, 4:])
    assert_same(ours[:, 12:], reference_logits(model, other))


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


def test_visible_is_the_rule_written_out():
    segments, branches = PACKED["segments_BL"], PACKED["branches_BL"]
    seen = decoder.visible((1, 10), segments, branches)[0]
    for i in range(10):
        for j in range(10):
            same = segments[0, i] == segments[0, j] and branches[0, j] in (0, branches[0, i])
            assert seen[i, j] == (j <= i and same)


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


def test_blocks_of_queries_equal_one_softmax():
    draw = np.random.default_rng(0).normal
    q, k, v = (draw(size=(2, 150, heads, 6)).astype(np.float32) for heads in (4, 2, 2))
    seen = np.asarray(decoder.visible((2, 150), np.arange(300).reshape(2, 150) // 90, None))
    scores = np.einsum("blhc,bshc->bhls", q, np.repeat(k, 2, axis=2)) / 6**0.5
    weights = np.where(seen[:, None], np.exp(scores), 0.0)
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhls,bshc->blhc", weights, np.repeat(v, 2, axis=2))
    bias = np.where(seen, 0.0, -1e30).astype(np.float32)
    out = jax.jit(decoder.attend_causal)(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), bias)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_scan_equals_layer_by_layer(module):
    tokens = random_tokens(0, 2, 9)
    angles = decoder.rotary(TINY, jnp.broadcast_to(jnp.arange(9)[None], (2, 9)))
    bias = jnp.where(decoder.visible((2, 9), None, None), 0.0, -1e30)
    x = module.embed[...][tokens]
    graphdef, stacked = nnx.split(module.layers)
    for n in range(3):
        layer = nnx.merge(graphdef, jax.tree.map(lambda leaf, n=n: leaf[n], stacked))
        x = layer(x, angles, bias)
    np.testing.assert_allclose(module.hidden(tokens), module.norm(x), atol=1e-5)


def test_logits_are_the_head_of_hidden_with_and_without_a_tie(module):
    tokens = random_tokens(0, 2, 9)
    tied = models.init(dataclasses.replace(TINY, tie_word_embeddings=True), seed=0)
    np.testing.assert_array_equal(tied.head_kernel, tied.embed[...].T)
    for each in (module, tied):
        logits = each.hidden(tokens)[0] @ each.head_kernel
        np.testing.assert_allclose(each(tokens)[0], logits, atol=1e-5)
        np.testing.assert_allclose(each.logits(each.hidden(tokens))[0, 1], logits[1], atol=1e-5)


def test_cached_decoding_equals_the_full_forward_pass(module):
    """A left-padded prompt, then one token at a time."""
    tokens, pads = random_tokens(0, 2, 12), np.array([0, 3])
    valid = np.arange(12)[None] >= pads[:, None]
    positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
    expected = forward(module, tokens, positions, valid.astype(int))
    cache = module.init_cache(2, 12)
    decode = jax.jit(lambda module, *inputs: module.decode(*inputs))
    hidden, cache = decode(module, tokens[:, :7], positions[:, :7], valid[:, :7], cache)
    parts = [hidden]
    for i in range(7, 12):
        now = slice(i, i + 1)
        hidden, cache = decode(module, tokens[:, now], positions[:, now], valid[:, now], cache)
        parts.append(hidden)
    logits = module.logits(jnp.concatenate(parts, axis=1))
    assert np.all(np.isfinite(logits))
    np.testing.assert_allclose(logits[valid], expected[valid], atol=1e-4)


def loss_of(module):
    """(state, its loss on a packed row)."""
    graphdef, state = nnx.split(module)
    inputs = (random_tokens(0, 1, 10), *PACKED.values())
    return state, lambda state: jnp.sum(jnp.sin(nnx.merge(graphdef, state)(*inputs)))


@pytest.fixture(scope="module")
def gradient(module):
    state, loss = loss_of(module)
    return jax.jit(jax.grad(loss))(state)


def test_jvp_equals_the_gradient_dotted_with_the_tangent(module, gradient):
    state, loss = loss_of(module)
    leaves, structure = jax.tree.flatten(state)
    draw = np.random.default_rng(1).normal
    draws = [jnp.asarray(draw(size=leaf.shape), jnp.float32) for leaf in leaves]
    tangent = jax.tree.unflatten(structure, draws)
    _, slope = jax.jit(lambda s, t: jax.jvp(loss, (s,), (t,)))(state, tangent)
    dots = [np.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), draws, strict=True)]
    assert all(np.all(np.isfinite(g)) and np.any(g != 0) for g in jax.tree.leaves(gradient))
    np.testing.assert_allclose(slope, sum(dots), rtol=1e-4)


def test_remat_changes_no_gradient(module, gradient):
    kept = nnx.merge(*nnx.split(module))
    kept.remat = False
    state, loss = loss_of(kept)
    remat = ["remat" in str(jax.make_jaxpr(f)(state)) for f in (loss, loss_of(module)[1])]
    assert remat == [False, True]
    without = jax.jit(jax.grad(loss))(state)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(without), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


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


HF = TINY.to_hf()
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)


def test_config_survives_the_round_trip():
    scaled = dataclasses.replace(TINY, rope_scaling=model_config.Llama3Scaling(8.0, 1.0, 4.0, 32))
    full = dataclasses.replace(scaled, bos_token_id=1, eos_token_ids=(2, 3), rope_theta=5e5)
    for config in (TINY, scaled, full):
        assert models.ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_both_forms_of_rope_say_the_same():
    old = models.ModelConfig.from_hf(HF | dict(rope_theta=5e5, rope_scaling=LLAMA3))
    plain = {key: HF[key] for key in HF if not key.startswith("rope")}
    new = models.ModelConfig.from_hf(plain | dict(rope_parameters=LLAMA3 | dict(rope_theta=5e5)))
    assert old == new
    assert new.rope_theta == 5e5 and new.rope_scaling.factor == 8.0


def test_absent_keys_are_derived():
    short = {key: HF[key] for key in HF if key not in ("head_dim", "num_key_value_heads")}
    config = models.ModelConfig.from_hf(short)
    assert (config.head_dim, config.num_key_value_heads) == (6, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="mistral", architectures=["MistralForCausalLM"]), "MistralForCausalLM"),
        (dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(mlp_bias=True), "mlp_bias"),
        (dict(hidden_act="gelu"), "gelu"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=2.0)), "yarn"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=2.0)), "low_freq_factor"),
        (dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor"),
        (dict(quantization_config=dict(bits=4)), "quantization_config"),
        (dict(head_dim=5), "head_dim"),
        (dict(head_dim=None, hidden_size=25), "head_dim"),
        (dict(num_key_value_heads=3), "num_key_value_heads"),
        (dict(vocab_size=None), "vocab_size"),
        (dict(num_hidden_layers="three"), "num_hidden_layers"),
    ],
)
def test_what_we_cannot_run_is_refused_by_name(change, message):
    with pytest.raises(errors.InputError, match=message):
        models.ModelConfig.from_hf(HF | change)
