"""Tokenizers are loaded as AutoTokenizer loads them."""

import json
import subprocess
import sys

import pytest
import transformers

from trace_jax import encoding, synth
from trace_jax.errors import InputError

TEXT = "The baker tells the truth, and \n asks: what is  left?"


@pytest.fixture
def folder(tmp_path):
    synth.tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("family", [None, "llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("name", [None, "PreTrainedTokenizerFast", "Qwen2Tokenizer"])
def test_a_tokenizer_is_the_one_that_autotokenizer_gives(folder, name, family):
    if family is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": family}))
    settings = folder / "tokenizer_config.json"
    written = json.loads(settings.read_text())
    if name is not None:
        settings.write_text(json.dumps(written | {"tokenizer_class": name}))
    ours = encoding.load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs)
    assert ours(TEXT).input_ids == theirs(TEXT).input_ids
    assert ours.decode(ours(TEXT).input_ids) == theirs.decode(theirs(TEXT).input_ids)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.model_max_length == theirs.model_max_length
    assert len(ours) == len(theirs)


def test_a_tokenizer_of_no_family_needs_no_pytorch(folder):
    program = (
        "import sys; from trace_jax import encoding; "
        f"encoding.load_tokenizer({str(folder)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("broken", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_one_line(folder, broken):
    (folder / broken).write_text("[")
    with pytest.raises(InputError, match="no tokenizer could be loaded") as error:
        encoding.load_tokenizer(folder)
    assert "\n" not in str(error.value)
