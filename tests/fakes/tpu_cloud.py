"""launch/tpu_pod.sh in a checkout, and the folder on which the `gcloud` beside this file works."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import children

FAKES = Path(__file__).parent
LAUNCH = FAKES.parents[1] / "launch"
# python3 is the one of the tests, which has trace_jax, whether or not it is active.
PATH = f"{FAKES}:{Path(sys.executable).parent}:{os.environ['PATH']}"
SECRET = "very secret"
COMMIT = ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -q -m first")


class Cloud:
    """A folder that stands for Google Cloud, and a checkout beside it."""

    def __init__(self, folder: Path, hosts: int):
        self.folder, self.checkout = folder / "cloud", folder / "checkout"
        shutil.copytree(LAUNCH, self.checkout / "launch")
        for command in COMMIT:
            subprocess.run(["git", *command.split()], cwd=self.checkout, check=True)
        self.groups = []
        (self.folder / "path").mkdir(parents=True)
        shutil.copy(FAKES / "python3.11", self.folder / "path")
        self.write(hosts=hosts, turns="", calls="", job="echo working\n")
        self.workdir = folder / "disk" / "run"
        self.workdir.mkdir(parents=True)
        (self.workdir / "report.html").write_text("results")

    def write(self, **files) -> None:
        for name, text in files.items():
            (self.folder / name).write_text(str(text))

    def worker(self, index: int = 0) -> Path:
        return self.folder / f"worker-{index}"

    def has(self, state: str) -> None:
        """A slice is there from before."""
        self.write(slice=state)
        for index in range(int((self.folder / "hosts").read_text())):
            self.worker(index).mkdir()

    def start(self, action: str = "run", **variables: str) -> subprocess.Popen:
        own = {
            "PROJECT": "p", "NAME": "mine", "CLOUD": str(self.folder), "WAIT": "0.1",
            "ATTEMPTS": "4", "WORKDIR": str(self.workdir), "GEMINI_API_KEY": SECRET, "HF_TOKEN": "",
            "CONFIG": "configs/gemma9b.py:smoke",  # which needs no data
            "PATH": PATH,
        }  # fmt: skip
        process = subprocess.Popen(
            ["bash", str(self.checkout / "launch" / "tpu_pod.sh"), action],
            env=os.environ | own | variables, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.groups.append(process.pid)
        return process

    def close(self) -> None:
        """Ends what a failed test left behind."""
        jobs = [int(path.read_text()) for path in self.folder.glob("worker-*/trace_jax_job/pid")]
        for group in self.groups + jobs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    def run(self, action: str = "run", **variables: str) -> tuple[int, str]:
        process = self.start(action, **variables)
        ((out, err),) = children.said_by([process])
        return process.returncode, out + err

    def calls(self, *words: str) -> list[str]:
        """What was asked of gcloud with all of `words`."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if all(word in line for word in words)]

    def starts(self, index: int = 0) -> int:
        found = self.worker(index) / "starts"
        return len(found.read_text().splitlines()) if found.exists() else 0

    def until(self, condition) -> None:
        deadline = time.monotonic() + children.PATIENCE
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert condition()
