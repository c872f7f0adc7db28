"""SIGKILL in every stage and at random moments: the run ends as one that nobody disturbed.

TRACE_SOAK_KILLS says how many (make soak: 50); the order is drawn from a fixed seed. With enough
of them the first are one in every stage, since at random the long stages get nearly all.
"""

import collections
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import children

from faults import runs
from trace_jax import stages

KILLS = int(os.environ.get("TRACE_SOAK_KILLS", "2"))
_COMPILED = 0.5  # of a first run's seconds are left to a run of programs that are compiled
_ROUNDS = 5  # of kills in those stages that were over too soon to be hit


def _mark(path: Path, stage: str, kind: str = "json") -> Path:
    return path / ".stages" / f"{stage}.{kind}"


def _stage(path: Path) -> str:
    """The stage that a killed run was in."""
    begun = [s for s in stages.NAMES if _mark(path, s, "started.json").exists()]
    at_work = [s for s in begun if not _mark(path, s).exists()]
    return at_work[-1] if at_work else "between two"


def _seconds(path: Path) -> dict[str, float]:
    """Of every stage of a finished run."""
    return {s: json.loads(_mark(path, s).read_text())["seconds"] for s in stages.NAMES}


def _kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _kill_in(config: Path, path: Path, stage: str, delay: float) -> bool:
    """Starts or continues the run and kills it `delay` s after `stage` began, at its latest end.

    Returns whether there was anything left to kill.
    """
    process = runs.start(config, path)
    latest = time.monotonic() + children.PATIENCE
    while not _mark(path, stage, "started.json").exists() and process.poll() is None:
        assert time.monotonic() < latest, f"{stage} never began"
        time.sleep(0.002)
    end = time.monotonic() + delay
    while time.monotonic() < end and not _mark(path, stage).exists():
        time.sleep(0.002)
    if process.poll() is None:
        _kill(process)
        return True
    told = process.communicate()
    assert process.returncode == 0, told[1][-3000:]
    return False


def _go_on_to_the_end(config: Path, path: Path, straight: Path) -> None:
    done = runs.run(config, path)
    assert done.returncode == 0, done.stderr[-3000:]
    runs.assert_same_end(path, straight)
    shutil.rmtree(path)


def _in_every_stage(
    config: Path, folder: Path, straight: Path, chance: random.Random
) -> collections.Counter:
    """Kills in each stage, again in those that were missed; how many there were in which."""
    seconds = _seconds(straight)
    where = collections.Counter()
    for number in range(_ROUNDS):
        missed = [stage for stage in stages.NAMES if not where[stage]]
        path = folder / f"every{number}"
        for stage in missed:
            delay = chance.uniform(0, 0.5 ** (number + 1)) * seconds[stage]
            if _kill_in(config, path, stage, delay):
                where[_stage(path)] += 1
        if missed:
            _go_on_to_the_end(config, path, straight)
    assert all(where[stage] for stage in stages.NAMES), f"not killed in every stage: {where}"
    return where


def _at_random(
    config: Path, folder: Path, straight: Path, chance: random.Random, kills: int, whole: float
) -> collections.Counter:
    """Kills at random moments of as many runs as it takes; whole: seconds of a run."""
    where, number = collections.Counter(), 0
    while where.total() < kills:
        path, number = folder / f"run{number}", number + 1
        while where.total() < kills:
            process = runs.start(config, path)
            try:
                told = process.communicate(timeout=chance.uniform(0.1, 1.0) * whole)
            except subprocess.TimeoutExpired:
                _kill(process)
                where[_stage(path)] += 1
            else:
                assert process.returncode == 0, told[1][-3000:]
                break
        _go_on_to_the_end(config, path, straight)
    return where


def test_killed_anywhere_it_ends_the_same(straight, config, tmp_path, capsys):
    chance, where = random.Random(20261121), collections.Counter()
    whole = _COMPILED * sum(_seconds(straight[0]).values())
    if KILLS > len(stages.NAMES):
        where += _in_every_stage(config, tmp_path, straight[0], chance)
        begin = time.monotonic()
        assert runs.run(config, tmp_path / "whole").returncode == 0
        whole = time.monotonic() - begin
        runs.assert_same_end(tmp_path / "whole", straight[0])
    left = KILLS - where.total()
    where += _at_random(config, tmp_path, straight[0], chance, left, whole)
    with capsys.disabled():
        print(f"\n{where.total()} kills, all to the same end:", dict(where))
