"""Two and four real processes on loopback do what one does, from training to export."""

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import children
import numpy as np
import pytest
import tiny
from flax import nnx

from trace_jax import models, preemption, processes
from trace_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("process_worker.py")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run(
    count: int, folder: Path | str, *more: str, program=(str(WORKER),), code=0, **variables: str
) -> list[str]:
    """Runs `count` processes of one device each, which end with `code`; their stderr."""
    if isinstance(folder, Path):
        folder.mkdir(exist_ok=True)
    environment = os.environ | {
        "XLA_FLAGS": children.ONE_DEVICE,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        **variables,
    }
    where = f"localhost:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, *program, where, str(count), str(i), str(folder), *more],
            env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(count)
    ]  # fmt: skip
    said = [err for _, err in children.said_by(started)]
    assert [process.returncode for process in started] == [code] * count, "\n".join(said)
    return said


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def weights(folder: Path) -> list[np.ndarray]:
    return tiny.leaves(nnx.state(models.load(folder / "model")))


@pytest.fixture(scope="module")
def straight_run(config, tmp_path_factory) -> Path:
    """A finished run of one process."""
    path = tmp_path_factory.mktemp("whole") / "run"
    command = [sys.executable, "-m", "trace_jax.launch", f"--config={config}", f"--workdir={path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Callable[[int], Path]:
    """Finished runs of as many processes."""

    @functools.cache
    def finished(count: int) -> Path:
        folder = tmp_path_factory.mktemp(f"processes-{count}")
        run(count, folder)
        return folder

    return finished


COUNTS = [2, pytest.param(4, marks=pytest.mark.soak)]


@pytest.mark.parametrize("count", COUNTS)
def test_several_processes_do_what_one_does(straight, count):
    one, several = straight(1), straight(count)
    assert np.load(several / "devices.npy").tolist() == [1, count, 1]
    assert len(rows(several)) == len(rows(one)) == 6
    for a, b in zip(rows(one)[:5], rows(several)[:5], strict=True):
        for key in a:
            rounding = 4e-6 if "logratio" in key else 1e-7  # see test_sharding.py
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=rounding), (key, a["step"])
    scores = np.load(one / "scores.npy")
    error = np.abs(np.load(several / "scores.npy") - scores).max()
    assert error <= 1e-4 * np.sqrt(np.mean(scores**2))
    for a, b in zip(weights(one), weights(several), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", COUNTS)
def test_every_process_holds_a_part(straight, count):
    whole = np.load(straight(1) / "local-0.npy").sum()
    for index in range(count):
        assert np.load(straight(count) / f"local-{index}.npy").sum() < 1.2 / count * whole


def test_stopped_and_resumed_equals_straight_bit_for_bit(straight, tmp_path):
    said = run(2, tmp_path / "resumed", "3", code=preemption.EXIT_CODE)
    assert [text.splitlines()[-1] for text in said] == ["step 4 is saved"] * 2
    assert len(rows(tmp_path / "resumed")) == 4
    assert not (tmp_path / "resumed" / "model").exists()
    shutil.copytree(tmp_path / "resumed", tmp_path / "alone")
    run(2, tmp_path / "resumed")
    assert rows(tmp_path / "resumed") == rows(straight(2))
    for a, b in zip(weights(straight(2)), weights(tmp_path / "resumed"), strict=True):
        np.testing.assert_array_equal(a, b)
    run(1, tmp_path / "alone")  # what two stopped, one goes on with
    assert rows(tmp_path / "alone")[:4] == rows(straight(2))[:4]
    for a, b in zip(weights(straight(2)), weights(tmp_path / "alone"), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.soak
def test_stopped_and_resumed_without_a_common_disk_as_well(straight, storage, tmp_path):
    url, cache = "gs://bucket/runs/two", tmp_path / "cache"
    here = storage | {"TRACE_JAX_CACHE": str(cache)}
    run(2, url, "3", code=preemption.EXIT_CODE, **here)
    shutil.rmtree(cache)
    run(2, url, **here)
    first, second = (next((cache / "workdirs").glob(f"two-*/p{index}")) for index in range(2))
    assert rows(first) == rows(straight(2))
    for name in ("model/model.safetensors", "local-0.npy", "local-1.npy", "scores.npy"):
        whole = (straight(2) / name).read_bytes()
        assert (first / name).read_bytes() == (second / name).read_bytes() == whole, name


def test_the_whole_program_in_two_processes(config, straight_run, tmp_path):
    """The first process writes every artefact and prints the tables; the second says nothing."""
    workdir, where = tmp_path / "run", f"localhost:{free_port()}"
    command = [sys.executable, "-m", "trace_jax.launch", f"--config={config}"]
    command += [f"--workdir={workdir}", "--config.mesh.fsdp=-1", f"--coordinator={where}"]
    environment = os.environ | {"XLA_FLAGS": children.ONE_DEVICE}
    started = [
        subprocess.Popen(
            [*command, "--processes=2", f"--process={index}"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = children.said_by(started)
    assert [process.returncode for process in started] == [0, 0], outputs
    alone = {p.name for p in straight_run.iterdir()}
    assert {p.name for p in workdir.iterdir()} == alone
    assert "report.html" in outputs[0][0] and "report.html" not in outputs[1][0]
    for name in ("records.jsonl", "triage.jsonl", "prompts.jsonl"):
        assert (workdir / name).read_bytes() == (straight_run / name).read_bytes()


def test_flags_of_processes_go_together():
    with pytest.raises(InputError, match="give all three"):
        processes.start("localhost:1234", None, 0, auto=False)
    with pytest.raises(InputError, match=r"--process=2 must lie in 0\.\.1"):
        processes.start("localhost:1234", 2, 2, auto=False)


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":1234", "host:x", "host:70000"])
def test_a_coordinator_without_a_port_is_one_line(address):
    with pytest.raises(InputError, match=f"^--coordinator={address}: give HOST:PORT of process 0"):
        processes.start(address, 2, 0, auto=False)
