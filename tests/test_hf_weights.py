import contextlib
import dataclasses
import http.server
import json
import os
import struct
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from trace_jax import errors, models, sharding
from trace_jax.models import hf_weights

K_PROJ = "model.layers.1.self_attn.k_proj.weight"
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


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_every_parameter_is_in_the_table_once(family):
    config = dataclasses.replace(CONFIG, family=family)
    state = nnx.state(nnx.eval_shape(lambda: models.init(config, 0)))
    ours = [".".join(keys) for keys, _ in nnx.to_flat_state(state)]
    rows = hf_weights.table(config)
    assert sorted(ours) == sorted(row[1] for row in rows)
    assert len({row[0] for row in rows}) == len(rows)


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


def sharded(saved):
    """model.safetensors as two shards and an index."""
    tensors = safetensors.numpy.load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        safetensors.numpy.save_file({name: tensors[name] for name in part}, saved / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    return saved


def test_shards_are_read_as_one(module, saved):
    assert_equal_models(models.load(sharded(saved)), module)
    (saved / "b.safetensors").unlink()
    with pytest.raises(errors.InputError, match="b.safetensors"):
        models.load(saved)


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1, -5000])
def test_a_shard_that_was_cut_off_is_named(saved, size):
    shard = sharded(saved) / "b.safetensors"
    shard.write_bytes(shard.read_bytes()[:size])
    for read in (hf_weights.check, models.load):
        with pytest.raises(errors.InputError, match="b.safetensors is damaged .*copy it again"):
            read(saved)


def test_shards_that_changed_places_or_models_are_named(saved):
    a, b = (folder := sharded(saved)) / "a.safetensors", folder / "b.safetensors"
    whole = b.read_bytes()
    b.write_bytes(a.read_bytes())
    with pytest.raises(errors.InputError, match="is missing"):
        hf_weights.check(saved)
    b.write_bytes(whole)
    index = saved / "model.safetensors.index.json"
    for text in (index.read_text()[:-1], index.read_text()[: len(whole) // 200]):
        index.write_text(text)
        with pytest.raises(errors.InputError, match="index.json is not JSON"):
            hf_weights.check(saved)


def flipped(data, place):
    byte, bit = divmod(place, 8)
    return data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :]


def test_a_flipped_bit_in_the_header_of_a_shard_is_found_or_changes_nothing(saved):
    shard = sharded(saved) / "b.safetensors"
    whole = shard.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    expected, found = hf_read(saved), 0
    for place in np.random.default_rng(0).choice(8 * (8 + length), 120, replace=False).tolist():
        shard.write_bytes(flipped(whole, place))
        try:
            read = hf_read(saved)
        except errors.InputError:
            found += 1
        else:
            assert read.keys() == expected.keys(), place
            for name in read:
                np.testing.assert_array_equal(read[name], expected[name])
    assert found > 80


def hf_read(path):
    """name -> tensor, checked as `hf_weights.check` does."""
    hf_weights.check(path)
    with contextlib.ExitStack() as files:
        tensors = hf_weights._open(path, files)
        return {name: t.read(slice(None)) for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_named(saved, dtype, value):
    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(dtype)
        tensors[K_PROJ][-1, -1] = value

    edit_weights(saved, change)
    sharded(saved)
    hf_weights.check(saved)  # reads headers alone
    with pytest.raises(errors.InputError, match=f"{K_PROJ} has numbers that are not finite"):
        models.load(saved)


def test_a_flipped_bit_that_leaves_a_finite_number_is_not_found(module, saved):
    """safetensors has no checksums: what `load` says it does not find."""
    shard = sharded(saved) / "b.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(flipped(whole, 8 * (len(whole) - 4)))  # the last number's last bit
    changed = [
        np.sum(np.asarray(x) != np.asarray(y))
        for x, y in zip(
            jax.tree.leaves(nnx.state(models.load(saved))),
            jax.tree.leaves(nnx.state(module)),
            strict=True,
        )
    ]
    assert sum(changed) == 1


def test_dtype_is_kept_or_cast(module, saved, tmp_path):
    half = models.load(saved, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16 and half.layers.q.kernel[...].dtype == jnp.bfloat16
    models.save(half, tmp_path / "half")
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_equal_models(models.load(tmp_path / "half"), half)


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 1, 2)])
def test_a_mesh_gets_the_parts_it_wants(module, saved, shape):
    mesh = sharding.make_mesh(*shape)
    loaded = models.load(saved, mesh=mesh)
    assert_equal_models(loaded, module)
    for keys, leaf in nnx.to_flat_state(nnx.state(loaded)):
        expected = sharding.spec(".".join(keys), leaf.shape, mesh)
        assert leaf[...].sharding == jax.sharding.NamedSharding(mesh, expected)


