"""Runs that are disturbed, and whether they end as an undisturbed one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import children

from trace_jax import workdir

ROOT = Path(__file__).resolve().parents[2]
# What a run ends with; eval.json and samples.jsonl follow from the model.
ENDS = ("records.jsonl", "triage.jsonl", "corrections.jsonl", "gold.json", "impact.jsonl",
        "metrics.jsonl", "eval.json", "model/model.safetensors")  # fmt: skip


def command(config: Path, path: Path, *more: str) -> list[str]:
    launch = [sys.executable, "-m", "trace_jax.launch"]
    return [*launch, f"--config={config}", f"--workdir={path}", *more]


def start(config: Path, path: Path, *more: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(config, path, *more), cwd=ROOT, env=os.environ | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def run(config: Path, path: Path, *more: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(config, path, *more), cwd=ROOT, env=os.environ | environment,
        capture_output=True, text=True, check=False, timeout=children.PATIENCE,
    )  # fmt: skip


def error_of(done: subprocess.CompletedProcess) -> str:
    """The one line that a run which ends by exit code 2 says; no traceback anywhere."""
    assert done.returncode == 2, (done.returncode, done.stderr[-3000:])
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    (line,) = [t for t in done.stderr.splitlines() if t.startswith("error:")]
    return line


def assert_same_end(path: Path, undisturbed: Path) -> None:
    """Bit for bit, but for seconds in eval.json's neighbours."""
    different = [
        name
        for name in ENDS
        if workdir.hash_path(path / name) != workdir.hash_path(undisturbed / name)
    ]
    assert not different, different
    assert not list(path.rglob("*.tmp")), list(path.rglob("*.tmp"))


def stages_done(path: Path) -> list[str]:
    marks = (path / ".stages").glob("*.json") if (path / ".stages").is_dir() else ()
    return [json.loads(m.read_text())["stage"] for m in marks if "started" not in m.name]
