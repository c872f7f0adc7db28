"""SIGTERM to the program: it saves, says so with exit code 75, and goes on to the same end."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import children
import pytest

from trace_jax import metrics, preemption

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("preemption_worker.py")
FLAGS = ("--config.train.total_steps=60", "--config.train.save_every=1000")
ALONE = {"XLA_FLAGS": children.ONE_DEVICE, "PYTHONPATH": str(ROOT)}


def _start(program: list[str], **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *program], cwd=ROOT, env=os.environ | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def _command(config: Path, path: Path, *flags: str) -> list[str]:
    return ["-m", "trace_jax.launch", f"--config={config}", f"--workdir={path}", *flags]


def _port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _pair(config: Path, path: Path, *flags: str) -> list[subprocess.Popen]:
    where = f"--coordinator=localhost:{_port()}"
    command = _command(config, path, *flags, "--config.mesh.fsdp=-1", where, "--processes=2")
    return [_start([*command, f"--process={index}"], **ALONE) for index in range(2)]


def _workers(folder: Path) -> list[subprocess.Popen]:
    more = [f"localhost:{_port()}", "2"]
    return [_start([str(WORKER), *more, str(i), str(folder)], **ALONE) for i in range(2)]


def _end(process: subprocess.Popen) -> tuple[int, str]:
    ((_, said),) = children.said_by([process])
    return process.returncode, (said.strip().splitlines() or [""])[-1]


def _until(condition: Callable[[], bool], processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + children.PATIENCE
    while not condition():
        assert all(p.poll() is None for p in processes), children.said_by(processes)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _trains(path: Path, processes: list[subprocess.Popen], steps: int = 5) -> None:
    """Returns once that many steps of this try are written."""
    rows = path / "metrics.jsonl"
    before = rows.stat().st_mtime_ns if rows.exists() else None

    def written() -> bool:
        fresh = rows.exists() and rows.stat().st_mtime_ns != before
        return fresh and rows.read_text().count("\n") >= steps

    _until(written, processes)


@pytest.mark.fault
def test_training_that_is_told_to_go_goes_on_to_the_same_end(straight, config, tmp_path):
    ends = []
    for name in ("straight", "stopped"):
        path = Path(shutil.copytree(straight[0], tmp_path / name))
        command = _command(config, path, *FLAGS, "--redo", "--stages=train")
        process = _start(command)
        if name == "stopped":
            _trains(path, [process])
            process.send_signal(signal.SIGTERM)
            code, said = _end(process)
            assert code == preemption.EXIT_CODE == 75
            assert "preempted (step " in said and "the same command goes on from here" in said
            step = int(said.split("(step ")[1].split()[0])
            assert 5 <= step < 60 and len(metrics.read_metrics(path / "metrics.jsonl")) == step
            process = _start(command)
        assert _end(process)[0] == 0
        ends.append(metrics.read_metrics(path / "metrics.jsonl"))
    assert ends[0] == ends[1] and len(ends[0]) == 60


@pytest.mark.fault
@pytest.mark.soak
def test_two_processes_of_which_one_is_told_go_on_to_the_same_end(straight, config, tmp_path):
    """In stage impact, and in training."""
    ends, flags = [], (*FLAGS, "--redo", "--stages=impact,train")
    for name in ("straight", "stopped"):
        path = Path(shutil.copytree(straight[0], tmp_path / name))
        for stage in ("impact", "train"):  # what one process trained, two cannot go on with
            (path / ".stages" / f"{stage}.json").unlink()
        shutil.rmtree(path / "checkpoints")
        both = _pair(config, path, *flags)
        if name == "stopped":
            assert "[impact]" in both[0].stderr.readline()
            both[1].send_signal(signal.SIGTERM)
            for code, said in map(_end, both):
                assert code == 75 and said.startswith("preempted (between two steps of work)")
            both = _pair(config, path, *flags)
            _trains(path, both)
            for process in both:
                process.send_signal(signal.SIGTERM)
            (code, said), other = map(_end, both)
            assert code == 75 and "preempted (step " in said
            assert other == (code, said)
            both = _pair(config, path, *flags)
        assert [code for code, _ in map(_end, both)] == [0, 0]
        rows, scores = metrics.read_metrics(path / "metrics.jsonl"), path / "impact.jsonl"
        ends.append((rows, scores.read_bytes()))
    assert ends[0] == ends[1] and len(ends[0][0]) == 60


def test_a_later_training_of_fewer_steps_stops_at_the_same_step(tmp_path):
    both = _workers(tmp_path)
    _until((tmp_path / "1-1").exists, both)
    both[1].send_signal(signal.SIGTERM)
    said = [out.strip().splitlines()[-1] for out, _ in children.said_by(both)]
    assert [process.returncode for process in both] == [75, 75], said
    assert said[0] == said[1] and said[0].startswith("training 1 step ")


@pytest.mark.fault
@pytest.mark.parametrize("told", [0, 1])
def test_one_that_waits_for_the_others_work_leaves_as_well(tmp_path, told):
    both = _workers(tmp_path)
    _until((tmp_path / "work-1").exists, both)
    both[told].send_signal(signal.SIGTERM)
    said = children.said_by(both)
    assert [process.returncode for process in both] == [75, 75], said
    assert "between two steps of work" in said[0][0]


@pytest.mark.fault
def test_one_that_cannot_go_on_takes_the_others_along_with_its_code(tmp_path):
    both = _workers(tmp_path)
    _until((tmp_path / "work-1").exists, both)
    (tmp_path / "fail").touch()
    said = children.said_by(both)
    assert [process.returncode for process in both] == [2, 2], said
    assert "process 0 ended with 2" in said[1][1]


@pytest.mark.fault
def test_other_work_stops_at_once(config, tmp_path):
    process = _start(_command(config, tmp_path / "run", "--stages=prepare"))
    assert process.stderr.readline().startswith("[prepare]")
    process.send_signal(signal.SIGTERM)
    assert _end(process)[0] == 75


def test_a_signal_waits_for_the_step_in_training_and_for_nothing_elsewhere():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.watched(), preemption.stepping():
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.due()
        os.kill(os.getpid(), signal.SIGTERM)  # again, while the step is saved
    assert signal.getsignal(signal.SIGTERM) is before
    with preemption.watched():
        with preemption.stepping():
            assert not preemption.due()
        with pytest.raises(preemption.Preempted):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before
    with preemption.stepping():  # the next run of this process was told nothing
        assert not preemption.due()


def test_a_signal_after_the_last_step_stops_behind_the_training():
    with preemption.watched(), pytest.raises(preemption.Preempted):
        with preemption.stepping():
            assert not preemption.due()
            os.kill(os.getpid(), signal.SIGTERM)
            last = True
        pytest.fail("the training's end was passed")
    assert last
