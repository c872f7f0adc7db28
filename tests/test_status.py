"""What a run is doing, from its files: finished, at work, interrupted, waiting."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import children
import pytest

from trace_jax import heartbeat, locks, metrics, records, stages, status, workdir


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


def _sign(run: Path, doing: str, work: object, process: int = 0) -> None:
    (run / heartbeat.FOLDER).mkdir(exist_ok=True)
    now = time.time()
    told = {"process": process, "host": "h", "pid": 1, "doing": doing, "since": now, "time": now}
    records.write_json(run / heartbeat.FOLDER / f"{process}.json", told | {"work": work})


def _running(run: Path, stage: str) -> None:
    for kind in ("started.json", "json"):
        (run / ".stages" / f"train.{kind}").unlink(missing_ok=True)
    (run / ".stages" / f"{stage}.json").unlink(missing_ok=True)
    records.write_json(run / ".stages" / f"{stage}.started.json", {"stage": stage, "inputs": {}})


@pytest.mark.parametrize("stage", stages.NAMES)
def test_every_stage_that_counts_has_a_speed_and_an_end(run, capsys, stage):
    _running(run, stage)
    work = {"what": "verdicts [red]", "first": 20, "done": 50, "total": 80, "seconds": 15.0}
    _sign(run, f"stage {stage}, verdicts [red] 50/80", work)
    _sign(run, f"stage {stage}, verdicts", work | {"done": 1}, process=1)
    with locks.of(run):
        found = {row["stage"]: row for row in status.of(run)["stages"]}
        assert status.main([str(run)]) == 0
    row = found[stage]
    assert row["state"] == "running" and row["what"] == "verdicts [red]"
    assert (row["done"], row["total"], row["per_second"]) == (50, 80, 2.0)  # of this try
    assert row["seconds_left"] == 15.0
    assert all("per_second" not in other for name, other in found.items() if name != stage)
    said = capsys.readouterr().out
    assert all(text in said for text in ("50/80", "2.00", "15 s", "verdicts [red]"))
    assert "per_second" not in next(r for r in status.of(run)["stages"] if r["stage"] == stage)


@pytest.mark.parametrize(
    ("doing", "work"),
    [
        ("stage impact, impact scores 5/8", {"what": "impact scores"}),  # another stage's
        ("stage train, train checkpoints 3/4", {"what": "train checkpoints"}),
        ("stage train", None),
    ],
)
def test_a_training_goes_by_its_metrics(run, doing, work):
    counts = {"first": 0, "done": 3, "total": 4, "seconds": 0.5}
    _sign(run, doing, work and work | counts)
    with locks.of(run):
        train = next(row for row in status.of(run)["stages"] if row["stage"] == "train")
    assert train["steps_per_second"] == pytest.approx(1 / 4) and "done" not in train


def test_work_without_a_total_or_a_first_item_has_no_end(run):
    _running(run, "triage")
    work = {"what": "reading", "first": 7, "done": 7, "total": None, "seconds": 0.0}
    with locks.of(run):
        for done, keys in ((7, set()), (9, {"per_second", "seconds_left"})):
            _sign(run, "stage triage, reading", work | {"done": done, "seconds": 4.0})
            row = next(row for row in status.of(run)["stages"] if row["stage"] == "triage")
            assert row.keys() - {"stage", "state", "seconds", "what", "done", "total"} == keys
    assert row["seconds_left"] is None and row["per_second"] == 0.5


def test_a_bar_of_a_run_reaches_status(tmp_path):
    """From `metrics.progress`, through the sign of life."""
    records.write_json(tmp_path / "config.json", {})
    workdir.Workdir(tmp_path).start("triage", {})
    beating = heartbeat.beating(tmp_path, stuck_after=0, interval=0.01)
    with locks.of(tmp_path), beating, heartbeat.doing("stage triage"):
        with metrics.progress(8, "triage by rules", 2) as bar:
            bar.advance(3)
            with heartbeat.doing(heartbeat.WAITING):  # what is not counted hides nothing
                end = time.monotonic() + children.PATIENCE
                while "per_second" not in (row := status.of(tmp_path)["stages"][2]):
                    assert time.monotonic() < end
                    time.sleep(0.01)
    assert (row["what"], row["done"], row["total"]) == ("triage by rules", 5, 8)
    assert row["seconds_left"] == pytest.approx(3 / row["per_second"])


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