def test_only_the_bytes_of_ones_own_part_are_read(tmp_path, monkeypatch):
    """On a mesh of 8, a process that has devices 0 to 3 reads half."""
    config = models.ModelConfig(64, 32, 48, 2, 4, 4, 8, 64)
    models.save(models.init(config, 0), tmp_path / "model")
    read = []
    preadv = os.preadv

    def counting(descriptor, buffers, offset):
        read.append(preadv(descriptor, buffers, offset))
        return read[-1]

    def of_half(shape, where, part):
        ours = list(where.addressable_devices_indices_map(shape).values())
        for index in ours[:4]:
            part(index)
        return jnp.zeros(shape)

    monkeypatch.setattr(os, "preadv", counting)
    monkeypatch.setattr(jax, "make_array_from_callback", of_half)
    models.load(tmp_path / "model", mesh=sharding.make_mesh(1, 8, 1))
    size = (tmp_path / "model/model.safetensors").stat().st_size
    assert 0.4 * size < sum(read) < 0.55 * size


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


@pytest.mark.fault
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


@pytest.mark.fault
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


@pytest.mark.parametrize(
    "index",
    ["{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["x"]}}'],
)
def test_an_index_without_files_is_named(saved, index):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(index)
    with pytest.raises(errors.InputError, match="index.json has no weight_map"):
        models.load(saved)


@pytest.mark.fault
def test_truncated_weights_are_damaged(saved):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(errors.InputError, match="model.safetensors is damaged"):
        models.load(saved)


@pytest.mark.parametrize(
    "start, said",
    [
        (b"", "no header"),
        (b"\xff" * 8, "no header"),
        (struct.pack("<Q", 2) + b"[]", "bad header"),
        (struct.pack("<Q", 4) + b"nope", "bad header"),
    ],
)
def test_what_is_no_safetensors_file_is_named(saved, start, said):
    (saved / "model.safetensors").write_bytes(start)
    with pytest.raises(errors.InputError, match=f"damaged .{said}"):
        models.load(saved)


def test_a_smaller_tokenizer_is_fine_and_a_larger_is_not():
    hf_weights.check_tokenizer(CONFIG, range(61))
    with pytest.raises(errors.InputError, match="62 tokens, the model's embedding 61"):
        hf_weights.check_tokenizer(CONFIG, range(62))


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that has a gated model and nothing else."""

    def do_GET(self):
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    "name, said",
    [
        ("org/gated", "org/gated is gated: accept its licence"),
        ("org/absent", "neither a folder here nor a model of the hub"),
    ],
)
def test_the_hub_refuses_in_one_line(name, said, tmp_path):
    program = f"""
from trace_jax import errors, models
try:
    models.load({name!r})
except errors.InputError as error:
    print(error)
"""
    with http.server.ThreadingHTTPServer(("localhost", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        environment = os.environ | {
            "HF_ENDPOINT": f"http://localhost:{hub.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path),
            "HF_TOKEN": "hf_secret",
        }
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        hub.shutdown()
    assert said in done.stdout and done.stdout.count("\n") == 1, done
    assert "hf_secret" not in done.stdout + done.stderr


def test_offline_is_said_in_one_line():
    with pytest.raises(errors.InputError, match="org/name could not be downloaded"):
        models.load("org/name")
