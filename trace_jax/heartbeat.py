"""A sign of life of every process: what it does, since when; and a word when nothing moves.

A thread writes .heartbeats/PROCESS.json into the workdir, where `status` and the other processes
read it: a collective that one process never enters leaves all others waiting without a word.
"""

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FOLDER = ".heartbeats"
WAITING = "waiting for the other processes"
_INTERVAL_S = 10.0
_KEYS = ("process", "host", "pid", "doing", "since", "time")
_DEAD_AFTER_S = 2.5 * _INTERVAL_S  # without a sign


@dataclasses.dataclass
class _Work:
    """What is done; of work that is counted, how far it is."""

    what: str
    total: int | None
    first: int  # items that an earlier run had done; of speeds, that were done when `began`
    began: float  # time.monotonic; from the first count on of that
    done: int | None = None
    counted: float = 0.0  # time.monotonic of the last count


@dataclasses.dataclass
class _State:
    doing: list[_Work] = dataclasses.field(default_factory=list)
    detail: str = ""  # how far the last of them is
    moved: float = 0.0  # time.monotonic

    def move(self, detail: str) -> None:
        self.detail, self.moved = detail, time.monotonic()

    def counted(self) -> dict[str, Any] | None:
        """The innermost work that is counted."""
        work = next((w for w in reversed(self.doing) if w.done is not None), None)
        return work and {"what": work.what, "first": work.first, "done": work.done,
                         "total": work.total, "seconds": work.counted - work.began}  # fmt: skip

    def __str__(self) -> str:
        return " ".join(filter(None, [", ".join(w.what for w in self.doing), self.detail]))


_state = _State()


@contextlib.contextmanager
def doing(what: str, total: int | None = None, first: int = 0) -> Iterator[None]:
    """In here this process does `what`. total, first: items in all, and done by an earlier run."""
    _state.doing.append(_Work(what, total, first, time.monotonic()))
    _state.move("")
    try:
        yield
    finally:
        _state.doing.pop()
        _state.move("")


def moved(detail: str = "", done: int | None = None) -> None:
    """Something was done, nothing is stuck.

    detail: how far the work is, as in "14/150". done: the same as a number, for `status`.
    """
    _state.move(detail)
    if done is not None and _state.doing:
        work = _state.doing[-1]
        if work.done is None and done > work.first:  # what was compiled for it is no speed
            work.first, work.began = done, _state.moved
        work.done, work.counted = done, _state.moved


@contextlib.contextmanager
def beating(
    directory: Path, *, stuck_after: float, process: int = 0, processes: int = 1,
    interval: float = _INTERVAL_S, say: Callable[[str], None] = print,
) -> Iterator[None]:  # fmt: skip
    """In here the thread beats.

    stuck_after: seconds without progress after which `say` is told what this
    process is doing, and who keeps it waiting; again after twice as long, and so on. 0: never.
    """
    folder, ended = Path(directory) / FOLDER, threading.Event()
    _state.move("")
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)

    def beat() -> None:
        told = stuck_after
        while True:
            still = time.monotonic() - _state.moved
            _write(folder / f"{process}.json", process, still)
            if still < stuck_after:
                told = stuck_after
            elif stuck_after and still >= told:
                told *= 2
                say(_stuck(folder, process, processes, still))
            if ended.wait(interval):
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=interval)
        with contextlib.suppress(OSError):
            (folder / f"{process}.json").unlink()
            folder.rmdir()  # the last one out


def _write(path: Path, process: int, still: float) -> None:
    now = time.time()
    told = {"process": process, "host": socket.gethostname(), "pid": os.getpid(), "time": now,
            "doing": str(_state), "since": now - still, "work": _state.counted()}  # fmt: skip
    temporary = path.with_suffix(".tmp")
    with contextlib.suppress(OSError):  # the disk is full or gone: others see an old sign
        temporary.write_text(json.dumps(told))
        temporary.replace(path)


def read(directory: Path) -> list[dict[str, Any]]:
    """Signs of all processes of a run, in their order; what cannot be read is left out.

    Each is {"process", "host", "pid", "doing", "since", "time", "work"}, times in seconds of the
    epoch; work is None or {"what", "first", "done", "total", "seconds"}: items done by an earlier
    run, by now and in all (None where not known), and how long this run took for its own.
    """
    found = []
    for path in (Path(directory) / FOLDER).glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            row = json.loads(path.read_text())
            found.append({k: row[k] for k in _KEYS} | {"work": row.get("work")})
    return sorted(found, key=lambda row: row["process"])


def is_dead(row: dict[str, Any], now: float | None = None) -> bool:
    """Whether a sign is so old that its process must be gone, or its machine stands still."""
    return (now or time.time()) - row["time"] > _DEAD_AFTER_S


def _stuck(folder: Path, process: int, processes: int, still: float) -> str:
    mine = str(_state)
    line = f"no progress for {still:.0f} s: {mine or 'between two stages'}"
    others = [row for row in read(folder.parent) if row["process"] != process]
    missing = set(range(processes)) - {process} - {row["process"] for row in others}
    late = [
        f"process {row['process']} on {row['host']} "
        + ("gives no sign of life" if is_dead(row) else f"does: {row['doing']}")
        for row in others
        if is_dead(row) or row["doing"] != mine  # else it waits here as well
    ]
    late += [f"process {i} has not begun, or is gone" for i in sorted(missing)]
    return line + ("; " + "; ".join(late) if late else "")
