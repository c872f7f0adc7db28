"""Several processes of which some die, or stand still."""

import os
import signal
import socket
import subprocess
import time

import children
import pytest

from faults import runs

ALONE = {"XLA_FLAGS": children.ONE_DEVICE}


def _port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _start(config, path, count: int, *more: str) -> list[subprocess.Popen]:
    where = f"--coordinator=localhost:{_port()}"
    return [
        runs.start(
            config, path, "--config.mesh.fsdp=-1", where, f"--processes={count}",
            f"--process={index}", *more, **ALONE,
        )
        for index in range(count)
    ]  # fmt: skip


def _until(condition, seconds: float = children.PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def _end(processes: list[subprocess.Popen]) -> list[str]:
    return [err for _, err in children.said_by(processes)]


def test_a_process_that_stands_still_is_named_by_the_other(config, tmp_path):
    path = tmp_path / "run"
    both = _start(config, path, 2, "--config.tracking.stuck_after=6", "--stages=prepare,align")
    try:
        _until((path / ".heartbeats" / "1.json").exists)
        os.kill(both[1].pid, signal.SIGSTOP)
        time.sleep(45)
    finally:
        for process in both:
            process.kill()
    said = _end(both)
    assert "warning: process 0: no progress for" in said[0], said[0]
    assert "process 1 on" in said[0], said[0]


@pytest.mark.soak
def test_two_of_four_processes_killed(config, tmp_path):
    """The other two do not wait for ever; the same command goes on to the same end."""
    straight, path = tmp_path / "straight", tmp_path / "run"
    whole = _start(config, straight, 4)
    said = _end(whole)
    assert [process.returncode for process in whole] == [0] * 4, said
    four = _start(config, path, 4)
    _until((path / ".stages" / "train.started.json").exists)
    for process in four[1:3]:
        os.kill(process.pid, signal.SIGKILL)
    _end(four)
    assert all(process.returncode for process in four)
    again = _start(config, path, 4)
    said = _end(again)
    assert [process.returncode for process in again] == [0] * 4, said
    runs.assert_same_end(path, straight)
