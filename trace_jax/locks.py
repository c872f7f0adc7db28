"""One run at a time in a workdir: a lock that ends with its owner, however that ends."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trace_jax import heartbeat, metrics, processes
from trace_jax.errors import InputError

NAME = ".lock"
_BUSY = (errno.EAGAIN, errno.EACCES)
_LEASE = 120.0  # seconds for which a file server keeps the locks of a machine that is gone
_NOT_HERE = (errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK)  # some network file systems


@contextlib.contextmanager
def of(directory: Path) -> Iterator[None]:
    """Holds the workdir; of several processes the first one does.

    The system drops the lock with the process that holds it, so none is left behind by a kill.

    Raises:
      InputError: on every process, where another run holds it, or it cannot be written to.
    """
    held: list[int] = []

    def take() -> None:
        held.append(_taken(Path(directory)))

    processes.from_first(take)
    try:
        yield
    finally:
        for descriptor in held:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)


def _taken(directory: Path) -> int:
    path = directory / NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise InputError(
            f"{directory}: cannot be written to ({error.strerror}); use another --workdir"
        ) from error
    try:
        _lock(descriptor)
    except OSError as error:
        if error.errno in _NOT_HERE:
            metrics.say(f"  warning: {directory} cannot be locked; start no second run there")
            return descriptor
        busy = error.errno in _BUSY
        if not (busy and _outlasted(descriptor, directory)):
            os.close(descriptor)
            if not busy:
                raise
            raise InputError(
                f"{directory}: another run is at work there{_told(path)}; wait for its end, or use "
                "another --workdir"
            ) from error
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    owner = {"process": os.getpid(), "host": socket.gethostname(), "since": now}
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
    return descriptor


def _lock(descriptor: int) -> None:
    """Tries for a second: `status` looks at the lock for a moment."""
    for left in reversed(range(10)):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _BUSY or not left:
                raise
            time.sleep(0.1)


def _outlasted(descriptor: int, directory: Path) -> bool:
    """Whether a lock of another machine went away, as that of a dead one does after a while.

    A launcher starts a job again at once, here. Not waited for: a machine that gives signs of life.
    """
    owner = _owner(directory / NAME)
    if owner is None or owner["host"] == socket.gethostname():
        return False
    newest, end = _newest_sign(directory), time.monotonic() + _LEASE
    metrics.say(
        f"  {directory}: a run on {owner['host']} was at work there a moment ago; waiting until it "
        f"shows that it is, for at most {_LEASE:.0f} s"
    )
    while time.monotonic() < end and _newest_sign(directory) <= newest:
        try:
            _lock(descriptor)
            return True
        except OSError as error:
            if error.errno not in _BUSY:
                raise
    return False


def _newest_sign(directory: Path) -> float:
    """Time of the newest sign of life there, 0 where none is left: its run came to an end."""
    return max((sign["time"] for sign in heartbeat.read(directory)), default=0.0)


def _owner(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
        return {key: found[key] for key in ("process", "host", "since")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _told(path: Path) -> str:
    owner = _owner(path)
    return "" if owner is None else " (process {process} on {host}, since {since})".format(**owner)
