import json

import pytest

from trace_jax import records, sources
from trace_jax.errors import InputError

GOOD = {"prompt": "Tell me.", "chosen": "Yes.", "rejected": "No."}


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_records_keep_their_order_ids_and_labels(tmp_path):
    chat = [{"role": "user", "content": "Hi", "name": "Ann"}, {"role": "user", "content": "So?"}]
    path = write(
        tmp_path / "a.jsonl",
        GOOD | {"id": "one", "labels": {"safe": False}},
        GOOD | {"prompt": "Other."},
        GOOD | {"id": 7, "prompt": chat, "source": "web"},
        GOOD | {"id": "another id, equal content", "source": "web"},
    )
    found, counts = sources.read_records(path)
    plain = [{"role": m["role"], "content": m["content"]} for m in chat]
    content = records.content_id("Other.", "Yes.", "No.")
    assert found == [
        records.PreferenceRecord("one", "Tell me.", "Yes.", "No.", {"safe": False}),
        records.PreferenceRecord(content, "Other.", "Yes.", "No."),
        records.PreferenceRecord("7", plain, "Yes.", "No."),
    ]
    assert counts == sources.Counts(3, 1, {"prompt.name": 1, "source": 2})
    told = "3 records, 1 duplicates left out, keys ignored: prompt.name (1), source (2)"
    assert str(counts) == told
    assert str(sources.Counts(2, 0, {})) == "2 records"


MALFORMED_PROMPTS = [
    ('{"prompt": ', "not valid JSON"),
    ('{"prompt": "\\ud83d"}', r"holds '\\ud83d', half a character"),
    ({}, "'prompt' is missing"),
    ({"prompt": ""}, "'prompt' is empty"),
    ({"prompt": " \n"}, "'prompt' is empty"),
    ({"prompt": None}, "'prompt' must be a text or a list of chat messages"),
    ({"prompt": []}, "'prompt' must be a text or a list of chat messages"),
    ({"prompt": [{"role": "user"}]}, "'prompt' must be a text or a list"),
    ({"prompt": [{"role": "user", "content": 3}]}, "'prompt' must be a text or a list"),
    ({"prompt": [{"role": "user", "content": ""}]}, "'prompt' is empty"),
    ({"prompt": "x", "id": ""}, "id must be a text or a whole number"),
    ({"prompt": "x", "id": True}, "id must be a text or a whole number"),
    ({"prompt": "x", "id": None}, "id must be a text or a whole number"),
    ({"prompt": "x", "id": 1.5}, "id must be a text or a whole number"),
    ({"prompt": "x", "id": "one"}, "id 'one' is already that of line 1"),
]
MALFORMED_RECORDS = [
    ({"chosen": "a", "rejected": "b"}, "'prompt' is missing"),
    ({"prompt": "x", "rejected": "b"}, "'chosen' is missing"),
    ({"prompt": "x", "chosen": "a"}, "'rejected' is missing"),
    ({"prompt": "x", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    ({"prompt": "x", "chosen": " ", "rejected": "a"}, "'chosen' is empty"),
]


@pytest.mark.parametrize("row, problem", MALFORMED_PROMPTS)
def test_malformed_prompts_are_named(tmp_path, row, problem):
    path = write(tmp_path / "a.jsonl", {"prompt": "first", "id": "one"}, row)
    with pytest.raises(InputError, match=rf"^\S*a\.jsonl:2: {problem}"):
        sources.read_prompts(path)


@pytest.mark.parametrize("row, problem", MALFORMED_PROMPTS + MALFORMED_RECORDS)
def test_malformed_records_are_named(tmp_path, row, problem):
    if isinstance(row, dict) and (row, problem) not in MALFORMED_RECORDS:
        row = {"chosen": "a", "rejected": "b"} | row
    path = write(tmp_path / "a.jsonl", GOOD | {"id": "one"}, row)
    with pytest.raises(InputError, match=rf"^\S*a\.jsonl:2: {problem}"):
        sources.read_records(path)


def test_prompts_are_read_once_each(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "x"}, {"prompt": "y", "id": 3}, {"prompt": "x"})
    assert sources.read_prompts(path)[0] == [
        sources.HeldOutPrompt(records.content_id("x"), "x"),
        sources.HeldOutPrompt("3", "y"),
    ]


@pytest.mark.parametrize("read", [sources.read_records, sources.read_prompts])
def test_an_empty_file_is_an_input_error(tmp_path, read):
    with pytest.raises(InputError, match="no (records|prompts); a line needs prompt"):
        read(write(tmp_path / "a.jsonl", ""))
