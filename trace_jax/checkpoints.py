"""Checkpoints of a training run: {train state, data position}, saved as one (Orbax).

They are written behind the back of the training; each has the hashes of its files beside it, and a
damaged one is never restored.
"""

import logging
import shutil
from pathlib import Path

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from trace_jax import bucket, metrics, processes, records, train, workdir
from trace_jax.errors import InputError

State = train.TrainState | nnx.State  # a run's, or weights alone

_log = logging.getLogger("absl")
_log.setLevel(logging.WARNING)  # Orbax logs every file at INFO
# What its threads meet, `wait` raises as one line; their tracebacks besides help nobody.
_log.addFilter(lambda told: not (told.exc_info and "orbax" in told.pathname))
# What the system says, at the end of a long line of Orbax's.
_REASONS = ("No space left on device", "Read-only file system")
_SUMS = "checksums"  # folder of STEP.json, the hash of a checkpoint


class Checkpoints:
    """Checkpoints below `directory`: the newest `keep`, each complete before an older one goes.

    Damaged ones are deleted on the way in, with a word. (A bucket checks its objects itself.)
    """

    def __init__(self, directory: Path, *, keep: int):
        policy = ocp.training.preservation_policies.LatestN(keep)
        self.directory = bucket.checkpoints(directory)
        self._sums = self.directory / _SUMS if isinstance(self.directory, Path) else None
        if processes.is_first():
            self._drop_damaged()
        processes.wait(f"checked {self.directory}")
        self._checkpointer = ocp.training.Checkpointer(
            self.directory, preservation_policy=policy, cleanup_tmp_directories=True
        )
        self._saving: tuple[int, ocp.AsyncResponse] | None = None
        self._failed = False

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        try:
            self.wait()
        finally:
            try:
                self._checkpointer.close()
            except Exception:
                if not self._failed:  # else it says again what was said
                    raise
        if processes.is_first():
            for kept in self._kept_sums():
                if not (self.directory / kept.stem).is_dir():
                    kept.unlink()

    @property
    def latest_step(self) -> int | None:
        """Updates completed in the newest checkpoint, also one that is being written, or None."""
        if self._saving is not None:
            return self._saving[0]
        latest = self._checkpointer.latest
        return None if latest is None else int(latest.step)

    def save(self, step: int, state: State, data=None) -> None:
        """Saves the state after `step` updates with the position of the Grain iterator `data`.

        The position is the same in every process, so any number of them can go on from it.
        Returns once the state is copied; it is on disk after `wait`, the next `save` or the end. In
        a bucket, what a run that goes on from it has to find (its metrics) is there before it is.

        Raises:
          InputError: this one or the one before cannot be written.
        """
        if self.latest_step == step:
            return
        self.wait()
        bucket.publish()
        about = {"shapes": _shapes(state)} | ({} if data is None else {"data": data.get_state()})
        try:
            response = self._checkpointer.save_checkpointables_async(
                step, {"state": state}, custom_metadata=about
            )
        except OSError as error:
            raise self._unwritten(step, error) from error
        if response is not None:
            self._saving = (step, response)

    def wait(self) -> None:
        """Returns once what was saved is on disk, complete."""
        if self._saving is None:
            return
        (step, response), self._saving = self._saving, None
        try:
            response.result()
        except Exception as error:  # whatever the background threads of Orbax met
            raise self._unwritten(step, error) from error
        if self._sums is None:
            return
        if processes.is_first():
            digest = workdir.hash_path(self.directory / str(step))
            self._sums.mkdir(exist_ok=True)
        else:
            digest = ""
        records.write_json(self._sums / f"{step}.json", {"sha256": digest})

    def _kept_sums(self) -> list[Path]:
        return [] if self._sums is None else list(self._sums.glob("*.json"))

    def _unwritten(self, step: int, error: Exception) -> InputError:
        self._failed = True
        what = " ".join(str(error).split())
        what = next((reason for reason in _REASONS if reason in what), what[:200])
        return InputError(
            f"{self.directory}: the checkpoint of step {step} cannot be written ({what}); make "
            "room or mend the disk, and the same command goes on from the checkpoint before"
        )

    def _drop_damaged(self) -> None:
        for kept in sorted(self._kept_sums()):
            path = self.directory / kept.stem
            try:
                intact = workdir.hash_path(path) in ("", records.read_json(kept)["sha256"])
            except (InputError, KeyError):  # the sum itself is damaged: it says nothing
                intact = True
            if not intact:
                metrics.say(f"  warning: {path} is damaged; deleted, the one before it is used")
                shutil.rmtree(path)
                kept.unlink()

    def restore(self, state: State, data=None) -> tuple[int, State] | None:
        """(step, state) of the newest checkpoint, sharded like `state`; moves `data` there.

        state: arrays, or their shapes with shardings; what is `...` in it is not read.
        """
        self.wait()
        latest = self._checkpointer.latest
        if latest is None:
            return None
        stored = ocp.metadata(latest.path, "state")  # `latest` itself comes without custom metadata
        about = stored.custom_metadata or {}
        self._check_shapes(about.get("shapes", {}), _shapes(state))
        if data is not None and "data" not in about:
            raise InputError(
                f"{self.directory}: the checkpoint does not say how far the data was read (an "
                "earlier version wrote it); train anew with --redo"
            )
        wanted = {"state": shapes(state)}
        loaded = self._checkpointer.load_checkpointables(latest.step, wanted)
        if data is not None:
            data.set_state(about["data"])
        return int(latest.step), loaded["state"]

    def _check_shapes(self, found: dict[str, list], wanted: dict[str, list | None]) -> None:
        compared = [k for k in found.keys() | wanted.keys() if wanted.get(k, []) is not None]
        names = sorted(k for k in compared if found.get(k) != wanted.get(k))
        if names:
            raise InputError(
                f"{self.directory}: the checkpoint has another shape ({len(names)} arrays differ; "
                f"first {names[0]}: checkpoint {found.get(names[0])}, this run "
                f"{wanted.get(names[0])}); use another --workdir or the model it was made with"
            )


def shapes(state: State) -> State:
    """The state as shapes with shardings, which hold no memory; what is `...` stays."""
    return jax.tree.map(
        lambda x: x if x is ... else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        state,
    )


def _shapes(state: State) -> dict[str, list[int] | None]:
    """Of every array by its path; None: any."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path): None if leaf is ... else list(leaf.shape)
        for path, leaf in leaves
    }
