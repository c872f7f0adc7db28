"""One of several processes that train, score, checkpoint and export; run by test_processes.py.

python process_worker.py HOST:PORT PROCESSES PROCESS FOLDER [STOP_AFTER_STEP]

FOLDER may be in a bucket. Where it is to stop, the last process gets SIGTERM after that step.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from tests import test_sharding, tiny
from trace_jax import bucket, metrics, models, preemption, processes, sharding


def main(coordinator: str, count: int, index: int, where: str, stop_after: int | None) -> int:
    if count > 1:
        processes.start(coordinator, count, index, auto=False)
    try:
        with preemption.watched(), bucket.opened(where) as folder:
            work(index, folder, stop_after)
            processes.wait("end")
    except preemption.Preempted as told:
        print(told, file=sys.stderr)
        return processes.leave(preemption.EXIT_CODE)
    return 0


def work(index: int, folder: Path, stop_after: int | None) -> None:
    mesh = sharding.make_mesh(1, -1, 1, fsdp_limit=64)
    with jax.set_mesh(mesh):
        module = test_sharding.module()
        fitted = tiny.fit(
            module, folder, adapters="none", learning_rate=1e-3, micro_rows=1,
            examples_per_step=8, retain_per_step=4, progress=stopping(stop_after),
        )  # fmt: skip
        models.save(fitted.module, folder / "model")
        gradient_scores = test_sharding.scores("jvp")
        if processes.is_first():
            np.save(folder / "scores.npy", gradient_scores)
            np.save(folder / "devices.npy", np.asarray(mesh.devices.shape))
        state = nnx.state(fitted.module)
        local = [leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state)]
        np.save(folder / f"local-{index}.npy", np.asarray(local))


def stopping(after: int | None):
    """Progress that has the run stopped after a number of steps."""

    @contextlib.contextmanager
    def progress(total=None, description="", start=0):
        class Bar:
            done = start

            def advance(self, n: int = 1) -> None:
                self.done += n
                if description.startswith("train") and self.done == after:
                    if processes.index() == processes.count() - 1:
                        os.kill(os.getpid(), signal.SIGTERM)
                    while preemption._state.target is None:  # until all have agreed
                        time.sleep(0.05)

        yield Bar()

    return progress


if __name__ == "__main__":
    metrics.say = lambda line: None
    jax.config.update("jax_disable_most_optimizations", True)
    where, count, index, folder, *stop = sys.argv[1:]
    sys.exit(main(where, int(count), int(index), folder, int(stop[0]) if stop else None))
