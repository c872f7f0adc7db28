"""The same run on every mesh of 8 devices: metrics, scores, exported weights; and the table."""

import contextlib
import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests import tiny
from trace_jax import batches, encoding, errors, fit, impact, logprobs, models, sharding, train

MESHES = {"1x1x1": (1, 1, 1), "8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2)}
# Of one axis alone: left to `make soak`, since every mesh is compiled for anew.
OTHERS = [pytest.param(name, marks=pytest.mark.soak) for name in ("8x1x1", "1x8x1")] + ["2x2x2"]
CONFIG = models.ModelConfig(48, 16, 32, 2, 4, 2, 8, 128)
GEMMA = models.ModelConfig(
    48, 16, 32, 2, 4, 2, 8, 128, family="gemma2", tie_word_embeddings=True, sliding_window=8,
    attn_logit_softcapping=5.0, final_logit_softcapping=3.0, query_pre_attn_scalar=12.0,
)  # fmt: skip


@contextlib.contextmanager
def on(name: str):
    """The mesh of that name in context."""
    with jax.set_mesh(sharding.make_mesh(*MESHES[name])):
        yield


def module(config: models.ModelConfig = CONFIG, head_chunk: int = 8, attention_block: int = 0):
    """On the mesh in context; so few tokens a chunk that every shard has several, some skipped."""
    made = models.init(config, 0)
    made.head_chunk, made.attention_block = head_chunk, attention_block
    if made.head is not None:
        made.head.kernel[...] = made.head.kernel[...] * 10
    return sharding.place_module(made)


def test_adapters_share_the_kernels_of_the_model_they_are_put_on():
    with on("2x2x2"):
        base = module()
        adapted = fit.adapted(base, tiny.settings(adapters="lora"))
    for name in ("q", "down"):
        ours, theirs = (getattr(m.layers, name).kernel[...] for m in (adapted, base))
        parts = zip(ours.addressable_shards, theirs.addressable_shards, strict=True)
        assert all(
            a.data.unsafe_buffer_pointer() == b.data.unsafe_buffer_pointer() for a, b in parts
        )


def texts(n: int = 16) -> list[encoding.Encoded]:
    rng = np.random.default_rng(0)
    return [tiny.text(rng, *rng.integers(2, 9, 3)) for _ in range(n)]


@pytest.fixture(scope="module", params=["lora", "full"])
def runs(request, tmp_path_factory):
    """Of a mesh: metrics of six steps, and the exported tensors."""
    adapters = "lora" if request.param == "lora" else "none"

    @functools.cache
    def found(name: str):
        directory = tmp_path_factory.mktemp(f"{request.param}-{name}")
        with on(name):
            fitted = tiny.fit(
                module(CONFIG, *((0, 8) if adapters == "lora" else (8, 0))), directory,
                adapters=adapters,
                learning_rate=1e-3, micro_rows=1,
                examples_per_step=8, retain_per_step=4,
            )  # fmt: skip
            models.save(fitted.module, directory / "model")
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").open()]
        return rows, tiny.leaves(nnx.state(models.load(directory / "model")))

    return found


@pytest.mark.parametrize("name", OTHERS)
def test_five_steps_are_the_same_on_every_mesh(runs, name):
    one, other = runs("1x1x1")[0][:5], runs(name)[0][:5]
    assert len(other) == 5
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            # A logratio is the difference of log-probs of about -30, which float32 rounds at 2e-6.
            rounding = 4e-6 if "logratio" in key else 1e-7
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=rounding), (key, a["step"])


