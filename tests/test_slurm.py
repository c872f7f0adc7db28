"""slurm.sbatch with programs in place of srun and scontrol: what goes back into the queue."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trace_jax import preemption

LAUNCH = Path(__file__).resolve().parents[1] / "launch"


def _run(
    folder: Path, code: int, check: str = "exit 0", **variables: str
) -> tuple[subprocess.CompletedProcess, str]:
    """The script where srun ends with `code`, and Python, which checks the config, does `check`.

    With it: what srun and scontrol were called with.
    """
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    programs = {
        "srun": f"echo srun >> {calls}; exit {code}",
        "scontrol": f'echo "$@" >> {calls}',
        ".venv/bin/python": check,
    }
    for name, does in programs.items():
        path = folder / "repo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{does}\n")
        path.chmod(0o755)
    repo = folder / "repo"
    if not (repo / "launch").exists():
        (repo / "launch").symlink_to(LAUNCH)
    own = {"PATH": f"{repo}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "REPO": str(repo)}
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch")],
        env=os.environ | own | variables, capture_output=True, text=True,
    )  # fmt: skip
    return done, calls.read_text() if calls.exists() else ""


@pytest.mark.parametrize("code", [75, 1, 134, 137, 143])
def test_what_was_interrupted_goes_back_into_the_queue(tmp_path, code):
    done, calls = _run(tmp_path, code)
    assert (done.returncode, calls) == (0, "srun\nrequeue 7\n"), done.stderr
    assert f"ended with {code}" in done.stderr and "restart 1 of 20" in done.stderr


@pytest.mark.parametrize("code", [0, 2, 130])
def test_what_is_done_or_the_users_does_not(tmp_path, code):
    done, calls = _run(tmp_path, code)
    assert (done.returncode, calls) == (code, "srun\n")


def test_a_job_goes_back_only_so_often(tmp_path):
    own = {"RESTARTS": "3", "SLURM_RESTART_COUNT": "2"}
    done, calls = _run(tmp_path, 137, **own)
    assert (done.returncode, calls) == (0, "srun\nrequeue 7\n"), done.stderr
    done, calls = _run(tmp_path, 137, **own | {"SLURM_RESTART_COUNT": "3"})
    assert (done.returncode, calls) == (137, "srun\n")
    assert "RESTARTS" in done.stderr


def test_wrong_input_ends_before_the_processes_start(tmp_path):
    python = f'exec {sys.executable} "$@"'
    own = {"CONFIG": "configs/llama8b.py:typo"}
    done, calls = _run(tmp_path, 137, python, **own)
    assert (done.returncode, calls) == (2, "") and "variant 'typo' is unknown" in done.stdout
    own = {"CONFIG": "configs/llama8b.py:smoke"}
    done, calls = _run(tmp_path, 0, python, **own)
    assert (done.returncode, calls) == (0, "srun\n"), done.stdout


@pytest.mark.parametrize(("check", "flags"), [("exit 1", ""), ("exit 2", "--config.parent=runs/a")])
def test_what_cannot_be_checked_here_is_left_to_the_program(tmp_path, check, flags):
    done, calls = _run(tmp_path, 0, check, FLAGS=flags)
    assert (done.returncode, calls) == (0, "srun\n"), done.stderr


def test_the_program_is_told_early_enough_to_save():
    script = (LAUNCH / "slurm.sbatch").read_text()
    (seconds,) = re.findall(r"^#SBATCH --signal=TERM@(\d+)$", script, re.MULTILINE)
    assert int(seconds) >= preemption._UNWINDING_S


def test_each_process_gets_the_cores_that_were_asked_for(tmp_path):
    """srun takes them from no sbatch since Slurm 22.05."""
    assert "+ srun --kill-on-bad-exit=1 --cpus-per-task=8 " in _run(tmp_path, 0)[0].stdout
    done, _ = _run(tmp_path, 0, SLURM_CPUS_PER_TASK="12")
    assert " --cpus-per-task=12 " in done.stdout
