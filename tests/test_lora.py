import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trace_jax import errors, models
from trace_jax.models import lora

CONFIG = models.ModelConfig(61, 24, 40, 2, 4, 2, 6, 64)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9))
forward = jax.jit(lambda module: module(TOKENS))


@pytest.fixture(scope="module")
def base():
    return models.init(CONFIG, seed=0)


def trained(base, targets="all"):
    """Adapters with a B that is not zero, as after training."""
    module = lora.add(base, rank=3, alpha=6.0, targets=targets, seed=1)
    for index, name in enumerate(lora.TARGETS):
        linear = getattr(module.layers, name)
        if linear.lora_b is not None:
            draw = np.random.default_rng(index).normal(size=linear.lora_b.shape)
            linear.lora_b[...] = jnp.asarray(draw, jnp.float32)
    return module


def test_fresh_adapters_change_nothing(base):
    fresh = lora.add(base, rank=3, alpha=6.0, targets="all", seed=1)
    np.testing.assert_array_equal(forward(fresh), forward(base))


def test_adapters_are_the_equation(base):
    linear = trained(base).layers.k
    one = nnx.merge(*jax.tree.map(lambda leaf: leaf[1], nnx.split(linear)))
    x = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32)
    w, a, b = (np.asarray(p[1]) for p in (linear.kernel, linear.lora_a, linear.lora_b))
    np.testing.assert_allclose(one(x), x @ w + 2.0 * (x @ a @ b), atol=1e-5)


def test_the_draw_is_that_of_peft_and_does_not_depend_on_other_targets(base):
    both = lora.add(base, rank=3, alpha=6.0, targets=("q", "down"), seed=1)
    alone = lora.add(base, rank=3, alpha=6.0, targets=("down",), seed=1)
    a = both.layers.down.lora_a[...]
    np.testing.assert_array_equal(a, alone.layers.down.lora_a[...])
    assert a.dtype == jnp.float32 and a.shape == (2, 40, 3)
    assert 0.9 * 40**-0.5 < np.abs(a).max() <= 40**-0.5
    assert alone.layers.q.lora_a is None and np.all(both.layers.q.lora_b[...] == 0)


def test_merge_equals_adapters_on(base):
    module = trained(base)
    merged = lora.merge(module)
    assert np.abs(forward(module) - forward(base)).max() > 0.01
    np.testing.assert_allclose(forward(merged), forward(module), rtol=0, atol=1e-5)
    assert not jax.tree.leaves(nnx.state(merged, nnx.LoRAParam))
    assert nnx.split(merged)[0] == nnx.split(base)[0]


def test_disabled_is_the_base_and_shares_its_kernels(base):
    graphdef, trainable, frozen = nnx.split(trained(base), nnx.LoRAParam, ...)
    reference = nnx.merge(graphdef, lora.disabled(trainable), frozen)
    np.testing.assert_array_equal(forward(reference), forward(base))
    assert reference.layers.q.kernel[...] is base.layers.q.kernel[...]


def test_no_function_changes_its_argument(base):
    before = jax.tree.map(np.asarray, nnx.state(base))
    module = trained(base, targets=("v",))
    b = np.asarray(module.layers.v.lora_b[...])
    lora.merge(module)
    np.testing.assert_array_equal(module.layers.v.lora_b[...], b)
    after = nnx.state(base)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(x, y)


def test_trainable_is_a_filter_on_variable_types(base):
    module = trained(base, targets=("q", "up"))
    graphdef, trainable, frozen = nnx.split(module, nnx.LoRAParam, ...)
    assert len(jax.tree.leaves(trainable)) == 4 and len(jax.tree.leaves(frozen)) == 12
    _, everything, rest = nnx.split(base, nnx.Param, ...)
    assert len(jax.tree.leaves(everything)) == 12 and not jax.tree.leaves(rest)

    def loss(trainable, frozen):
        both = nnx.merge(graphdef, trainable, frozen)
        reference = nnx.merge(graphdef, lora.disabled(trainable), frozen)
        return jnp.sum((both.hidden(TOKENS) - reference.hidden(TOKENS)) ** 2)

    value, gradient = jax.jit(jax.value_and_grad(loss))(trainable, frozen)
    assert value > 0.01
    for leaf in jax.tree.leaves(gradient):
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0)
    slope = jax.jit(lambda t, f: jax.jvp(lambda t: loss(t, f), (t,), (gradient,))[1])
    square = sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient))
    np.testing.assert_allclose(slope(trainable, frozen), square, rtol=1e-4)


def test_cached_decoding_uses_the_adapters(base):
    module = trained(base)
    hidden, _ = module.decode(TOKENS, np.zeros(2, int), module.init_cache(2, 9))
    np.testing.assert_allclose(module.logits(hidden), forward(module), atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(targets=("q", "query")), "some of q, k, v, o, gate, up, down"),
        (dict(targets="q"), "must be"),
        (dict(targets=()), "must be"),
        (dict(rank=0), "rank=0"),
    ],
)
def test_bad_options_are_refused(base, options, message):
    with pytest.raises(errors.InputError, match=message):
        lora.add(base, **dict(rank=2, alpha=4.0, targets="all", seed=0) | options)


def test_adapters_are_not_stacked_on_adapters(base):
    with pytest.raises(ValueError, match="lora.merge"):
        lora.add(trained(base), rank=2, alpha=4.0, targets="all", seed=0)


def test_merging_takes_the_memory_of_a_few_layers_not_of_all():
    layers, rows, columns, rank = 32, 64, 256, 4
    shapes = [
        jax.ShapeDtypeStruct((layers, rows, columns), jnp.bfloat16),
        jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16),
        jax.ShapeDtypeStruct((rows, rank), jnp.float32),
        jax.ShapeDtypeStruct((rank, columns), jnp.float32),
    ]
    compiled = jax.jit(lora._fold, donate_argnums=0).lower(*shapes, 2.0, 0).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * rows * columns * 4
