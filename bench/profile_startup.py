"""Where a run's time goes until its first training step. Imports nothing that a run does not."""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

SHOWN = 12  # that took longest; the rest is one
# Functions of jax that say what goes on below them.
IN_JAX = {
    "backend_compile_and_load": "compile",
    "_cache_read": "read compiled programs",
    "_cache_write": "write compiled programs",
    "lower_jaxpr_to_module": "lower",
    "trace_to_jaxpr": "trace",
    "trace_to_jaxpr_dynamic": "trace",
}


def owner(frame: FrameType | None) -> str:
    """What a thread that is at `frame` does: imports, one of `IN_JAX`, or a function of ours."""
    ours, in_jax = None, None
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib"):
            return "imports"
        in_jax = in_jax or IN_JAX.get(code.co_name)
        path = Path(code.co_filename)
        if ours is None and "trace_jax" in path.parts:
            ours = f"{path.stem}.{code.co_name}"
        frame = frame.f_back
    return in_jax or ours or "other"


def startup(report: Callable[[dict], None]) -> None:
    """Runs the quickstart; `report` is called, in a thread, once its first step is told.

    Looks every few milliseconds where the run's thread is. A call that holds the interpreter's lock
    counts where it returns.
    """
    from trace_jax import launch

    folder = tempfile.mkdtemp()
    told = Path(folder, "run", "base_checkpoints", "metrics.jsonl")
    began, now = _process_began(), time.time()
    seconds = {"start of the interpreter, trace_jax.launch": now - began}

    def watch() -> None:
        last = now
        while not (told.exists() and told.stat().st_size):
            time.sleep(0.005)
            what = owner(sys._current_frames()[threading.main_thread().ident])
            seconds[what] = seconds.get(what, 0.0) + time.time() - last
            last = time.time()
        ordered = sorted(seconds.items(), key=lambda item: -item[1])
        rest = sum(took for _, took in ordered[SHOWN:])
        report({"seconds": dict(ordered[:SHOWN]) | {"the rest": rest}})

    threading.Thread(target=watch, daemon=True).start()
    argv = ["launch", "--config=configs/quickstart.py", f"--workdir={folder}/run"]
    launch.main([*argv, "--stages=prepare"])


def _process_began() -> float:
    """When this process was started, seconds since the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
