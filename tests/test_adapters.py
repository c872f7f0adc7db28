"""PEFT adapters are read as the models that they make."""

import json
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import test_hf_export
import test_hf_weights
import tiny
from flax import nnx

from trace_jax import config as config_lib
from trace_jax import encoding, errors, model_folder, models, sharding, workdir
from trace_jax.judges import local
from trace_jax.models import lora
from trace_jax.stages import context

TOKENS = test_hf_export.TOKENS


@pytest.fixture(params=test_hf_export.FAMILIES)
def module(request):
    return test_hf_export.small(test_hf_weights.filled(test_hf_export.FAMILIES[request.param]))


@pytest.fixture
def llama():
    return test_hf_export.small(test_hf_weights.filled(test_hf_weights.CONFIG))


@pytest.fixture
def adapter(llama, tmp_path):
    return written(llama, tmp_path)


def written(module, folder):
    """The folder of an adapter of `module`, whose own is beside it."""
    models.save(module, folder / "base")
    made = test_hf_export.adapted(module)
    models.save_adapter(made, folder / "adapter", base=str(folder / "base"))
    return folder / "adapter"


def edit(adapter, **changes):
    """Changes of adapter_config.json."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_an_adapter_is_the_model_with_its_factors_merged(module, tmp_path):
    loaded = models.load(written(module, tmp_path))
    merged = lora.merge(test_hf_export.adapted(module))
    for ours, theirs in zip(*map(jax.tree.leaves, map(_state, (loaded, merged))), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def _state(module):
    return nnx.state(module)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_wrote_is_what_peft_computes(module, tmp_path, rslora):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import transformers

    models.save(module, tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype="float32", attn_implementation="eager"
    )
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=rslora, target_modules=["q_proj", "o_proj", "up_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"o_proj": 7},
        modules_to_save=["norm"], init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, settings).eval()
    with torch.no_grad():
        theirs.base_model.model.model.norm.modules_to_save["default"].weight.mul_(1.5)
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    theirs.save_pretrained(tmp_path / "adapter")
    loaded = models.load(tmp_path / "adapter")
    np.testing.assert_allclose(test_hf_export.forward(loaded, TOKENS), expected, atol=1e-4)
    assert np.abs(test_hf_export.forward(module, TOKENS) - expected).max() > 0.01


def test_a_mesh_gets_the_parts_it_wants(llama, adapter):
    whole = models.load(adapter)
    cut = models.load(adapter, mesh=sharding.make_mesh(2, 2, 2))
    for ours, theirs in zip(*map(jax.tree.leaves, map(_state, (cut, whole))), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_an_adapter_of_an_adapter_adds_to_it(llama, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "second")
    edit(tmp_path / "second", base_model_name_or_path=str(adapter))
    once, twice = (models.load(path) for path in (adapter, tmp_path / "second"))
    before, one, two = (m.layers.q.kernel[...] for m in (llama, once, twice))
    np.testing.assert_allclose(two - before, 2 * (one - before), atol=1e-6)


def on_top(module):
    """New factors of other matrices, another rank and another scale."""
    made = lora.add(module, rank=3, alpha=9.0, targets=("q", "o"), seed=1)
    for name in ("q", "o"):
        linear = getattr(made.layers, name)
        draw = np.random.default_rng(2).normal(0, 0.3, linear.lora_b.shape)
        linear.lora_b[...] = jnp.asarray(draw, jnp.float32)
    return made


def test_what_was_trained_on_an_adapter_is_one_adapter_with_it(llama, adapter, tmp_path):
    def norm(tensors):
        tensors["base_model.model.model.norm.weight"] = np.full(24, 0.5, np.float32)

    rewrite(adapter, norm)
    edit(adapter, modules_to_save=["norm"], use_rslora=True)
    made = on_top(models.load(adapter))
    base = str(tmp_path / "base")
    models.save_adapter(made, tmp_path / "both", base=base, under=[adapter])
    expected = test_hf_export.forward(made, TOKENS)
    found = test_hf_export.forward(models.load(tmp_path / "both"), TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(test_hf_export.forward(llama, TOKENS) - expected).max() > 0.01
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "both").eval()
    with torch.no_grad():
        logits = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_the_config_and_the_hash_are_also_those_of_the_model_behind(llama, adapter, tmp_path):
    assert models.load(adapter).config == llama.config
    names = (adapter, tmp_path / "base")
    hashes = [model_folder.content_hash(name) for name in names]
    prints = [local.fingerprint(name) for name in names]
    assert hashes[0].endswith(hashes[1]) and len(set(hashes)) == len(set(prints)) == 2
    test_hf_weights.edit_weights(tmp_path / "base", lambda t: t.update({
        "model.norm.weight": t["model.norm.weight"] + 1
    }))  # fmt: skip
    assert model_folder.content_hash(adapter) != hashes[0]
    assert local.fingerprint(adapter) != prints[0]


def test_the_tokenizer_is_its_own_or_that_of_its_model(adapter, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    assert len(encoding.load_tokenizer(adapter)) == len(tokenizer)
    assert model_folder.of_tokenizer(adapter) == tmp_path / "base"
    tokenizer.save_pretrained(adapter)
    assert model_folder.of_tokenizer(adapter) == adapter
    assert len(encoding.load_tokenizer(adapter)) == len(tokenizer)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(peft_type="LOHA"), "adapters of type LOHA are not read; merge the adapter"),
        (dict(use_dora=True), "use_dora=True changes more than LoRA does; merge"),
        (dict(bias="all"), "bias=all changes more"),
        (dict(init_lora_weights="pissa"), "init_lora_weights=pissa changes more"),
        (dict(lora_alpha="much"), "lora_alpha='much' in its adapter_config.json is not a number"),
        (dict(base_model_name_or_path="/no/such"), "'/no/such', which is not there; let base_mo"),
        (dict(base_model_name_or_path=None), "'None', which is not there"),
    ],
)
def test_what_is_no_plain_lora_is_one_line(adapter, changes, said):
    edit(adapter, **changes)
    with pytest.raises(errors.InputError, match=said):
        models.load(adapter)


def test_an_adapter_of_itself_is_refused(adapter):
    edit(adapter, base_model_name_or_path=str(adapter))
    with pytest.raises(errors.InputError, match="which is not there"):
        models.load(adapter)


def rewrite(adapter, change):
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{QUERY}.lora_A.weight"), "q_proj do not fit the model"),
        (
            lambda t: t.update({f"{QUERY}.lora_A.weight": np.zeros((2, 5), np.float32)}),
            "q_proj do not fit the model",
        ),
        (
            lambda t: t.update({f"{QUERY}.lora_magnitude_vector": np.zeros(3, np.float32)}),
            "lora_magnitude_vector fits no tensor of the model; merge",
        ),
        (
            lambda t: t.update({f"{QUERY}.lora_B.weight": np.full((24, 2), np.nan, np.float32)}),
            "numbers that are not finite",
        ),
    ],
)
def test_factors_of_another_model_are_one_line(adapter, change, said):
    rewrite(adapter, change)
    with pytest.raises(errors.InputError, match=said):
        models.load(adapter)


@pytest.mark.parametrize("stays_tied", [False, True])
def test_an_embedding_beside_a_tied_head_is_not_taken_for_both(tmp_path, stays_tied):
    gemma = test_hf_weights.filled(test_hf_export.FAMILIES["gemma2"])
    adapter = written(gemma, tmp_path)
    edit(adapter, modules_to_save=["embed_tokens"], ensure_weight_tying=stays_tied)
    shape = gemma.embed[...].shape
    embedding = {"base_model.model.model.embed_tokens.weight": np.ones(shape, np.float32)}
    rewrite(adapter, lambda tensors: tensors.update(embedding))
    if stays_tied:
        assert np.all(np.asarray(models.load(adapter).embed[...]) == 1)
        return
    with pytest.raises(errors.InputError, match="an embedding of its own.*merge the adapter"):
        models.load(adapter)


def test_a_run_is_of_both_folders(adapter, tmp_path):
    c = config_lib.resolved(config_lib.base_config())
    c.model.path = str(adapter)
    run = context.Context(c, workdir.Workdir(tmp_path / "run"))
    before = run.content_hashes("prepare")["model.path/hash"]
    test_hf_weights.edit_weights(tmp_path / "base", lambda t: t.update({
        "model.norm.weight": t["model.norm.weight"] + 1
    }))  # fmt: skip
    assert run.content_hashes("prepare")["model.path/hash"] != before


def test_the_version_of_the_base_is_the_one_that_the_adapter_names(adapter, monkeypatch, tmp_path):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(tmp_path / "base")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    edit(adapter, base_model_name_or_path="org/base", revision="v1.2")
    module = models.load(adapter)
    assert asked == [("org/base", "v1.2")]  # once, however often it is looked for
    made = on_top(module)
    models.save_adapter(made, tmp_path / "new", base="org/base", revision="v1.2", under=[adapter])
    assert model_folder.named(tmp_path / "new") == ("org/base", "v1.2")


def test_pickled_factors_are_not_read(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(errors.InputError, match="no adapter_model.safetensors; only safetensors"):
        models.load(adapter)
