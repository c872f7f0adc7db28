"""Checkpoints of a training run: {train state, data position}, saved as one (Orbax)."""

import logging
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from trace_jax import train
from trace_jax.errors import InputError

logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax logs every file at INFO


class Checkpoints:
    """Checkpoints below `directory`: the newest `keep`, each complete before an older one goes."""

    def __init__(self, directory: Path, *, keep: int):
        policy = ocp.training.preservation_policies.LatestN(keep)
        self.directory = Path(directory).resolve()
        self._checkpointer = ocp.training.Checkpointer(
            self.directory, preservation_policy=policy, cleanup_tmp_directories=True
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        """Updates completed in the newest checkpoint, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else int(latest.step)

    def save(self, step: int, state: train.TrainState, data=None) -> None:
        """Saves the state after `step` updates with the position of the Grain iterator `data`."""
        if self.latest_step == step:
            return
        what = {"state": state} | ({} if data is None else {"data": data})
        self._checkpointer.save_checkpointables(
            step, what, custom_metadata={"shapes": _shapes(state)}
        )

    def restore(self, state: train.TrainState, data=None) -> tuple[int, train.TrainState] | None:
        """(step, state) of the newest checkpoint, sharded like `state`; moves `data` there."""
        latest = self._checkpointer.latest
        if latest is None:
            return None
        stored = ocp.metadata(latest.path, "state")  # `latest` itself comes without custom metadata
        self._check_shapes((stored.custom_metadata or {}).get("shapes", {}), _shapes(state))
        wanted = {"state": jax.tree.map(_abstract, state)}
        if data is not None:
            wanted["data"] = data
        loaded = self._checkpointer.load_checkpointables(latest.step, wanted)
        return int(latest.step), loaded["state"]

    def _check_shapes(self, found: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
        names = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
        if names:
            raise InputError(
                f"{self.directory}: the checkpoint has another shape ({len(names)} arrays differ; "
                f"first {names[0]}: checkpoint {found.get(names[0])}, this run "
                f"{wanted.get(names[0])}); use another --workdir or the model it was made with"
            )


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _shapes(state: train.TrainState) -> dict[str, list[int]]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): list(leaf.shape) for path, leaf in leaves}
