"""slurm.sbatch with programs in place of srun and scontrol: what goes back into the queue."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "launch" / "slurm.sbatch"


def _run(folder: Path, code: int, **variables: str) -> tuple[subprocess.CompletedProcess, str]:
    """The script where srun ends with `code`; it, and what scontrol was called with."""
    calls = folder / "calls"
    for name, does in (("srun", f"exit {code}"), ("scontrol", f'echo "$@" >> {calls}')):
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    own = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "REPO": str(folder)}
    done = subprocess.run(
        ["bash", str(SCRIPT)], env=os.environ | own | variables, capture_output=True, text=True
    )
    return done, calls.read_text() if calls.exists() else ""


@pytest.mark.parametrize("code", [75, 1, 134, 137, 143])
def test_what_was_interrupted_goes_back_into_the_queue(tmp_path, code):
    done, calls = _run(tmp_path, code)
    assert (done.returncode, calls) == (0, "requeue 7\n"), done.stderr
    assert f"ended with {code}" in done.stderr and "restart 1 of 20" in done.stderr


@pytest.mark.parametrize("code", [0, 2, 130])
def test_what_is_done_or_the_users_does_not(tmp_path, code):
    done, calls = _run(tmp_path, code)
    assert (done.returncode, calls) == (code, "")


def test_a_job_goes_back_only_so_often(tmp_path):
    own = {"RESTARTS": "3", "SLURM_RESTART_COUNT": "2"}
    done, calls = _run(tmp_path, 137, **own)
    assert (done.returncode, calls) == (0, "requeue 7\n"), done.stderr
    done, calls = _run(tmp_path, 137, **own | {"SLURM_RESTART_COUNT": "3"})
    assert (done.returncode, calls) == (137, "requeue 7\n")  # of the call before
    assert "RESTARTS" in done.stderr


def test_each_process_gets_the_cores_that_were_asked_for(tmp_path):
    """srun takes them from no sbatch since Slurm 22.05."""
    assert "+ srun --kill-on-bad-exit=1 --cpus-per-task=8 " in _run(tmp_path, 0)[0].stdout
    done, _ = _run(tmp_path, 0, SLURM_CPUS_PER_TASK="12")
    assert " --cpus-per-task=12 " in done.stdout
