"""What is written: read back, loaded by transformers and PEFT, whole or not at all."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import test_hf_weights
from flax import nnx

from trace_jax import errors, models, sharding
from trace_jax.models import hf_export, lora
from trace_jax.models.decoder import Decoder

TESTS = Path(__file__).parent
CONFIG = test_hf_weights.CONFIG
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 12))
FAMILIES = {
    "llama": CONFIG,
    "qwen2": dataclasses.replace(CONFIG, family="qwen2"),
    "gemma2": dataclasses.replace(
        CONFIG, family="gemma2", tie_word_embeddings=True, query_pre_attn_scalar=5,
        attn_logit_softcapping=5.0, final_logit_softcapping=3.0, sliding_window=4,
    ),
}  # fmt: skip
forward = jax.jit(lambda module, tokens: module(tokens))


def small(module: Decoder) -> Decoder:
    """Weights of a tenth, so that logits are of ordinary size."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x * 0.1, state))


@pytest.fixture(params=FAMILIES)
def module(request) -> Decoder:
    return small(test_hf_weights.filled(FAMILIES[request.param]))


def adapted(module: Decoder) -> Decoder:
    """With factors that change the logits."""
    made = lora.add(module, rank=2, alpha=4.0, targets=("q", "v", "down"), seed=0)
    for name in ("q", "v", "down"):
        linear = getattr(made.layers, name)
        shape = linear.lora_b.shape
        linear.lora_b[...] = jnp.asarray(np.random.default_rng(1).normal(0, 0.3, shape))
    return made


def test_shards_have_an_index_and_transformers_reads_them(module, tmp_path):
    models.save(module, tmp_path / "model", max_shard_bytes=12_000)
    shards = sorted(p.name for p in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(
        x.nbytes for x in jax.tree.leaves(nnx.state(module))
    )
    loaded = models.load(tmp_path / "model")
    test_hf_weights.assert_equal_models(loaded, module)
    torch = pytest.importorskip("torch")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype="float32", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(forward(loaded, TOKENS), expected, atol=1e-4)


def test_a_sharded_model_is_written_as_one(tmp_path):
    module = test_hf_weights.filled(CONFIG)
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        models.save(sharding.place_module(module), tmp_path / "model")
    test_hf_weights.assert_equal_models(models.load(tmp_path / "model"), module)


def test_merging_into_bfloat16_rounds_the_update_once(tmp_path):
    """A merged kernel is the float32 sum, rounded: half a unit of bfloat16's 8 bits, 2^-8."""
    module = small(test_hf_weights.filled(CONFIG))
    exact = forward(lora.merge(adapted(module)), TOKENS)
    graphdef, state = nnx.split(module)
    low = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    models.save(lora.merge(adapted(low)), tmp_path / "model")
    loaded = models.load(tmp_path / "model", dtype=jnp.float32)
    kernel = lora.merge(adapted(module)).layers.q.kernel[...]
    np.testing.assert_allclose(loaded.layers.q.kernel[...], kernel, rtol=2**-7, atol=2**-8 * 0.1)
    rms = float(jnp.sqrt(jnp.mean(exact**2)))
    assert jnp.abs(forward(loaded, TOKENS) - exact).max() < 0.05 * rms


def test_the_adapter_holds_what_was_trained(module, tmp_path):
    made = adapted(module)
    models.save_adapter(made, tmp_path / "adapter", base="some/base")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    tensors = safetensors.numpy.load_file(tmp_path / "adapter/adapter_model.safetensors")
    merged = lora.merge(made)
    for n in range(2):
        key = f"base_model.model.model.layers.{n}.self_attn.q_proj"
        a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
        update = (b @ a).T * config["lora_alpha"] / config["r"]
        kernel = module.layers.q.kernel[...][n] + update
        np.testing.assert_allclose(kernel, merged.layers.q.kernel[...][n], atol=1e-6)


def test_peft_loads_the_adapter(module, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import transformers

    made = adapted(module)
    models.save(module, tmp_path / "base")
    models.save_adapter(made, tmp_path / "adapter", base=str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype="float32", attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(forward(made, TOKENS), expected, atol=1e-4)
    assert np.abs(forward(module, TOKENS) - expected).max() > 0.01


def test_no_factors_make_no_adapter(tmp_path):
    with pytest.raises(ValueError, match="no LoRA factors"):
        models.save_adapter(models.init(CONFIG, 0), tmp_path / "adapter", base="x")


def test_adapters_have_to_be_merged_first(tmp_path):
    made = lora.add(models.init(CONFIG, 0), rank=2, alpha=4.0, targets=("q",), seed=0)
    with pytest.raises(ValueError, match="lora.merge"):
        models.save(made, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_is_compared(tmp_path, monkeypatch):
    class Disk:
        """A tensor whose bytes change on their way."""

        def __init__(self, name):
            self.name = name

        def get_tensor(self, name):
            return np.zeros(3)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(hf_export.safetensors, "safe_open", lambda *_, **__: Disk("x"))
    with pytest.raises(errors.InputError, match="reads back other than it was written"):
        models.save(models.init(CONFIG, 0), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault
def test_an_interrupt_between_two_renames_leaves_what_was_there(tmp_path, monkeypatch):
    old, rename = models.init(CONFIG, 0), Path.rename
    models.save(old, tmp_path / "model")

    def ends(this, target):
        if this.name == ".model.new":
            raise KeyboardInterrupt
        return rename(this, target)

    monkeypatch.setattr(Path, "rename", ends)
    with pytest.raises(KeyboardInterrupt):
        models.save(models.init(CONFIG, 1), tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    test_hf_weights.assert_equal_models(models.load(tmp_path / "model"), old)


@pytest.mark.fault
def test_a_kill_between_two_renames_loses_no_model(tmp_path):
    """The next call has the old one back in its place, whatever becomes of itself."""
    old, target = models.init(CONFIG, 0), tmp_path / "model"
    models.save(old, tmp_path / ".model.old")
    models.save(models.init(CONFIG, 1), tmp_path / ".model.new")
    with pytest.raises(ZeroDivisionError), hf_export._whole(target, "config.json"):
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    test_hf_weights.assert_equal_models(models.load(target), old)


@pytest.mark.fault
def test_a_model_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, fsync, rename = {}, os.fsync, Path.rename

    def watched_fsync(descriptor):
        fsync(descriptor)
        synced[os.readlink(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_size

    def watched_rename(this, target):
        sizes = {str(p): p.stat().st_size for p in this.iterdir()}
        assert sizes and sizes == {name: synced.get(name) for name in sizes}
        return rename(this, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    models.save(models.init(CONFIG, 0), tmp_path / "model", card="a card")
    assert len(synced) == len(list((tmp_path / "model").iterdir())) >= 3


FULL_DISK = """
import resource, signal, sys
from trace_jax import errors, models
import test_hf_weights
module = models.load(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    models.save(module, sys.argv[2])
except errors.InputError as error:
    print(error)
"""


@pytest.mark.parametrize("target", ["model", "new"])
def test_a_full_disk_leaves_what_was_there(tmp_path, target):
    """The kernel refuses to write on, as on a full disk."""
    module = test_hf_weights.filled(CONFIG)
    models.save(module, tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path / "model", tmp_path / target],
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert "could not be written" in done.stdout and done.stdout.count("\n") == 1, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    test_hf_weights.assert_equal_models(models.load(tmp_path / "model"), module)
