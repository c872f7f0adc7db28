"""What a run is doing, from its files: finished, at work, interrupted, waiting."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trace_jax import locks, records, stages, status


@pytest.fixture
def run(straight, tmp_path) -> Path:
    """A copy of the finished run in which stage train is half done and what follows waits."""
    path = Path(shutil.copytree(straight[0], tmp_path / "run"))
    for name in ("train", "evaluate", "export", "report"):
        (path / ".stages" / f"{name}.json").unlink()
    records.write_json(path / ".stages" / "train.started.json", {"stage": "train", "inputs": {}})
    rows = [row for _, row in records.read_jsonl(path / "metrics.jsonl")][:2]
    records.write_jsonl(path / "metrics.jsonl", rows)
    began = (path / "metrics.jsonl").stat().st_mtime - 4.0
    records.write_json(path / "checkpoints" / "began.json", {"step": 1, "time": began})
    return path


def _states(found: dict) -> dict[str, str]:
    return {row["stage"]: row["state"] for row in found["stages"]}


def test_a_finished_run(straight, capsys):
    found = status.of(straight[0])
    assert set(_states(found).values()) == {"done"} and found["owner"] is None
    assert found["seconds"] > 1 and found["judge"] is None
    assert status.main([str(straight[0])]) == 0
    assert "nobody is at work; all is done" in capsys.readouterr().out


def test_a_training_at_work_has_a_speed_and_an_end(run, capsys):
    with locks.of(run):
        found = status.of(run)
        assert status.main([str(run)]) == 0
    assert _states(found)["train"] == "running" and _states(found)["evaluate"] == "waiting"
    train = next(row for row in found["stages"] if row["stage"] == "train")
    assert (train["step"], train["total_steps"]) == (2, 4)
    assert train["steps_per_second"] == pytest.approx(1 / 4)  # of this try: step 2 alone
    assert train["seconds_left"] == pytest.approx(8)
    said = capsys.readouterr().out
    assert "2/4" in said and "at work: process" in said
    assert _states(status.of(run))["train"] == "interrupted"


def test_json_alone_without_jax(run, tmp_path):
    (tmp_path / "jax.py").write_text("raise SystemExit('jax was imported')\n")
    done = subprocess.run(
        [sys.executable, "-m", "trace_jax.status", str(run), "--json"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[1],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )  # fmt: skip
    assert [row["stage"] for row in json.loads(done.stdout)["stages"]] == list(stages.NAMES)


def test_no_run_is_one_line(tmp_path, capsys):
    assert status.main([str(tmp_path)]) == 2
    assert "no run there" in capsys.readouterr().err
