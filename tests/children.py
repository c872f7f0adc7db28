"""Waiting for processes that a test started."""

import subprocess

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
