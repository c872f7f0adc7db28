"""`python -m trace_jax.sources`: inspect, convert, export."""

import datetime
import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from trace_jax import records, sources, triage
from trace_jax.sources import __main__ as commands
from trace_jax.sources import export, inspection

SMOLLM = "../shared/tokenizers/smollm_tokenizer.json"
ROWS = [
    {"id": "a", "prompt": "Sky?", "chosen": "Blue.", "rejected": "Red.",
     "labels": {"chosen": {"safe": True}, "rejected": {"safe": False}}},
    {"id": "b", "prompt": "Sky?", "chosen": "Red.", "rejected": "Green."},
    {"id": "c", "prompt": [{"role": "system", "content": "Be kind."},
                           {"role": "user", "content": "So?"}],
     "chosen": "Yes\x1b[31m!", "rejected": "No." * 40},
    {"id": "again", "prompt": "Sky?", "chosen": "Blue.", "rejected": "Red."},
]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    records.write_jsonl(tmp_path / "in.jsonl", ROWS)
    return tmp_path / "in.jsonl"


def test_inspect_counts(path):
    found = inspection.inspect(sources.Records(path), None)
    assert found.counts == sources.Counts(3, 1, {})
    assert (found.prompts, found.chats, found.system, found.turns) == (2, 1, 1, 2.0)
    assert (found.asked, found.judgements) == (8, 5)
    assert found.contradictions == 1 and found.examples == ("a", "b")
    assert found.labels == {"chosen.safe": {"True": 1}, "rejected.safe": {"False": 1}}
    assert found.characters["rejected"] == inspection.Lengths(6, 120, 120, 120, "c")
    assert found.characters["prompt"].longest == len("Be kind.So?")
    assert not found.tokens


def test_inspect_says_it_to_people_and_to_programs(path, capsys):
    assert commands.main(["inspect", str(path)]) == 0
    told = capsys.readouterr().out
    assert "3 records, 1 duplicates left out" in told
    assert "1 chats, 2 plain texts of 2.0 messages, 1 with a system message" in told
    assert "5 different (prompt, response) of 8: a judge is spared 38% of the calls" in told
    assert (
        "1 responses are better in one record and worse in another, as in records a and b" in told
    )
    assert "label chosen.safe: True 1" in told
    assert commands.main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["contradictions"] == 1


def test_inspect_shows_tokens_and_masks(path, shared, capsys):
    command = [
        "inspect",
        str(path),
        "--tokenizer",
        str(shared / "tokenizers/smollm_tokenizer.json"),
    ]
    assert commands.main([*command, "--show", "3", "--as-chat"]) == 0
    told = capsys.readouterr().out
    assert "|<|im_start|>|user|\\n|Sky|?|<|im_end|>|\\n|<|im_start|>|ass|istant|\\n" in told
    assert "chosen (3 tokens): |Blue|.|<|im_end|>" in told
    assert "\\x1b|[|3|1|m|!" in told and "\x1b" not in told  # nothing reaches the terminal
    assert commands.main([*command, "--show", "3", "--max-length", "60"]) == 0
    told = capsys.readouterr().out
    assert "record c: a response has" in told  # the one that does not fit
    assert "1 records have more than 60 tokens" in told
    assert commands.main([*command, "--show", "1"]) == 0
    assert "record a: 8 positions of a row" in capsys.readouterr().out


def test_tokens_in_colour(shared):
    from trace_jax.sources import show

    arguments = commands._parser().parse_args(
        ["inspect", "x", "--tokenizer", str(shared / "tokenizers/smollm_tokenizer.json")]
    )
    encoder = commands._encoder(arguments)
    record = records.PreferenceRecord("r\x1b[2J", "Sky?", "Blue.", "\x1b[1mRed.")
    head, prompt, chosen, rejected = show.lines(record, encoder, colour=True)
    assert head.startswith("record r\\x1b[2J: ")
    assert prompt.startswith("\x1b[90m") and prompt.endswith("\x1b[0m") and "?" in prompt
    assert "\x1b[32mBlue|.|<|im_end|>\x1b[0m" in chosen
    assert "\x1b[31m\\x1b|" in rejected and rejected.count("\x1b") == 2
    assert "\x1b[32mbetter response, loss\x1b[0m" in show.legend(colour=True)


def test_convert_gives_our_own_records(path, tmp_path, capsys):
    out = tmp_path / "out.jsonl.gz"
    assert commands.main(["convert", str(path), str(out)]) == 0
    assert "3 records, 1 duplicates left out: " in capsys.readouterr().out
    assert sources.read_records(out)[0] == sources.read_records(path)[0]
    assert len(gzip.decompress(out.read_bytes()).splitlines()) == 3
    assert commands.main(["convert", str(path), str(out), "--first", "1"]) == 0
    assert len(sources.read_records(out)[0]) == 1


@pytest.mark.parametrize("command", [
    ["inspect", "none.jsonl"], ["convert", "none.jsonl", "out.jsonl"], ["export", "none", "out"],
    ["inspect", "none.jsonl", "--columns", "prompt"], ["inspect"], ["nonsense"],
    ["inspect", "tests/conftest.py"],
])  # fmt: skip
def test_wrong_input_is_exit_code_2(command, capsys):
    assert commands.main(command) == 2
    told = capsys.readouterr().err
    assert "error: " in told and "Traceback" not in told


