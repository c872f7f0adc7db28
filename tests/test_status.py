"""What a run is doing, from its files: finished, at work, interrupted, waiting."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import children
import pytest

from trace_jax import compare, heartbeat, locks, metrics, records, stages, status, workdir


@pytest.fixture
def run(straight, tmp_path) -> Path:
    """A copy of the finished run in which stage train has a step to go and what follows waits."""
    path = Path(shutil.copytree(straight[0], tmp_path / "run"))
    for name in ("train", "evaluate", "export", "report"):
        (path / ".stages" / f"{name}.json").unlink()
    records.write_json(path / ".stages" / "train.started.json", {"stage": "train", "inputs": {}})
    rows = [row for _, row in records.read_jsonl(path / "metrics.jsonl")][:3]
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
    assert (train["step"], train["total_steps"]) == (3, 4)
    assert train["steps_per_second"] == pytest.approx(2 / 4)  # of this try: steps 2 and 3
    assert train["seconds_left"] == pytest.approx(2)
    said = capsys.readouterr().out
    assert "3/4" in said and "at work: process" in said
    assert _states(status.of(run))["train"] == "interrupted"


def test_the_first_step_of_a_training_compiles_and_says_nothing_of_the_others(run):
    rows = [row for _, row in records.read_jsonl(run / "metrics.jsonl")][:2]
    records.write_jsonl(run / "metrics.jsonl", rows)  # of this try: step 2 alone
    with locks.of(run):
        train = next(row for row in status.of(run)["stages"] if row["stage"] == "train")
    assert train["step"] == 2 and not {"steps_per_second", "seconds_left"} & train.keys()


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
    ("doing", "work", "speed"),
    [
        ("stage impact, impact scores 5/8", {"what": "impact scores"}, 2 / 4),  # another stage's
        ("stage train", None, 2 / 4),
        # Its own sign of life leaves out the first step, which compiles.
        ("stage train, train checkpoints 3/4", {"what": "train checkpoints"}, 2 / 0.5),
        ("stage train, train checkpoints 3/4", {"what": "train checkpoints", "done": 1}, 2 / 4),
    ],
)
def test_a_training_goes_by_its_metrics(run, doing, work, speed):
    counts = {"first": 1, "done": 3, "total": 4, "seconds": 0.5}
    _sign(run, doing, work and counts | work)
    with locks.of(run):
        train = next(row for row in status.of(run)["stages"] if row["stage"] == "train")
    assert train["step"] == 3 and "done" not in train
    assert train["steps_per_second"] == pytest.approx(speed)
    assert train["seconds_left"] == pytest.approx(1 / speed)


def test_work_without_a_total_or_a_second_item_has_no_end(run):
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
            bar.advance(1)
            bar.advance(2)
            with heartbeat.doing(heartbeat.WAITING):  # what is not counted hides nothing
                end = time.monotonic() + children.PATIENCE
                while "per_second" not in (row := status.of(tmp_path)["stages"][2]):
                    assert time.monotonic() < end
                    time.sleep(0.01)
    assert (row["what"], row["done"], row["total"]) == ("triage by rules", 5, 8)
    assert row["seconds_left"] == pytest.approx(3 / row["per_second"])


def _marked(path: Path, stage: str, seconds: float) -> None:
    run = workdir.Workdir(path)
    run.start(stage, {})
    run.finish(stage, {}, {}, seconds, {})


@pytest.fixture
def comparison(tmp_path) -> Path:
    """Prepared alone; of three runs one is done, one trains, one waits; another is an old one."""
    for name in compare.SHARED:
        _marked(tmp_path, name, 10.0)
    records.write_json(tmp_path / "config.json", {})
    folder = tmp_path / compare.FOLDER
    for name in ("dpo-seed0", "trace+triage.noise=0.1-seed0"):
        for stage in (*(compare.CHANGEABLE if "triage" in name else ()), *compare.OWN):
            _marked(folder / name, stage, 2.0)
    _marked(folder / "trace-seed0", "impact", 2.0)
    workdir.Workdir(folder / "trace-seed0").start("train", {})
    records.write_json(folder / compare.PLAN, {"runs": ["dpo-seed0", "trace-seed0", "sft-seed0"]})
    return tmp_path


def _shown(path: Path, capsys) -> str:
    assert status.main([str(path)]) == 0
    return capsys.readouterr().out


def test_a_comparison_at_work(comparison, capsys):
    run = comparison / compare.FOLDER / "trace-seed0"
    records.write_json(run / "config.json", {"train": {"total_steps": 9}})
    records.write_jsonl(run / "metrics.jsonl", [{"step": step} for step in (1, 2, 3)])
    began = (run / "metrics.jsonl").stat().st_mtime - 6.0
    (run / "checkpoints").mkdir()
    records.write_json(run / "checkpoints" / "began.json", {"step": 0, "time": began})
    with locks.of(comparison / compare.FOLDER), locks.of(run):
        found, said = status.of(comparison), _shown(comparison, capsys)
    told = found["comparison"]
    assert (told["running"], told["done"], told["total"]) == (True, 1, 3)
    assert found["running"] is False and told["owner"]["process"] == os.getpid()
    states = {row["run"]: row["state"] for row in told["runs"]}
    assert states == {
        "dpo-seed0": "done", "trace-seed0": "running", "sft-seed0": "waiting",
        "trace+triage.noise=0.1-seed0": "done",
    }  # fmt: skip
    running = told["runs"][1]
    assert (running["stage"], running["step"], running["total_steps"]) == ("train", 3, 9)
    assert running["seconds_left"] == pytest.approx(12)
    assert "nobody" not in said and "a comparison is at work: process" in said
    assert "comparison: 1 of 3 runs done" in said and "3/9" in said and "12 s" in said


def test_a_comparison_that_stopped_says_what_is_left(comparison, capsys):
    said = _shown(comparison, capsys)
    assert "nobody is at work; next: 2 of the comparison's runs" in said and "interrupted" in said
    for name, stage in (("trace", "train"), ("trace", "evaluate"), ("sft", "impact"),
                        ("sft", "train"), ("sft", "evaluate")):  # fmt: skip
        _marked(comparison / compare.FOLDER / f"{name}-seed0", stage, 1.0)
    said = _shown(comparison, capsys)
    assert "nobody is at work; the comparison is done" in said and "3 of 3 runs done" in said
    _marked(comparison, "impact", 1.0)
    assert "nobody is at work; next: train" in _shown(comparison, capsys)


@pytest.mark.parametrize(
    ("name", "own"),
    [("dpo-seed0", 3), ("trace+triage.noise=0.1-seed0", 5)],
)
def test_a_run_of_a_comparison_shares_stages(comparison, capsys, monkeypatch, name, own):
    path = comparison / compare.FOLDER / name
    found = status.of(path)
    assert [row["stage"] for row in found["stages"]] == [*compare.SHARED, *compare.OWN]
    assert set(_states(found).values()) == {"done"} and found["seconds"] == 2.0 * own
    assert sum("shared" in row for row in found["stages"]) == 8 - own
    monkeypatch.chdir(path)
    assert "nobody is at work; all is done" in _shown(Path("."), capsys)


def test_two_comparisons_in_one_workdir(comparison, capsys):
    with contextlib.ExitStack() as both:
        for runs in (["dpo-seed0"], ["sft-seed0"]):
            both.enter_context(compare._told(comparison, runs))
        told = status.of(comparison)["comparison"]
    assert told["running"] and (told["done"], told["total"]) == (1, 1)
    assert "status will not tell of this comparison: " in capsys.readouterr().err


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
