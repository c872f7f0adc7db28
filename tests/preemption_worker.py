"""One of several processes that train twice and do other work; run by test_preemption.py.

python preemption_worker.py HOST:PORT PROCESSES PROCESS FOLDER

Its last line is what it was stopped by.
"""

import sys
import time
from pathlib import Path

import numpy as np
from jax.experimental import multihost_utils

from trace_jax import errors, preemption, processes
from trace_jax.errors import InputError

STEPS = (12, 6)


def main(coordinator: str, count: int, index: int, folder: Path) -> int:
    processes.start(coordinator, count, index, auto=False)
    try:
        with preemption.watched():
            for training, steps in enumerate(STEPS):
                train(folder, training, steps)
            work(folder)
    except InputError as error:
        print(error)
        return processes.leave(errors.exit_code(error))
    except preemption.Preempted as told:
        print(told)
        return processes.leave(preemption.EXIT_CODE)
    return 0


def train(folder: Path, training: int, steps: int) -> None:
    """Steps that need all processes; the first one says how far it is."""
    with preemption.stepping():
        for step in range(1, steps + 1):
            multihost_utils.process_allgather(np.int32(step))
            if processes.is_first():
                (folder / f"{training}-{step}").touch()
            time.sleep(0.1 * training)  # time for a signal in the second one
            if preemption.due():
                raise preemption.Preempted(f"training {training} step {step}")


def work(folder: Path) -> None:
    """Of the first process alone, for which the others wait in a collective."""
    if processes.is_first():
        for line in range(10_000):
            (folder / f"work-{line}").touch()
            time.sleep(0.1)
            if (folder / "fail").exists():
                raise InputError("the first one alone cannot go on")
    processes.wait("the work")


if __name__ == "__main__":
    preemption._STUCK_S = 2.0
    where, count, index, folder = sys.argv[1:]
    sys.exit(main(where, int(count), int(index), Path(folder)))