def verdict(status):
    return records.Verdict(status, None, {})


@pytest.fixture
def workdir(tmp_path):
    """Triage of one record an action, with a correction and weights."""
    chat = [{"role": "user", "content": "So?"}]
    sides = {
        "INVERT": ("violating", "compliant"),
        "PUNISH": ("violating", "violating"),
        "RETAIN": ("compliant", "violating"),
        "UNRESOLVED": ("abstain", "compliant"),
    }
    rows = [
        records.TriagedRecord(
            records.PreferenceRecord(f"{action}{n}", chat, f"w{action}{n}", f"l{action}{n}"),
            *map(verdict, statuses),
            action,
        ).to_json()
        for action, statuses in sides.items()
        for n in (0, 1)
    ]
    folder = tmp_path / "run"
    folder.mkdir()
    records.write_jsonl(folder / "triage.jsonl", rows)
    corrections = [{"id": "PUNISH0", "response": "better"}, {"id": "PUNISH1", "response": None}]
    records.write_jsonl(folder / "corrections.jsonl", corrections)
    records.write_jsonl(folder / "impact.jsonl", [{"id": "INVERT0", "weight": 2.5}])
    assert triage.read(folder / "triage.jsonl")
    return folder


@pytest.mark.parametrize("form", export.FORMATS)
def test_export_gives_datasets_that_others_load(workdir, tmp_path, form):
    out = tmp_path / "out"
    assert commands.main(["export", str(workdir), str(out), "--format", form]) == 0
    preference = datasets.load_dataset(str(out), "preference", split="train")
    pairs = {row["id"]: row for row in preference}
    assert set(pairs) == {"INVERT0", "INVERT1", "PUNISH0", "RETAIN0", "RETAIN1"}
    inverted = pairs["INVERT0"]
    assert inverted["prompt"] == [{"role": "user", "content": "So?"}]
    assert inverted["chosen"] == [{"role": "assistant", "content": "lINVERT0"}]
    assert inverted["rejected"] == [{"role": "assistant", "content": "wINVERT0"}]
    assert (inverted["action"], inverted["weight"]) == ("INVERT", 2.5)
    assert pairs["PUNISH0"]["chosen"][0]["content"] == "better"
    assert pairs["PUNISH0"]["rejected"][0]["content"] == "wPUNISH0"
    assert pairs["RETAIN1"]["chosen"][0]["content"] == "wRETAIN1"
    unpaired = datasets.load_dataset(str(out), "unpaired", split="train")
    labels = {row["completion"][0]["content"]: row["label"] for row in unpaired}
    assert labels["wINVERT1"] is False and labels["lINVERT1"] is True and labels["better"] is True
    assert "wUNRESOLVED0" not in labels and labels["lUNRESOLVED0"] is True
    assert len(unpaired) == 15
    assert "| preference | INVERT | 2 |" in (out / "README.md").read_text()


def test_texts_are_exported_as_texts(workdir, tmp_path):
    rows = [row for _, row in records.read_jsonl(workdir / "triage.jsonl")]
    for row in rows:
        row |= {"prompt": "So?", "chosen": [{"role": "assistant", "content": row["chosen"]}]}
    records.write_jsonl(workdir / "triage.jsonl", rows)
    export.export(workdir, tmp_path / "out", "jsonl")
    row = next(r for _, r in records.read_jsonl(tmp_path / "out" / "preference.jsonl"))
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("So?", "lINVERT0", "wINVERT0")


ESCAPES = "\x1b[2J\x9b1m\u202e"


def test_no_text_of_the_data_moves_the_terminal(tmp_path, capsys):
    """Ids, keys, names and values of labels."""
    row = {"id": f"a{ESCAPES}", "prompt": "Sky?", "chosen": "Blue.", "rejected": "Red."}
    row |= {f"key{ESCAPES}": 1, "labels": {"chosen": {f"x{ESCAPES}": f"v{ESCAPES}"}}}
    path = tmp_path / "in.jsonl"
    records.write_jsonl(path, [row, row | {"id": "b", "chosen": "Red.", "rejected": "Blue."}])
    for command in (
        ["inspect", str(path)],
        ["inspect", str(path), "--json"],
        ["convert", str(path), str(tmp_path / "out.jsonl")],
    ):
        assert commands.main(command) == 0
        told = capsys.readouterr().out
        assert told.replace("\n", "").isprintable()
        assert "\\x1b[2J" in told or json.loads(told)["labels"][f"chosen.x{ESCAPES}"]


def test_a_converted_label_that_no_line_can_keep_is_one_line(tmp_path, capsys):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    row |= {"labels": {"chosen": {"at": datetime.datetime(2024, 5, 1)}}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert commands.main(["convert", str(tmp_path / "a.parquet"), str(tmp_path / "o.jsonl")]) == 2
    told = capsys.readouterr().err
    assert "a.parquet, row 1: 'labels' is not JSON" in told and len(told.splitlines()) == 1
