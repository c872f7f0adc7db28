from pathlib import Path

import pytest
import transformers

from trace_jax import records, scratch
from trace_jax.errors import InputError

SMOLLM = Path("../shared/tokenizers/smollm_tokenizer.json")
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]


@pytest.fixture
def smollm(tmp_path):
    if not SMOLLM.exists():
        pytest.skip(f"{SMOLLM} is not here")
    scratch.save_tokenizer(SMOLLM, tmp_path / "t")
    return transformers.AutoTokenizer.from_pretrained(tmp_path / "t")


def test_a_bare_tokenizer_gets_a_chat_template(smollm, tmp_path):
    text = smollm.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert smollm.decode(smollm(text)["input_ids"]) == text
    assert (smollm.eos_token, smollm.bos_token, len(smollm)) == (
        "<|im_end|>",
        "<|endoftext|>",
        49152,
    )
    scratch.save_tokenizer(tmp_path / "t", tmp_path / "u")  # a folder goes through as it is
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "u")
    assert again.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == text


def test_what_is_no_tokenizer_is_one_clear_line(tmp_path):
    (tmp_path / "no.json").write_text("{}")
    for path in (tmp_path / "no.json", tmp_path):
        with pytest.raises(InputError, match=r"model.scratch.tokenizer=.*no tokenizer could be"):
            scratch.save_tokenizer(path, tmp_path / "t")
    bare = Path("../shared/models/stories260k/tokenizer.json")
    if bare.exists():
        with pytest.raises(InputError, match="lacks <|endoftext|>"):
            scratch.save_tokenizer(bare, tmp_path / "t")


def test_texts_of_records_come_once_in_order():
    found = [
        records.PreferenceRecord("1", "x", "a", "b"),
        records.PreferenceRecord("2", "x", "b", "c"),
        records.PreferenceRecord("3", CHAT, "a", "b"),
    ]
    expected = [("x", "a"), ("x", "b"), ("x", "c"), (CHAT, "a"), (CHAT, "b")]
    assert scratch.texts(found) == expected
