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


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """In here SIGTERM stops this program in order; behind it stands what stood before.

    Of several processes each has jax's own handler, which tells the others.
    """
    _State.asked = False
    if processes.count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _told)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
