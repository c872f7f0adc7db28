"""The weights of the best pause so far, beside the checkpoints of a run that may end with them.

Weights alone: of a run in full, the optimiser's state is two thirds of a checkpoint.
"""

from pathlib import Path

from flax import nnx

from trace_jax import checkpoints, records
from trace_jax.errors import InputError

FOLDER, ENDED = "best", "stopped.json"


def keep(directory: Path, params: nnx.State, step: int) -> None:
    """Keeps `params`, of the pause after `step` updates, instead of those kept before."""
    with checkpoints.Checkpoints(directory / FOLDER, keep=1) as kept:
        kept.save(step, params)


def end_with(directory: Path, params: nnx.State, ended_at: int) -> tuple[int, nnx.State]:
    """(step, params) kept last, sharded like `params`: what a run that ended at a pause ends with.

    Raises:
      InputError: none was kept.
    """
    found = _read(directory, params)
    if found is None:
        raise InputError(
            f"training went wrong before its first evaluation (step {ended_at}), so there is "
            "nothing to go back to; lower train.learning_rate, or evaluate earlier "
            "(train.evaluate_every)"
        )
    records.write_json(directory / ENDED, {"step": found[0], "stopped_at": ended_at})
    return found


def restored(directory: Path, params: nnx.State) -> nnx.State | None:
    """What the run in `directory` ended with, if that was a pause.

    Raises:
      InputError: the kept weights are gone, or an earlier version wrote them.
    """
    if not (directory / ENDED).exists():
        return None
    found = _read(directory, params)
    if found is None:
        raise InputError(
            f"{directory / FOLDER} is missing: it has the model that this run ended with; train "
            "anew with --redo"
        )
    return found[1]


def _read(directory: Path, params: nnx.State) -> tuple[int, nnx.State] | None:
    with checkpoints.Checkpoints(directory / FOLDER, keep=1) as kept:
        return kept.restore(params)
