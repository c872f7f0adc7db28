"""Where metrics go besides metrics.jsonl: TensorBoard event files, and Weights & Biases if asked.

Only the first process writes. Neither is ever a reason for a run to fail.
"""

import contextlib
import dataclasses
import functools
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from trace_jax import processes
from trace_jax.errors import InputError


class Sink(Protocol):
    """One place that metrics go to."""

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Metrics after `step` updates of training `kind`: base, ref, train, or evaluate."""

    def flush(self) -> None:
        """Writes what is held back."""

    def close(self) -> None:
        """The same, and ends."""


@dataclasses.dataclass
class _State:
    sinks: list[Sink] = dataclasses.field(default_factory=list)


_state = _State()
_FLUSH_S = 10.0
_KINDS = {"base_checkpoints": "base", "ref_checkpoints": "ref"}
_ALL = ("base", "ref", "train", "evaluate")


@contextlib.contextmanager
def to(settings: Mapping[str, Any], directory: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """In here `scalars` reaches the sinks of the config's section `tracking`.

    directory: the workdir. config: keys and values, for W&B.

    Raises:
      InputError: a package that was asked for is not installed, or W&B refuses.
    """
    if not processes.is_first():
        yield
        return
    before = _state.sinks
    _state.sinks = []
    try:
        if settings["tensorboard"]:
            _state.sinks.append(_TensorBoard(Path(directory)))
        if settings["wandb"]:
            _state.sinks.append(_Wandb(settings["wandb"], Path(directory), config))
        yield
    finally:
        for sink in _state.sinks:
            sink.close()
        _state.sinks = before


def scalars(kind: str, step: int, values: Mapping[str, float]) -> None:
    """Metrics for all sinks; outside of `to` there are none."""
    for sink in _state.sinks:
        sink.scalars(kind, step, values)


def flush() -> None:
    """Returns once what all sinks hold back is written, as before a checkpoint that has it."""
    for sink in _state.sinks:
        sink.flush()


def kind_of(metrics_path: Path) -> str:
    """What a metrics.jsonl is of: base, ref or train."""
    return _KINDS.get(Path(metrics_path).parent.name, "train")


class _TensorBoard:
    """Event files in tensorboard/KIND; a run that resumes writes a file more."""

    def __init__(self, directory: Path):
        self._directory = directory / "tensorboard"
        self._writers: dict[str, Any] = {}
        self._flushed = time.monotonic()
        self._broken = False

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        if self._broken:
            return
        _, event_pb2, summary_pb2 = _tensorboard()
        rows = [summary_pb2.Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        event = event_pb2.Event(
            wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=rows)
        )
        try:
            if kind not in self._writers:
                self._writers[kind] = self._opened(kind, step)
            self._writers[kind].write_event(event)
        except OSError:  # a full disk is told of where it matters
            self._broken = True
        if time.monotonic() - self._flushed > _FLUSH_S:
            self.flush()

    def _opened(self, kind: str, step: int):
        event_file_writer, event_pb2, _ = _tensorboard()
        folder = self._directory / kind
        folder.mkdir(parents=True, exist_ok=True)
        # Two tries in one second are two files.
        writer = event_file_writer.EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        # Events of this step and later ones, of a try before this one, no longer count.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        writer.write_event(event_pb2.Event(wall_time=time.time(), step=step, session_log=start))
        return writer

    def flush(self) -> None:
        if self._broken:
            return
        self._flushed = time.monotonic()
        try:
            for writer in self._writers.values():
                writer.flush()
        except OSError:
            self._broken = True

    def close(self) -> None:
        for writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.close()


@functools.cache
def _tensorboard() -> tuple:
    """(event_file_writer, event_pb2, summary_pb2) of tensorboardX.

    It imports PyTorch and clients of clouds where they are installed, for seconds, and for tensors
    and addresses that it never sees here; hidden meanwhile, they count as not installed.
    """
    hidden = {"torch", "google.cloud.storage", "boto3"} - sys.modules.keys()
    sys.modules |= dict.fromkeys(hidden)
    try:
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2, summary_pb2
    finally:
        for name in hidden:
            del sys.modules[name]
    return event_file_writer, event_pb2, summary_pb2


class _Wandb:
    """A run of Weights & Biases; the key comes from WANDB_API_KEY, the mode from WANDB_MODE.

    One that goes on is not told again what it has; a training that begins anew is another run.
    """

    def __init__(self, project: str, directory: Path, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise InputError(
                "tracking.wandb is set, but wandb is not installed; pip install wandb, or leave "
                "the key empty"
            ) from error
        directory.mkdir(parents=True, exist_ok=True)
        self._kept = directory / ".wandb_id"
        self._begin = functools.partial(
            wandb.init, project=project, name=directory.name, resume="allow", dir=str(directory),
            config=dict(config), settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self._open()

    def _open(self) -> None:
        """Goes on with the run whose id is kept, or begins one."""
        try:
            name = self._kept.read_text().strip() if self._kept.exists() else ""
            name = name or secrets.token_hex(4)
            self._kept.write_text(name)
            self._run = self._begin(id=name)
            for kind in _ALL:
                self._run.define_metric(f"{kind}/step")
                self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")
            had = self._run.summary
            self._had = {kind: had.get(f"{kind}/step") or 0 for kind in _ALL}
        except Exception as error:  # its errors have no common class
            what = " ".join(str(error).split())
            raise InputError(
                f"Weights & Biases refuses the run ({what}); set WANDB_API_KEY, or "
                "WANDB_MODE=offline, or leave tracking.wandb empty"
            ) from error

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        if step == 1 and self._had[kind]:
            self._run.finish()
            self._kept.unlink()
            self._open()
        if step >= self._had[kind]:  # of the last one, what a pause after it found may be missing
            self._run.log({f"{kind}/step": step} | {f"{kind}/{k}": v for k, v in values.items()})

    def flush(self) -> None:
        """A process of its own writes it."""

    def close(self) -> None:
        self._run.finish()
