"""Processes that a test starts: waiting for them, and what they cost."""

import subprocess
import sys

# XLA for the CPU without its newest emitters and without LLVM's passes: a fifth of the compile time
# (a run of conftest's config: 80 -> 16 s), where what is compiled runs for milliseconds.
QUICK_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
# XLA_FLAGS of a process that is one of several.
ONE_DEVICE = (
    "--xla_force_host_platform_device_count=1 "
    f"--xla_cpu_enable_concurrency_optimized_scheduler=false {QUICK_TO_COMPILE}"
)
PATIENCE = 1200  # seconds: ends a hang, and lets a machine that others use take its time


def said_by(processes: list[subprocess.Popen]) -> list[tuple[str | None, str | None]]:
    """stdout and stderr of each (None where not piped), after all have ended.

    Who runs longer than PATIENCE is killed with all others, and what they said is raised.
    """
    try:
        return [process.communicate(timeout=PATIENCE) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        told = "\n".join(str(process.communicate()) for process in processes)
        raise AssertionError(f"not ended after {PATIENCE} s:\n{told}") from None


def cpu_seconds(code: str, below: float, tries: int = 5) -> float:
    """The least processor time (user and system, s) of a Python that runs `code`, over `tries`.

    Ends at the first try that takes less than `below`: a machine that others use counts their time
    as ours, so that one slow try says nothing. `code` that fails raises with its stderr.
    """
    ask = "\nimport resource; _used = resource.getrusage(resource.RUSAGE_SELF)\n"
    ask += "print(_used.ru_utime + _used.ru_stime)"
    least = float("inf")
    for _ in range(tries):
        done = subprocess.run([sys.executable, "-c", code + ask], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        least = min(least, float(done.stdout.splitlines()[-1]))
        if least < below:
            break
    return least
