"""SIGTERM to the program: it saves, says so with exit code 75, and goes on to the same end."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import children
import pytest

from trace_jax import metrics, preemption

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("--config.train.total_steps=60", "--config.train.save_every=1000")


def _command(config: Path, path: Path, *flags: str) -> list[str]:
    base = [sys.executable, "-m", "trace_jax.launch", f"--config={config}", f"--workdir={path}"]
    return [*base, *flags]


def _end(process: subprocess.Popen) -> tuple[int, str]:
    ((_, said),) = children.said_by([process])
    return process.returncode, said.strip().splitlines()[-1]


@pytest.mark.fault
def test_training_that_is_told_to_go_goes_on_to_the_same_end(straight, config, tmp_path):
    ends = []
    for name in ("straight", "stopped"):
        path = Path(shutil.copytree(straight[0], tmp_path / name))
        command = _command(config, path, *FLAGS, "--redo", "--stages=train")
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        if name == "stopped":
            rows = path / "metrics.jsonl"
            before = rows.stat().st_mtime_ns
            deadline = time.monotonic() + children.PATIENCE
            while time.monotonic() < deadline:
                fresh = rows.exists() and rows.stat().st_mtime_ns != before
                if fresh and rows.read_text().count("\n") >= 5:
                    break
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            code, said = _end(process)
            assert code == preemption.EXIT_CODE == 75
            assert "preempted (step " in said and "the same command goes on from here" in said
            step = int(said.split("(step ")[1].split()[0])
            assert 5 <= step < 60 and len(metrics.read_metrics(rows)) == step
            process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert _end(process)[0] == 0
        ends.append(metrics.read_metrics(path / "metrics.jsonl"))
    assert ends[0] == ends[1] and len(ends[0]) == 60


@pytest.mark.fault
def test_other_work_stops_at_once(config, tmp_path):
    process = subprocess.Popen(
        _command(config, tmp_path / "run", "--stages=prepare"),
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr.readline().startswith("[prepare]")
    process.send_signal(signal.SIGTERM)
    assert _end(process)[0] == 75


def test_a_signal_waits_for_the_step_in_training_and_for_nothing_elsewhere():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.watched(), preemption.stepping():
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.due(1)
    assert signal.getsignal(signal.SIGTERM) is before
    with preemption.watched():
        assert not preemption.due(1)
        with pytest.raises(preemption.Preempted):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    preemption._State.asked = False
    assert signal.getsignal(signal.SIGTERM) is before
