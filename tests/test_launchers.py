"""Scripts that start jobs elsewhere: what they would do, and that a shell would understand them."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import scaling

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
SCRIPTS = ("tpu_pod.sh", "tpu_worker.sh", "gke.sh", "gpu.sh", "slurm.sbatch")


def _run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        capture_output=True, text=True, cwd=LAUNCH.parent, env=os.environ | variables,
    )  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_nothing_to_say(script):
    places = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    checker = shutil.which("shellcheck", path=places)
    if checker is None:
        assert subprocess.run(["bash", "-n", str(LAUNCH / script)]).returncode == 0
        pytest.skip("needs shellcheck; bash itself understands the script")
    done = subprocess.run([checker, str(LAUNCH / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_dry_run_of_a_pod_starts_the_program_and_shows_no_secret():
    secret = "very-secret-key"
    own = {"PROJECT": "p", "NAME": "mine", "QUEUED": "true", "SPOT": "true", "WORKDIR": "/mnt/r"}
    own |= {"CONFIG": "configs/llama8b.py:full", "GEMINI_API_KEY": secret}
    done = _run("tpu_pod.sh", "run", "--dry-run", **own)
    assert done.returncode == 0, done.stderr
    said = done.stdout.replace("\\ ", " ")
    assert "queued-resources create mine-queue" in said and "--spot" in said
    assert (
        "trace_jax.launch --config=configs/llama8b.py:full --workdir=/mnt/r --distributed" in said
    )
    assert "mine:/mnt/r runs/mine" in said and secret not in done.stdout + done.stderr


def test_a_pod_that_overlaps_has_the_flags_that_were_measured():
    job = shlex.split(_run("tpu_pod.sh", "run", "--dry-run", PROJECT="p", OVERLAP="true").stdout)
    (command,) = (word for word in job if "trace_jax.launch" in word)
    (variable,) = (word for word in shlex.split(command) if word.startswith("LIBTPU_INIT_ARGS="))
    flags = [f"--{name}={value}" for name, value in scaling.OVERLAP.items()]
    assert variable.partition("=")[2].split() == flags
    assert "LIBTPU" not in _run("tpu_pod.sh", "run", "--dry-run", PROJECT="p").stdout


def test_dry_runs_elsewhere():
    done = _run("slurm.sbatch", "--dry-run", FLAGS="--config.seed=3 --config.train.beta=0.2")
    assert (
        done.returncode == 0
        and "--distributed --config.seed=3 --config.train.beta=0.2" in done.stdout
    )
    done = _run("gpu.sh", "--dry-run", CONFIG="configs/qwen7b.py:lora")
    assert done.returncode == 0 and "--config=configs/qwen7b.py:lora" in done.stdout
    for script in ("tpu_pod.sh", "gke.sh", "gpu.sh"):
        assert _run(script, "--help", PROJECT="p").returncode == 2


@pytest.mark.parametrize(
    ("code", "starts", "ends"), [(0, 1, 0), (75, 3, 1), (2, 1, 2), (130, 1, 130)]
)
def test_what_was_interrupted_is_started_again(tmp_path, code, starts, ends):
    """With a program in place of python that counts its starts and ends as told."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho start >> {tmp_path}/starts\nexit {code}\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(tmp_path / "launch" / "gpu.sh")],
        capture_output=True, env=os.environ | {"ATTEMPTS": "3"},
    )  # fmt: skip
    assert done.returncode == ends
    assert (tmp_path / "starts").read_text().count("start") == starts
