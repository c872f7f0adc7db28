"""Kinds of files, and what is wrong with them."""

import csv
import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from trace_jax import sources
from trace_jax.errors import InputError
from trace_jax.sources import files

ROWS = [
    {"prompt": f"Say {i}.", "chosen": f'Yes, "{i}"\nindeed', "rejected": f"Nö {i}"}
    for i in range(5)
]


def write_csv(path, rows, delimiter=","):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def kinds(folder):
    """Every way to keep ROWS."""
    (folder / "a.jsonl").write_bytes(lines(ROWS))
    (folder / "a.ndjson.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + lines(ROWS)))
    (folder / "a.json").write_text(json.dumps(ROWS))
    (folder / "b.json").write_bytes(lines(ROWS))
    write_csv(folder / "a.csv", ROWS)
    write_csv(folder / "a.tsv", ROWS, "\t")
    (folder / "a.CSV.gz").write_bytes(gzip.compress((folder / "a.csv").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "a.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"))
    splits = {
        "train": datasets.Dataset.from_list(ROWS),
        "test": datasets.Dataset.from_list(ROWS[:1]),
    }
    datasets.DatasetDict(splits).save_to_disk(str(folder / "splits"))
    (folder / "parts").mkdir()
    (folder / "parts" / "2.jsonl").write_bytes(lines(ROWS[3:]))
    (folder / "parts" / "1.csv").write_bytes(write_csv(folder / "x.csv", ROWS[:3]).read_bytes())
    (folder / "parts" / "README.md").write_text("not data")
    return sorted(p for p in folder.iterdir() if p.name != "x.csv")


def test_every_kind_of_file_gives_the_same_records(tmp_path):
    found = kinds(tmp_path)
    assert len(found) == 11
    expected, _ = sources.read_records(tmp_path / "a.jsonl")
    assert [r.chosen for r in expected] == [row["chosen"] for row in ROWS]
    for path in found:
        assert sources.read_records(path)[0] == expected, path
    test, _ = sources.read_records(tmp_path / "splits", sources.Reading(split="test"))
    assert test == expected[:1]
    pattern = str(tmp_path / "a.[cj]s*")
    assert sources.read_records(pattern)[1] == sources.Counts(5, 10, {})
    assert files.digest(pattern) and files.digest(pattern) != files.digest(str(found[0]))
    assert files.digest("some/dataset") == ""


def test_a_name_that_reads_like_a_pattern_is_a_file_where_there_is_one(tmp_path):
    for name in ("pairs[1].jsonl", "odd*.jsonl"):
        (tmp_path / name).write_bytes(lines(ROWS[:2]))
        assert len(sources.read_records(tmp_path / name)[0]) == 2
    (tmp_path / "pairs1.jsonl").write_bytes(lines(ROWS))
    assert len(sources.read_records(tmp_path / "pairs[1].jsonl")[0]) == 2
    assert len(sources.read_records(tmp_path / "pairs[12].jsonl")[0]) == 5


BAD = [
    ("a.jsonl", b'{"prompt": "x\xff"}\n', r"a\.jsonl:1: not UTF-8"),
    ("a.jsonl.gz", gzip.compress(lines(ROWS))[:-9], r"a\.jsonl\.gz: damaged gzip"),
    ("a.jsonl.gz", lines(ROWS), r"a\.jsonl\.gz: damaged gzip"),
    ("a.json", b"[1, 2]", r"a\.json, row 1: must be a JSON object"),
    ("a.json", b'[{"prompt": ', r"a\.json: not valid JSON"),
    ("a.csv", b"prompt,chosen,rejected\na,b\n", r"a\.csv:2: has not as many cells"),
    ("a.csv", b"prompt,chosen,rejected\na,b,c,d\n", r"a\.csv:2: has not as many cells"),
    ("a.csv", b'prompt,chosen,rejected\na,"b" x,c\n', r"a\.csv:2: not valid CSV"),
    ("a.csv", b"prompt,chosen,rejected\na,b\xe9,c\n", r"a\.csv:2: not UTF-8"),
    ("a.csv", b"", r"a\.csv: no records"),
    ("a.parquet", b"PAR1 no", r"a\.parquet: not readable as Parquet"),
    ("a.txt", b"hello", r"a\.txt: unknown kind of file"),
]


@pytest.mark.parametrize("name, content, problem", BAD)
def test_bad_files_are_one_clear_line(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=problem) as caught:
        sources.read_records(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_files_folders_and_splits_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        sources.read_records(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="no file matches"):
        sources.read_records(str(tmp_path / "*.csv"))
    with pytest.raises(InputError, match="a folder without"):
        sources.read_records(tmp_path)
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(InputError, match="no split 'test'; it has train"):
        sources.read_records(tmp_path / "d", sources.Reading(split="test"))


def test_a_dataset_of_the_hub_that_cannot_be_loaded_is_one_line(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="nobody/nothing: neither a file here nor a data set"):
        sources.read_records("nobody/nothing")


def test_a_large_file_is_read_a_row_at_a_time(tmp_path):
    """The first records of a file that never ends."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(ROWS[:2]) + b"not JSON\n")
    found = sources.Records(path, sources.Reading(first=2))
    assert len(list(found)) == 2 and found.counts.records == 2
    with pytest.raises(InputError, match=":3: not valid JSON"):
        sources.read_records(path)


def test_a_limit_draws_evenly_and_keeps_the_order(tmp_path):
    rows = [ROWS[0] | {"prompt": str(i), "id": i} for i in range(40)]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    drawn = [0] * 40
    for seed in range(200):
        found, counts = sources.read_records(
            tmp_path / "a.jsonl", sources.Reading(limit=10, seed=seed)
        )
        ids = [int(r.id) for r in found]
        assert ids == sorted(ids) and counts.left_out == {"beyond data.limit": 30}
        for i in ids:
            drawn[i] += 1
    assert min(drawn) > 25 and max(drawn) < 78  # 50 each, six standard deviations
    assert sources.read_records(tmp_path / "a.jsonl", sources.Reading(limit=40))[1].left_out == {}
