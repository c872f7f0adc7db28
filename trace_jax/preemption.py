"""SIGTERM: this job is about to be taken away. Training saves its step; other stages just stop.

Every stage goes on from what it left on disk, so nothing but the running step is lost. Of several
processes jax makes all agree on one step (`multihost_utils.reached_preemption_sync_point`).
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

from trace_jax import processes

EXIT_CODE = 75  # a temporary failure (sysexits.h): start the same command again


class Preempted(BaseException):
    """The job was told to go. Its text says what was saved."""


class _State:
    asked = False  # SIGTERM came
    stepping = False  # training runs, and looks for itself


def watch() -> None:
    """Lets SIGTERM stop this program in order, from here on.

    Of several processes each has jax's own handler, which tells the others.
    """
    if processes.count() == 1 and threading.current_thread() is threading.main_thread():
        _State.asked = False
        signal.signal(signal.SIGTERM, _told)


def _told(*_) -> None:
    _State.asked = True
    if not _State.stepping:
        raise Preempted("between two steps of work")


@contextlib.contextmanager
def stepping() -> Iterator[None]:
    """In here SIGTERM waits for `due`."""
    _State.stepping = True
    try:
        yield
    finally:
        _State.stepping = False


def due(step: int) -> bool:
    """Whether to save and stop after `step` updates; to be asked after every one."""
    if processes.count() == 1:
        return _State.asked
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)
