"""Scripts that start jobs elsewhere: what they would do, and that a shell would understand them."""

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import children
import pytest

from bench import scaling

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
SMOKE = {"PROJECT": "p", "CONFIG": "configs/gemma9b.py:smoke"}  # which needs no data
Done = subprocess.CompletedProcess
SCRIPTS = ("tpu_pod.sh", "tpu_worker.sh", "gke.sh", "gpu.sh", "slurm.sbatch")


def _run(script: str, *arguments: str, **variables: str) -> Done:
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
    own |= {"CONFIG": "configs/llama8b.py:smoke", "GEMINI_API_KEY": secret}
    done = _run("tpu_pod.sh", "run", "--dry-run", **own)
    assert done.returncode == 0, done.stderr
    said = done.stdout.replace("\\ ", " ")
    assert "queued-resources create mine-queue" in said and "--spot" in said
    assert (
        "trace_jax.launch --config=configs/llama8b.py:smoke --workdir=/mnt/r --distributed" in said
    )
    assert "mine:/mnt/r runs/mine" in said and secret not in done.stdout + done.stderr


def test_a_pod_that_overlaps_has_the_flags_that_were_measured():
    job = shlex.split(_run("tpu_pod.sh", "run", "--dry-run", **SMOKE, OVERLAP="true").stdout)
    (command,) = (word for word in job if "trace_jax.launch" in word)
    (variable,) = (word for word in shlex.split(command) if word.startswith("LIBTPU_INIT_ARGS="))
    flags = [f"--{name}={value}" for name, value in scaling.OVERLAP.items()]
    assert variable.partition("=")[2].split() == flags
    assert "LIBTPU" not in _run("tpu_pod.sh", "run", "--dry-run", **SMOKE).stdout


def test_dry_runs_elsewhere():
    done = _run("slurm.sbatch", "--dry-run", FLAGS="--config.seed=3 --config.train.beta=0.2")
    assert (
        done.returncode == 0
        and "--distributed --config.seed=3 --config.train.beta=0.2" in done.stdout
    )
    done = _run("gpu.sh", "--dry-run", CONFIG="configs/qwen7b.py:lora")
    assert done.returncode == 0 and "--config=configs/qwen7b.py:lora" in done.stdout


@pytest.mark.parametrize("script", ["tpu_pod.sh", "gke.sh", "gpu.sh", "slurm.sbatch"])
def test_flags_may_stand_on_several_lines(script):
    flags = ["--config.seed=3", "--config.train.beta=0.2"]
    own = SMOKE | {
        "IMAGE": "i",
        "WORKDIR": "gs://bucket/run",
        "FLAGS": "\n\t".join(["", *flags, ""]),
    }
    arguments = ["--dry-run"] if script in ("gpu.sh", "slurm.sbatch") else ["run", "--dry-run"]
    done = _run(script, *arguments, **own)
    assert done.returncode == 0 and all(flag in done.stdout for flag in flags), done.stderr


@pytest.mark.parametrize("script", ["tpu_pod.sh", "gke.sh"])
@pytest.mark.parametrize(
    ("version", "taken"), [("3 2", False), ("4 3", False), ("4 4", True), ("5 0", True)]
)
def test_an_old_bash_is_refused_in_one_line(tmp_path, script, version, taken):
    text = (LAUNCH / script).read_text().replace("BASH_VERSINFO", "version")
    (tmp_path / script).write_text(f"version=({version})\n{text}")
    command = ["bash", str(tmp_path / script)]
    env = os.environ | SMOKE
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2
    if taken:
        assert done.stderr == ""
    else:
        assert "bash 4.4 or newer" in done.stderr and "brew install bash" in done.stderr
        assert done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.parametrize("script", ["tpu_pod.sh", "gke.sh", "gpu.sh", "slurm.sbatch"])
def test_an_unknown_argument_starts_nothing_and_shows_the_usage(script):
    done = _run(script, "--help", PROJECT="")
    assert done.returncode == 2 and f"launch/{script}" in done.stdout and "+ " not in done.stdout


