import json
import subprocess
import sys

import pytest

from trace_jax import overrides, records, shortlist, triage


def item(name, p_w, p_l, override=None):
    record = records.PreferenceRecord(name, "x", f"{name} w", f"{name} l")
    verdicts = [
        records.Verdict("abstain", None, {})
        if p is None
        else records.Verdict("compliant" if p >= 0.5 else "violating", p, {})
        for p in (p_w, p_l)
    ]
    found = triage.decide(record, *verdicts, triage.Settings())
    return found if override is None else records.TriagedRecord(
        found.record, *verdicts, found.action, override=override
    )  # fmt: skip


SURE, TORN, THIRDS = item("sure", 0.0, 1.0), item("torn", 0.5, 0.0), item("thirds", 1 / 3, 0.5)
OPEN, DONE = item("open", None, 1.0), item("done", 0.5, 0.5, {"action": "RETAIN"})
ALL = [SURE, TORN, THIRDS, OPEN, DONE]


def test_uncertainty():
    found = [shortlist.uncertainty(t) for t in ALL]
    assert found == pytest.approx([0.0, 0.75, 1.0, 1.0, 0.0])


def test_uncertain_verdicts_and_scores_against_the_gold_batch_come_first():
    """sure and low are INVERT, and have the highest and the lowest score of it."""
    low = item("low", 0.0, 1.0)
    scores = {"sure": 9.0, "low": -4.0, "torn": 2.0}
    rows = shortlist.rank([*ALL, low], scores, n=9)
    assert [(r["id"], r["value"]) for r in rows] == [
        ("thirds", pytest.approx(1.5)),  # no score: in the middle
        ("open", 1.5),
        ("torn", 1.25),  # the only score of its action
        ("low", 1.0),
        ("sure", 0.0),
    ]
    assert [r["id"] for r in shortlist.rank(ALL, {}, n=2)] == ["thirds", "open"]
    three = [item(name, 0.0, 1.0) for name in "abc"]
    listed = shortlist.rank(three, {"a": 0.5, "b": -1.0, "c": 2.0}, n=3)
    assert [(r["id"], r["value"]) for r in listed] == [("b", 1.0), ("a", 0.5), ("c", 0.0)]


def test_the_list_of_a_run_comes_back_as_overrides(tmp_path):
    records.write_jsonl(tmp_path / "triage.jsonl", [t.to_json() for t in ALL])
    impact = [{"id": "torn", "score": s} for s in (0.1, -2.0)] + [{"id": "sure", "score": None}]
    records.write_jsonl(tmp_path / "impact.jsonl", impact)
    command = [sys.executable, "-m", "trace_jax.shortlist", str(tmp_path), "--n=3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    path = tmp_path / "shortlist.jsonl"
    rows = [row for _, row in records.read_jsonl(path)]
    assert {row["id"]: row["score"] for row in rows} == {"torn": -2.0, "open": None, "thirds": None}
    assert overrides.read(path, {"torn", "open", "thirds"}) == {}
    rows[0] |= {"verdict": "PUNISH", "by": "Ada"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = overrides.read(path, {row["id"] for row in rows})
    assert said == {rows[0]["id"]: overrides.Override(action="PUNISH", by="Ada")}


def test_no_triage_is_one_clear_line(tmp_path):
    command = [sys.executable, "-m", "trace_jax.shortlist", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}: no triage.jsonl there; run stage triage first\n"


def test_a_list_of_nothing_is_refused(straight, tmp_path, capsys):
    out = tmp_path / "list.jsonl"
    assert shortlist.main([str(straight[0]), "--n=0", f"--out={out}"]) == 2
    assert "0 must be at least 1" in capsys.readouterr().err and not out.exists()
    assert shortlist.main([str(straight[0]), "--n=2", f"--out={out}"]) == 0
    assert f"2 records: {out}" in capsys.readouterr().out
