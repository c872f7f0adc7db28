"""A clock that jumps, and memory that ends."""

import json
import random
import resource
import subprocess
import time

import children
import pytest

from faults import runs
from trace_jax import launch


def test_a_clock_that_jumps_by_days_changes_nothing(straight, config, tmp_path, monkeypatch, capfd):
    """Forwards and back. A jump forwards in the middle of a save looks like a disk that hangs."""
    chance, real, offset = random.Random(0), time.time, [0.0]

    def jumping() -> float:
        if chance.random() < 0.01:
            offset[0] = chance.uniform(-3, 3) * 86400
        return real() + offset[0]

    monkeypatch.setattr(time, "time", jumping)
    command = ["launch", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    for _ in range(20):
        if launch.main(command) == 0:
            break
        assert "the same command goes on" in capfd.readouterr().err
    runs.assert_same_end(tmp_path / "run", straight[0])


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_DATA"), reason="needs a limit of memory")
def test_memory_that_ends_while_data_is_read_is_one_line(straight, config, tmp_path):
    path, base = tmp_path / "pairs.jsonl", straight[0] / "base"

    def write(records: int) -> None:
        with open(path, "w") as stream:
            for i in range(records):
                row = {"prompt": f"{i} " + "p" * 500, "chosen": "a" * 3000, "rejected": "b" * 3000}
                stream.write(json.dumps(row) + "\n")

    def prepare(name: str, limit: int | None) -> subprocess.CompletedProcess:
        flags = ["--stages=prepare", "--config.data.source=file", f"--config.data.path={path}",
                 f"--config.model.path={base}"]  # fmt: skip
        command = runs.command(config, tmp_path / name, *flags)
        shell = f'ulimit -d {limit}; exec "$@"' if limit else 'exec "$@"'
        return subprocess.run(
            ["bash", "-c", shell, "bash", *command], cwd=runs.ROOT, capture_output=True, text=True,
            check=False, timeout=children.PATIENCE,
        )  # fmt: skip

    write(100)
    kib = 600_000
    while prepare("small", kib).returncode:  # what the libraries take
        kib += 200_000
        assert kib < 20_000_000
    write(80_000)
    line = runs.error_of(prepare("large", kib))
    assert "out of memory" in line
