"""SIGTERM: this job is about to be taken away. Training saves its step; other stages just stop.

Every stage goes on from what it left on disk, so nothing but the running step is lost.

Of several processes, one that is told tells the others through jax's coordination service, where a
thread of each listens: a process that waits in a collective runs no handler. All count the same
sync points, over the whole run: every step of a training, and its end. Each says how far it is; all
stop at the furthest, or where that one is in a training, at its next. So a step is saved by all,
and whoever is behind goes on until no other needs it.
"""

import contextlib
import dataclasses
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

from trace_jax import bucket, errors, metrics, processes

EXIT_CODE = errors.AGAIN

_POLL_S = 1.0
_AGREE_S = 60.0  # for the others to say how far they are
_STUCK_S = 15.0  # for a main thread that has to stop and waits in a collective
_UNWINDING_S = 900.0  # for one that stops: it writes what it has
_PUBLISH_S = 60.0


class Preempted(BaseException):
    """The job was told to go. Its text says what was saved."""


@dataclasses.dataclass
class _State:
    at: int = 0  # sync points that this process has passed
    stepping: bool = False  # in a training, which looks for itself
    target: int | None = None  # the sync point to stop at
    left: float | None = None  # time.monotonic() at which the main thread began to stop

    def next_stop(self) -> int:
        return self.at + self.stepping

    def has_to_stop(self) -> bool:
        return self.target is not None and self.at >= self.target


_state = _State()
_lock = threading.RLock()  # held while the processes agree: nobody passes a sync point then


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """In here SIGTERM stops this program in order; behind it stands what stood before."""
    global _state
    _state = _State()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _told)
    try:
        with _listening() if processes.count() > 1 else contextlib.nullcontext():
            yield
    except errors.InputError:
        raise
    except Exception as error:
        if _state.target is None or processes.count() == 1:
            raise
        raise Preempted("while the processes were leaving") from error
    finally:
        # Who leaves with others meets them first, and may be told once more.
        ends = _state.target is not None and processes.count() > 1
        signal.signal(signal.SIGTERM, signal.SIG_IGN if ends else before)
        _state = _State()


def _told(*_) -> None:
    with _lock:
        if processes.count() == 1 and _state.target is None:
            _state.target = _state.next_stop()
    _stop_here()


def _stop_here() -> None:
    with _lock:
        if _state.stepping or not _state.has_to_stop() or _state.left is not None:
            return
        _state.left = time.monotonic()
    raise Preempted("between two steps of work")


@contextlib.contextmanager
def stepping() -> Iterator[None]:
    """In here SIGTERM waits for `due`.

    Raises:
      Preempted: it came before the training, or after its last step.
    """
    with _lock:
        _state.stepping = not _state.has_to_stop()
    _stop_here()
    try:
        yield
    finally:
        with _lock:
            _state.stepping = False
            _state.at += 1
    _stop_here()


def due() -> bool:
    """Whether to save this step and stop; to be asked once after every step."""
    with _lock:
        _state.at += 1
        if _state.has_to_stop():
            _state.left = time.monotonic()
            return True
        return False


@contextlib.contextmanager
def _listening() -> Iterator[None]:
    """In here a thread hears this process's SIGTERM and the other processes."""
    ears, mouth = os.pipe()
    os.set_blocking(mouth, False)
    before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    ended = threading.Event()
    thread = threading.Thread(target=_listen, args=(ears, ended), name="preemption", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(mouth)  # wakes the thread
        thread.join()
        os.close(ears)


def _listen(ears: int, ended: threading.Event) -> None:
    told = False
    while not ended.is_set():
        if select.select([ears], [], [], _POLL_S)[0]:
            told = told or signal.SIGTERM in os.read(ears, 4096)
        try:
            if told:
                processes.tell("asked")
            if processes.heard("asked"):
                with _lock:
                    _state.target = _agreed()
                break
            other = processes.heard_leaving()
        except Exception as error:  # jax has no class for it: the first process is gone
            if not told:
                continue  # whoever needs it hears of it
            metrics.warn(f"the other processes could not be told ({error})")
            with _lock:
                _state.target = _state.next_stop()
            break
        if other is not None and not ended.wait(_STUCK_S):
            _end(other[1], f"process {other[0]} ended with {other[1]}; see what it said")
    _see_off(ended)


def _agreed() -> int:
    """The sync point to stop at, from what all processes say; the same on each."""
    processes.tell(f"at/{processes.index()}", str(_state.next_stop()))
    end = time.monotonic() + _AGREE_S
    while True:
        said = processes.heard("at/")
        if len(said) == processes.count() or time.monotonic() > end:
            return max(int(at) for at in said.values())
        time.sleep(0.1)


def _see_off(ended: threading.Event) -> None:
    """Returns once the main thread has left; where it cannot, ends the process."""
    since = None
    while not ended.wait(0.1):
        now = time.monotonic()
        with _lock:
            late = _state.left is not None and now - _state.left > _UNWINDING_S
            if _state.left is None and _state.has_to_stop():
                if since is None:
                    since = now
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
                late = now - since > _STUCK_S
        if late:
            _end(EXIT_CODE, "preempted (while waiting); the same command goes on from here")


def _end(code: int, line: str) -> None:
    """Ends the process from this thread; what it wrote goes to the bucket."""
    print(line, file=sys.stderr)
    closing = threading.Thread(target=bucket.close, daemon=True)
    closing.start()
    closing.join(_PUBLISH_S)
    processes.leave(code)