class Machine:
    """A checkout with a .venv whose programs write down what they are asked."""

    def __init__(self, folder: Path):
        self.folder, self.told = folder, folder / "told"
        shutil.copytree(LAUNCH, folder / "launch")
        self.told.touch()

    def has(self, *, sees: int = 0, code: int | str = 0, does: str = "") -> None:
        """A .venv that sees a GPU once pip was called `sees` times; the program ends with code."""
        programs = self.folder / ".venv" / "bin"
        _write(programs / "pip", f'echo "pip $*" >>{self.told}')
        _write(
            programs / "python",
            f'if [ "$1" = -c ]; then [ "$(grep -c ^pip {self.told})" -ge {sees} ]; exit; fi',
            f'echo "start $*" >>{self.told}',
            does,
            f"exit {code}",
        )

    def run(self, *arguments: str, **variables: str) -> tuple[Done, list[str]]:
        """The script's end, and what pip and the program were asked."""
        done = subprocess.run(
            ["bash", str(self.folder / "launch" / "gpu.sh"), *arguments],
            capture_output=True, text=True,
            env=os.environ | {"ATTEMPTS": "3"} | variables,
        )  # fmt: skip
        return done, self.told.read_text().splitlines()

    def until(self, line: str) -> None:
        deadline = time.monotonic() + children.PATIENCE
        while line not in self.told.read_text().splitlines() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert line in self.told.read_text().splitlines()


def _write(program: Path, *lines: str) -> None:
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    program.chmod(0o755)


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("code", "starts", "ends"), [(0, 1, 0), (75, 3, 1), (2, 1, 2), (130, 1, 130)]
)
def test_what_was_interrupted_is_started_again(machine, code, starts, ends):
    machine.has(code=code)
    done, told = machine.run()
    assert done.returncode == ends and [line.split()[0] for line in told] == ["start"] * starts


# Writes down what it is told, also what it is told again within half a second, and ends.
LISTENS = """
exec >>{told}
trap 'echo TERM; code=75' TERM
trap 'echo INT; code=130' INT
echo $$; echo up
for _ in $(seq 600); do [ -z "${{code-}}" ] || break; sleep 0.1; done
for _ in 1 2 3 4 5; do sleep 0.1; done
"""


def _at_a_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which tests in the background ignore


@pytest.mark.parametrize(("said", "ends"), [("TERM", 75), ("INT", 130)])
def test_what_the_launcher_is_told_the_program_hears_once(machine, said, ends):
    """TERM comes to the launcher alone, INT as Ctrl-C in its terminal."""
    machine.has(does=LISTENS.format(told=machine.told), code="$code")
    keyboard, terminal = os.openpty()
    launcher = subprocess.Popen(
        ["bash", str(machine.folder / "launch" / "gpu.sh")],
        stdin=terminal, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, preexec_fn=_at_a_terminal,
    )  # fmt: skip
    machine.until("up")
    if said == "TERM":
        launcher.terminate()
    else:
        os.write(keyboard, b"\x03")
    assert launcher.wait(children.PATIENCE) == ends
    (start, pid, *rest) = machine.told.read_text().splitlines()
    assert start.startswith("start") and rest == ["up", said]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    os.close(keyboard)
    os.close(terminal)


def test_a_venv_for_cpus_gets_the_extra_for_gpus(machine):
    machine.has(sees=1)
    done, told = machine.run()
    assert done.returncode == 0 and told[0] == "pip install -q -c constraints.txt -e .[cuda]"
    assert [line.split()[0] for line in told] == ["pip", "start"]


def test_without_a_venv_one_is_made(machine):
    machine.has(sees=1)
    (machine.folder / ".venv").rename(machine.folder / "made")
    _write(machine.folder / "path" / "python3", f'mv {machine.folder}/made "$3"')
    done, told = machine.run(PATH=f"{machine.folder}/path:{os.environ['PATH']}")
    assert done.returncode == 0 and [line.split()[0] for line in told] == ["pip", "start"]


def test_without_a_gpu_nothing_starts_on_the_cpu(machine):
    machine.has(sees=99)
    done, told = machine.run(GPUS="7")
    assert done.returncode == 2 and [line.split()[0] for line in told] == ["pip"]
    assert "sees no GPU" in done.stderr and "GPUS=7" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_dry_run_says_that_it_would_install(machine):
    machine.has(sees=99)
    done, told = machine.run("--dry-run")
    assert (done.returncode, told) == (0, []) and "-e .\\[cuda\\]" in done.stdout
