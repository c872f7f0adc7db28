"""A workdir that is, or turns, read-only: one line, exit code 2, the rest once it is writable."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import runs
from trace_jax import launch, metrics, stages, workdir

# In CI one that writes as it goes and one that writes once; make soak: all.
CHOSEN = stages.NAMES if "TRACE_SOAK" in os.environ else ("triage", "report")


def _mount(*arguments: str | Path) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")


@pytest.fixture
def run(straight, small_disk) -> Path:
    """A copy of the finished run on a disk of its own."""
    return Path(shutil.copytree(straight[0], small_disk(64 * 1024) / "run"))


@contextlib.contextmanager
def _turning_read_only(path: Path) -> Iterator:
    """Gives a function that makes `path` read-only for every file opened from then on.

    By a mount on top: a file system itself refuses to change while a file (the lock) is open.
    """
    mounted = []

    def turn() -> None:
        if not mounted:
            mounted.append(path)
            _mount("--bind", path, path)
            _mount("-o", "remount,bind,ro", path)

    try:
        yield turn
    finally:
        for folder in mounted:
            subprocess.run(["umount", "-l", folder], check=True)


def _refused(capfd, *flags: str) -> str:
    capfd.readouterr()
    assert launch.main(["launch", *flags]) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said, said[-3000:]
    (line,) = [t for t in said.splitlines() if t.startswith("error:")]
    return line


@pytest.mark.parametrize("name", CHOSEN)
def test_read_only_before_and_during_a_stage(run, straight, config, capfd, monkeypatch, name):
    stage = next(stage for stage in stages.STAGES if stage.name == name)
    workdir.Workdir(run).forget(name, stage.artefacts)
    flags = (f"--config={config}", f"--workdir={run}", f"--stages={name}")
    _mount("-o", "remount,ro", run.parent)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    line = _refused(capfd, *flags)
    assert "Read-only file system" in line and "--workdir" in line
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    _mount("-o", "remount,rw", run.parent)
    start = workdir.Workdir.start
    with _turning_read_only(run) as turn, monkeypatch.context() as patch:
        patch.setattr(workdir.Workdir, "start", lambda *given: (start(*given), turn()))
        line = _refused(capfd, *flags)
    assert "read-only" in line.lower()
    assert launch.main(["launch", *flags]) == 0, capfd.readouterr().err[-2000:]
    runs.assert_same_end(run, straight[0])


def test_read_only_in_the_middle_of_a_training(run, straight, config, capfd, monkeypatch):
    """What the checkpoint's own thread meets is told as well; the one before is the last good."""
    stage = next(stage for stage in stages.STAGES if stage.name == "train")
    workdir.Workdir(run).forget("train", stage.artefacts)
    flags = (f"--config={config}", f"--workdir={run}", "--stages=train")
    write = metrics.MetricsWriter.write
    with _turning_read_only(run) as turn, monkeypatch.context() as patch:

        def turned(writer, step: int, values) -> None:
            write(writer, step, values)
            if step == 3:
                turn()

        patch.setattr(metrics.MetricsWriter, "write", turned)
        line = _refused(capfd, *flags)
    # The thread of step 2 finds it; or where that was quick, who writes the checksums behind it.
    assert "checkpoint of step 2" in line or "checkpoints/checksums" in line
    assert "read-only" in line.lower() and "and the same command goes on" in line
    assert launch.main(["launch", *flags]) == 0, capfd.readouterr().err[-2000:]
    runs.assert_same_end(run, straight[0])
