"""SIGKILL at random moments: the run ends as one that nobody disturbed.

TRACE_SOAK_KILLS says how many (make soak: 50); the order is drawn from a fixed seed.
"""

import collections
import os
import random
import shutil
import signal
import subprocess
import time

from faults import runs

KILLS = int(os.environ.get("TRACE_SOAK_KILLS", "2"))


def _stage(path) -> str:
    """The stage that a killed run was in."""
    started = sorted((path / ".stages").glob("*.started.json"), key=lambda p: p.stat().st_mtime)
    return started[-1].name.split(".")[0] if started else "before any"


def test_killed_at_random_moments_it_ends_the_same(straight, config, tmp_path, capsys):
    chance, where = random.Random(20261121), collections.Counter()
    begin = time.monotonic()
    assert runs.run(config, tmp_path / "whole").returncode == 0
    whole = time.monotonic() - begin
    runs.assert_same_end(tmp_path / "whole", straight[0])
    number = 0
    while where.total() < KILLS:
        path, number = tmp_path / f"run{number}", number + 1
        while True:
            process = runs.start(config, path)
            try:
                told = process.communicate(timeout=chance.uniform(0.1, 1.0) * whole)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                where[_stage(path)] += 1
            else:
                assert process.returncode == 0, told[1][-3000:]
                break
        runs.assert_same_end(path, straight[0])
        shutil.rmtree(path)
    with capsys.disabled():
        print(f"\n{where.total()} kills, {number} runs to the same end:", dict(where))
