import json
import os

import pytest

from trace_jax import records
from trace_jax.errors import InputError

RECORD = records.PreferenceRecord(
    "r1", "Tell me.", "Yes.", [{"role": "assistant", "content": "No"}]
)


def verdict(status, **clauses):
    return records.Verdict(
        status, 0.5, {name: records.ClauseVerdict(s, p) for name, (s, p) in clauses.items()}
    )


def test_a_triaged_record_has_the_form_of_triage_jsonl():
    triaged = records.TriagedRecord(
        RECORD,
        verdict("violating", fear=("violating", 0.0)),
        verdict("abstain", fear=("abstain", None)),
        "UNRESOLVED",
    )
    row = triaged.to_json()
    assert row == {
        "id": "r1",
        "prompt": "Tell me.",
        "chosen": "Yes.",
        "rejected": [{"role": "assistant", "content": "No"}],
        "chosen_verdict": {
            "status": "violating",
            "probability": 0.5,
            "clauses": {"fear": {"status": "violating", "probability": 0.0}},
        },
        "rejected_verdict": {
            "status": "abstain",
            "probability": 0.5,
            "clauses": {"fear": {"status": "abstain", "probability": None}},
        },
        "action": "UNRESOLVED",
    }
    assert records.TriagedRecord.from_json(json.loads(json.dumps(row))) == triaged


@pytest.mark.parametrize("labels", [None, {"safe": True}, 0, []])
def test_a_record_round_trips_with_its_labels(labels):
    record = records.PreferenceRecord("r1", "x", "a", "b", labels)
    row = record.to_json()
    assert ("labels" in row) == (labels is not None)
    assert records.PreferenceRecord.from_json(row) == record


@pytest.mark.parametrize(
    "status, compliant",
    [("compliant", True), ("violating", False), ("abstain", None), ("error", None)],
)
def test_only_two_statuses_decide(status, compliant):
    assert verdict(status).compliant is compliant


def test_the_id_of_a_content_is_its_hash():
    # printf '["x","a","b"]' | sha256sum | cut -c1-16
    assert records.content_id("x", "a", "b") == "3a564a4d7647f087"
    one = [{"role": "user", "content": "x"}]
    other = [{"content": "x", "role": "user"}]
    assert records.content_id(one) == records.content_id(other) != records.content_id("x")
    assert records.content_id("x", "b", "a") != records.content_id("x", "a", "b")


def test_reading_counts_lines_and_skips_blank_ones(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"a": 1}\r\n\n  \n{"a": "\u2028é"}'.encode())
    assert list(records.read_jsonl(path)) == [(1, {"a": 1}), (4, {"a": "\u2028é"})]


@pytest.mark.parametrize(
    "line, problem",
    [
        (b'{"a": 1', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "a line must be a JSON object, this is a list"),
        (b'{"a": "\xff"}', "not UTF-8"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, problem):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' * 16 + line + b"\n")
    with pytest.raises(InputError, match=rf"a\.jsonl:17: {problem}.*: (fix|re-encode)"):
        list(records.read_jsonl(path))


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        list(records.read_jsonl(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="No such file"):
        records.read_json(tmp_path / "none.json")


@pytest.mark.fault
def test_whole_files_are_written_or_not_at_all(tmp_path):
    path = tmp_path / "a.jsonl"
    records.write_jsonl(path, [{"a": "é"}, {"a": 2}])
    assert path.read_bytes() == '{"a": "é"}\n{"a": 2}\n'.encode()

    def cut_off():
        yield {"a": 3}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.write_jsonl(path, cut_off())
    assert [row["a"] for _, row in records.read_jsonl(path)] == ["é", 2]
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    records.write_json(tmp_path / "b.json", {"b": [1, None], "a": 2})
    assert records.read_json(tmp_path / "b.json") == {"a": 2, "b": [1, None]}
    with pytest.raises(InputError, match="cannot be written .*; free space"):
        records.write_json(tmp_path / "no such folder" / "b.json", {})
    with pytest.raises(InputError, match="cannot be written .*; free space"):
        records.JsonlAppender(tmp_path / "no such folder" / "b.jsonl")


@pytest.mark.fault
def test_appending_goes_on_after_the_last_whole_line(tmp_path):
    path = tmp_path / "a.jsonl"
    with records.JsonlAppender(path) as out:
        assert out.ids == set()
        out.append([{"id": "1"}, {"id": "é"}])
        assert len(path.read_bytes().splitlines()) == 2  # flushed before it is closed
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with records.JsonlAppender(path) as out:
            kept = ["1", "é"][: whole[:cut].count(b"\n")]
            assert out.ids == set(kept)
            out.append({"id": i} for i in ["1", "é"] if i not in kept)
            assert out.ids == {"1", "é"}
        assert path.read_bytes() == whole


@pytest.mark.fault
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_what_was_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, name):
    """A power cut behind a rename would leave an empty file."""
    path, synced, fsync, replace = tmp_path / name, {}, os.fsync, os.replace

    def watched_fsync(descriptor):
        fsync(descriptor)
        synced[os.readlink(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_size

    def watched_replace(old, new):
        assert synced[str(old)] == os.path.getsize(old) > 0
        replace(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    records.write_jsonl(path, [{"id": "1"}])
    assert list(synced) == [f"{path}.tmp"]
    whole = tmp_path / "b.jsonl"
    with records.JsonlAppender(whole) as out:
        out.append([{"id": "1"}, {"id": "2"}])
    assert synced[str(whole)] == whole.stat().st_size > 0


def test_appending_to_rows_without_ids_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "1"}\n{"x": 1}\n')
    with pytest.raises(InputError, match="a.jsonl:2: the line has no id; .*--redo"):
        records.JsonlAppender(path)


@pytest.mark.parametrize("bad", [{"id": "2", "x": {1}}, {"id": "2", "x": "\ud83d"}, {"x": 1}])
def test_a_row_that_cannot_be_written_leaves_no_trace(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    with records.JsonlAppender(path) as out, pytest.raises((TypeError, ValueError, KeyError)):
        out.append([{"id": "1"}, bad])
    assert out.ids == {"1"}
    assert path.read_text() == '{"id": "1"}\n'