@pytest.mark.parametrize("name", OTHERS)
def test_the_export_is_the_same_on_every_mesh(runs, name):
    for a, b in zip(runs("1x1x1")[1], runs(name)[1], strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


@functools.cache
def scores_on(name: str, path: str) -> np.ndarray:
    with on(name):
        return scores(path)


def scores(path: str) -> np.ndarray:
    graphdef, params, frozen = tiny.split(module())
    examples = [tiny.example(pref=1.0) for _ in texts()]
    options, hyper = tiny.options(n_conflict=16), tiny.hyper()
    ref = logprobs.of_texts(module(), texts(), row_length=32, micro_rows=1)
    step = batches.Step(tiny.batch(texts(), examples, ref, micro_rows=8), None)
    step = sharding.place_rows(step)
    g = impact.objective_gradient(params, frozen, step, hyper, graphdef=graphdef, options=options)
    if path == "jvp":
        tangents = jax.tree.map(lambda x: x[None], g)
        out = impact.response_derivatives(
            params, frozen, tangents, step.conflict.rows, graphdef=graphdef,
            n_responses=step.conflict.ref_logp.shape[-1],
        )  # fmt: skip
    else:
        out = impact.loss_derivatives(
            params, frozen, g, step.conflict, hyper, graphdef=graphdef, options=options
        )
    return np.asarray(out).ravel()


@pytest.mark.parametrize("path", ["jvp", "jvp_losses"])
@pytest.mark.parametrize("name", OTHERS)
def test_scores_are_the_same_on_every_mesh(name, path):
    one = scores_on("1x1x1", path)
    rms = np.sqrt(np.mean(one**2))
    assert rms > 0
    assert np.abs(scores_on(name, path) - one).max() <= 1e-4 * rms


@pytest.mark.parametrize("config", [CONFIG, GEMMA], ids=["llama", "gemma2"])
def test_the_state_is_cut_and_logits_are_the_same(config):
    tokens = np.random.default_rng(0).integers(0, 48, (8, 20))
    whole = np.asarray(jax.jit(lambda m, t: m(t))(models.init(config, 0), tokens))
    with on("2x2x2"):
        made = sharding.place_module(models.init(config, 0))
        assert made.layers.gate.kernel[...].sharding.spec == P(None, None, ("tensor", "fsdp"))
        assert made.layers.down.kernel[...].sharding.spec == P(None, "tensor", "fsdp")
        assert made.embed[...].sharding.spec == P(("fsdp", "tensor"), None)
        out = jax.jit(lambda m, t: m(t))(made, sharding.place_rows(tokens, leading=0))
    np.testing.assert_allclose(np.asarray(out), whole, atol=2e-5)


@pytest.mark.parametrize("name", OTHERS[1:])
def test_rows_of_a_layer_in_groups_are_the_same_and_its_parameters_are_gathered_once(name):
    tokens = np.random.default_rng(1).integers(1, 48, (16, 9))
    found = []
    for layer_rows, attention_block in ((0, 0), (0, 4), (1, 4), (1, 0)):
        with on(name):
            made = module(GEMMA, attention_block=attention_block)
            made.layer_rows = layer_rows
            graphdef, params = nnx.split(made)

            def loss(params, tokens, graphdef=graphdef):
                of_row = np.arange(16.0)[:, None, None]  # so that rows may not change places
                return (of_row * nnx.merge(graphdef, params)(tokens)).std()

            step = jax.jit(jax.value_and_grad(loss))
            placed = sharding.place_rows(tokens, leading=0)
            text = step.lower(params, placed).compile().as_text()
            found.append(step(params, placed))
    for of_each in zip(*map(jax.tree.leaves, found), strict=True):
        for b in of_each[1:]:
            np.testing.assert_allclose(of_each[0], b, rtol=1e-4, atol=1e-6)
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    assert any("while/body" in line for line in gathers)
    assert not [line for line in gathers if line.count("while/body") > 1]


def test_optimizer_moments_lie_like_their_parameters():
    with on("1x8x1"):
        _, params, _ = tiny.split(module())
        state = train.init_state(params, tiny.options())
        adam = state.opt_state[1]
        for tree in (state.params, adam.mu, adam.nu):
            kernel = tree["layers"]["gate"]["kernel"][...]
            assert kernel.addressable_shards[0].data.shape == (2, 16, 4)  # of [2, 16, 32]


@pytest.mark.parametrize(
    "path, shape, expected",
    [
        ("layers.q.kernel", (2, 16, 32), P(None, None, ("tensor", "fsdp"))),
        ("layers.o.kernel", (2, 32, 16), P(None, "tensor", "fsdp")),
        ("layers.q.bias", (2, 32), P(None, ("tensor", "fsdp"))),
        ("layers.k.kernel", (2, 16, 6), P(None, "fsdp", "tensor")),
        ("layers.q.lora_a", (2, 16, 3), P(None, "fsdp", None)),
        ("layers.down.lora_a", (2, 32, 3), P(None, ("tensor", "fsdp"), None)),
        ("opt_state.1.mu.layers.up.kernel", (2, 16, 32), P(None, None, ("tensor", "fsdp"))),
        ("embed", (48, 16), P(("fsdp", "tensor"), None)),
        ("embed", (50, 16), P(("fsdp",), None)),
        ("embed", (51, 16), P(None, "fsdp")),
        ("head.kernel", (16, 48), P(None, ("fsdp", "tensor"))),
        ("norm.weight", (16,), P("fsdp")),
        ("norm.weight", (15,), P(None)),
        ("step", (), P()),
    ],
)
def test_table(path, shape, expected):
    mesh = sharding.make_mesh(2, 2, 2)
    assert sharding.spec(path, shape, mesh) == expected


def test_a_mesh_smaller_than_the_devices_takes_the_first():
    assert sharding.make_mesh(1, 2, 2).size == 4
    assert sharding.make_mesh(1, -1, 2, fsdp_limit=64).shape["fsdp"] == 4
    assert sharding.make_mesh(1, -1, 2).shape["data"] == 4  # on CPU


def test_fsdp_takes_what_is_left_up_to_its_limit():
    assert sharding.make_mesh(1, -1, 1, fsdp_limit=4).devices.shape == (2, 4, 1)
    assert sharding.make_mesh(1, -1, 2, fsdp_limit=4).devices.shape == (1, 4, 2)
    assert sharding.make_mesh(2, -1, 1, fsdp_limit=3).devices.shape == (4, 2, 1)


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 16, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1)])
def test_a_mesh_that_does_not_divide_the_devices_is_refused(shape):
    with pytest.raises(errors.InputError, match="mesh data="):
        sharding.make_mesh(*shape)


def test_a_tensor_axis_that_does_not_divide_the_heads_is_refused():
    with pytest.raises(errors.InputError, match="mesh.tensor=4 does not divide num_key_value_h"):
        sharding.check_model(sharding.make_mesh(1, 2, 4), CONFIG)
