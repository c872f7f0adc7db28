"""The folder of a run: where each artefact is, which stage made it, from what, if it holds."""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trace_jax import bucket, processes, records
from trace_jax.errors import InputError

# What a mark has; one of a stage that began, the first two.
_FIELDS = (("stage", str), ("inputs", dict), ("outputs", dict), ("summary", dict),
           ("seconds", int | float))  # fmt: skip
STORE = "judgements.sqlite"
_WHOLE_FILE = 64 * 2**20  # larger files are hashed by size, first and last MiB


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A run's folder.

    `shared` is another run's folder whose stages `shared_stages` this one reads instead of its own.
    """

    path: Path
    shared: "Workdir | None" = None
    shared_stages: frozenset[str] = frozenset()

    def of(self, stage: str) -> "Workdir":
        """The workdir that holds the artefacts of `stage`."""
        return (
            self.shared.of(stage)
            if self.shared is not None and stage in self.shared_stages
            else self
        )

    def file(self, stage: str, name: str) -> Path:
        """Path of an artefact of `stage`."""
        return self.of(stage).path / name

    def finished(self, stage: str) -> dict | None:
        """{"stage", "seconds", "inputs", "outputs", "summary"} of a finished stage, else None."""
        return _read_mark(self.of(stage)._mark(stage, "json"))

    def started(self, stage: str) -> dict | None:
        """Inputs of a stage that began and did not finish."""
        return _read_mark(self.of(stage)._mark(stage, "started.json"))

    def start(self, stage: str, inputs: Mapping[str, object]) -> None:
        """Marks a stage as begun."""
        self._mark(stage, "started.json").parent.mkdir(parents=True, exist_ok=True)
        records.write_json(
            self._mark(stage, "started.json"), {"stage": stage, "inputs": dict(inputs)}
        )

    def finish(
        self, stage: str, inputs: Mapping, outputs: Mapping, seconds: float, summary: Mapping
    ) -> None:
        """Marks a stage as done, with hashes of what it wrote; `close` has to follow."""
        processes.wait(f"{stage} finished")
        mark = {"stage": stage, "seconds": round(seconds, 3), "inputs": dict(inputs)}
        mark |= {
            "outputs": {name: hash_path(self.path / name) for name in outputs},
            "summary": dict(summary),
        }
        records.write_json(self._mark(stage, "json"), mark)
        bucket.publish()

    def close(self, stage: str, spent: Iterable[str] = ()) -> None:
        """Deletes what a finished stage needs no longer; the mark of its begin last, so that who
        finds it beside the other does this again."""
        for name in spent:
            remove(self.path / name)
        remove(self._mark(stage, "started.json"))
        bucket.publish()

    def touched(self, stage: str) -> Path | None:
        """The first artefact of a finished stage that is not as the stage left it, else None."""
        for name, digest in self.finished(stage)["outputs"].items():
            if hash_path(self.file(stage, name)) != digest:
                return self.file(stage, name)
        return None

    def forget(self, stage: str, outputs: Mapping) -> None:
        """Deletes a stage's artefacts and marks.

        The marks go last: after a kill in between they still tell of other inputs, or of artefacts
        that are gone.
        """
        for name in outputs:
            remove(self.path / name)
        for kind in ("json", "started.json"):
            remove(self._mark(stage, kind))
        bucket.publish()

    def _mark(self, stage: str, kind: str) -> Path:
        return self.path / ".stages" / f"{stage}.{kind}"


def _read_mark(path: Path) -> dict | None:
    if not path.exists():
        return None
    fields = _FIELDS if not path.name.endswith(".started.json") else _FIELDS[:2]
    try:
        mark = json.loads(path.read_text())
        for name, kind in fields:
            if not isinstance(mark, dict) or not isinstance(mark.get(name), kind):
                raise ValueError(f"it has no {name}")
    except ValueError as error:
        raise InputError(
            f"{path}: not readable ({error}); delete it and the stage is done again"
        ) from error
    return mark


def remove(path: Path) -> None:
    """Deletes a file or folder, if it is there; of several processes the first one does."""
    if processes.is_first():
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        bucket.removed(path)
    processes.wait(f"{path} removed")


def store(path: Path, config: Mapping[str, Any]) -> Path:
    """The judgement store of the run in `path`: asking.store of its config, or its own."""
    return Path(config.get("asking", {}).get("store") or path / STORE)


def difference(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    """One line: what changed between two stages' inputs."""
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    shown = [f"{k}: {_short(old.get(k))} -> {_short(new.get(k))}" for k in changed[:6]]
    return "; ".join(shown) + (f"; and {len(changed) - 6} more" if len(changed) > 6 else "")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def hash_path(path: Path) -> str:
    """SHA-256 (16 hex digits) of a file, or of a directory's names and files; "" for nothing."""
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path)}\0{_hash_file(file)}\0".encode())
        return digest.hexdigest()[:16]
    return _hash_file(path) if path.exists() else ""


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    size = path.stat().st_size
    with open(path, "rb") as stream:
        if size <= _WHOLE_FILE:
            while block := stream.read(2**20):
                digest.update(block)
        else:
            digest.update(f"{size}\0".encode() + stream.read(2**20))
            stream.seek(-(2**20), os.SEEK_END)
            digest.update(stream.read())
    return digest.hexdigest()[:16]


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start
