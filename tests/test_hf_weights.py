import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from trace_jax import errors, models
from trace_jax.models import hf_weights, lora

CONFIG = models.ModelConfig(61, 24, 40, 2, 4, 2, 6, 64, eos_token_ids=(2,), bos_token_id=1)


@pytest.fixture(scope="module")
def module():
    """Every number of every parameter is different, so that a swap or a wrong transpose shows."""
    return filled(CONFIG)


def filled(config):
    graphdef, state = nnx.split(models.init(config, seed=0))
    draw = np.random.default_rng(0).normal
    return nnx.merge(
        graphdef, jax.tree.map(lambda leaf: jnp.asarray(draw(size=leaf.shape), leaf.dtype), state)
    )


@pytest.fixture
def saved(module, tmp_path):
    models.save(module, tmp_path / "model")
    return tmp_path / "model"


def assert_equal_models(a, b):
    assert a.config == b.config
    for x, y in zip(jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def edit_weights(path, change):
    """Rewrites model.safetensors after `change(tensors)`."""
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, path / "model.safetensors")


def test_save_and_load_return_the_same_model(module, saved):
    assert_equal_models(models.load(saved), module)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["model"]  # no scratch left


def test_every_parameter_is_in_the_table_once(module):
    ours = [".".join(keys) for keys, _ in nnx.to_flat_state(nnx.state(module))]
    assert sorted(ours) == sorted(row[1] for row in hf_weights.TABLE)
    assert len({row[0] for row in hf_weights.TABLE}) == len(hf_weights.TABLE)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_what_we_save(tmp_path, tied):
    torch = pytest.importorskip("torch")
    import transformers

    scaling = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
    rope = dict(rope_type="llama3", factor=8.0, rope_theta=50.0, **scaling)
    hf = CONFIG.to_hf() | dict(tie_word_embeddings=tied, rope_parameters=rope)
    module = filled(models.ModelConfig.from_hf(hf))
    models.save(module, tmp_path / "model")
    model, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.dtype == torch.float32 and model.generation_config.eos_token_id == 2
    tokens = np.arange(40)[None] + 2
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    # The logits are in the hundreds: the weights have variance 1.
    np.testing.assert_allclose(module(tokens), expected, rtol=1e-4, atol=1e-4)


def test_shards_are_read_as_one(module, saved):
    tensors = safetensors.numpy.load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        safetensors.numpy.save_file({name: tensors[name] for name in part}, saved / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_equal_models(models.load(saved), module)
    (saved / "b.safetensors").unlink()
    with pytest.raises(errors.InputError, match="b.safetensors"):
        models.load(saved)


def test_dtype_is_kept_or_cast(module, saved, tmp_path):
    half = models.load(saved, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16 and half.layers.q.kernel[...].dtype == jnp.bfloat16
    models.save(half, tmp_path / "half")
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_equal_models(models.load(tmp_path / "half"), half)


def test_a_mesh_gets_a_copy_on_every_device(module, saved):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    loaded = models.load(saved, mesh=mesh)
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(nnx.state(loaded)))
    assert_equal_models(loaded, module)


def test_end_ids_come_from_generation_config(saved):
    (saved / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert models.load(saved).config.eos_token_ids == (7, 8)


def test_tied_head_may_be_stored_if_it_equals_the_embedding(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(errors.InputError, match="lm_head.weight differs"):
        models.load(saved)
    embedding = "model.embed_tokens.weight"
    edit_weights(saved, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding]}))
    assert models.load(saved).head is None
    edit_weights(saved, lambda tensors: tensors.pop("lm_head.weight"))
    assert models.load(saved).head is None


def test_stored_rope_frequencies_are_ignored(module, saved):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(saved, lambda tensors: tensors.update({name: np.ones(3, np.float32)}))
    assert_equal_models(models.load(saved), module)


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(K_PROJ), f"{K_PROJ} is missing"),
        (lambda t: t.update(stray=np.ones(3, np.float32)), "stray is not part"),
        (lambda t: t.update({K_PROJ: t[K_PROJ].T.copy()}), rf"{K_PROJ} has shape \[24, 12\]"),
        (lambda t: t.update({K_PROJ: t[K_PROJ].astype(np.int8)}), f"{K_PROJ} is I8"),
        (lambda t: [t.pop(name) for name in list(t)[:5]], r"and 2 more"),
    ],
)
def test_wrong_tensors_are_named(saved, change, message):
    edit_weights(saved, change)
    with pytest.raises(errors.InputError, match=message):
        models.load(saved)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", None, "config.json does not exist"),
        ("config.json", b"{", "config.json is not JSON"),
        ("config.json", b"[]", "config.json is not a JSON object"),
        ("model.safetensors", None, "has no model.safetensors"),
        ("model.safetensors", b"", "model.safetensors is damaged"),
        ("model.safetensors", b"\xff" * 64, "model.safetensors is damaged"),
    ],
)
def test_missing_and_damaged_files_are_named(saved, file, content, message):
    (saved / file).unlink(missing_ok=True)
    if content is not None:
        (saved / file).write_bytes(content)
    with pytest.raises(errors.InputError, match=message):
        models.load(saved)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": [1]}'])
def test_an_index_without_files_is_named(saved, index):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(index)
    with pytest.raises(errors.InputError, match="index.json has no weight_map"):
        models.load(saved)


def test_truncated_weights_are_damaged(saved):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(errors.InputError, match="model.safetensors is damaged"):
        models.load(saved)


def test_a_failed_save_leaves_the_old_model(module, saved, monkeypatch):
    def fail(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    for path in (saved, saved.parent / "new"):
        with pytest.raises(OSError, match="no space left"):
            models.save(module, path)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["model"]
    assert_equal_models(models.load(saved), module)


def test_what_was_written_is_compared(module, tmp_path, monkeypatch):
    write = safetensors.numpy.save_file

    def corrupt(tensors, filename, metadata):
        write(tensors | {K_PROJ: tensors[K_PROJ] + 1}, filename, metadata)

    monkeypatch.setattr(safetensors.numpy, "save_file", corrupt)
    with pytest.raises(OSError, match=K_PROJ):
        models.save(module, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_saving_replaces_a_model_and_nothing_else(module, saved, tmp_path):
    (saved / "stale.bin").write_text("x")
    models.save(module, saved)
    assert not (saved / "stale.bin").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("x")
    with pytest.raises(errors.InputError, match="thesis exists and holds no model"):
        models.save(module, tmp_path / "thesis")


def test_adapters_have_to_be_merged_first(module, tmp_path):
    adapted = lora.add(module, rank=2, alpha=4.0, targets=("q",), seed=0)
    with pytest.raises(ValueError, match="lora.merge"):
        models.save(adapted, tmp_path / "model")
