"""Which of the processes of a run this is: the first one writes files, all meet at barriers.

Every process runs the same stages on the same host data; jax arrays lie over all of them. All
see the workdir: it is on a shared file system, or in a bucket (`bucket.py`), and then files travel
when the processes meet. Imports jax only once `start` was called.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

from trace_jax import errors, heartbeat
from trace_jax.errors import InputError

_KEYS = "trace_jax/"  # in the store of jax's coordination service, where `tell` writes
_LEAVING = "leaving/"
_TOGETHER_S = 300.0  # how long one that leaves waits for the others


@dataclasses.dataclass
class _This:
    index: int = 0
    count: int = 1


class Shared(Protocol):
    """A workdir that every process has a copy of."""

    def publish(self) -> int:
        """Gives what changed here to the others; a number that grows when something did."""

    def fetch(self, versions: list[int]) -> None:
        """Takes what the others gave, by the numbers of all processes."""


_this = _This()
shared: Shared | None = None


def start(coordinator: str | None, count: int | None, index: int | None, *, auto: bool) -> None:
    """Joins the other processes; before any device is touched.

    coordinator: HOST:PORT of process 0. auto: let jax find out (TPU pod, SLURM, MPI).
    """
    given = [value is not None for value in (coordinator, count, index)]
    if not any(given) and not auto:
        return
    if any(given) and not all(given):
        raise InputError("--coordinator, --processes and --process go together; give all three")
    if all(given) and not 0 <= index < count:
        raise InputError(f"--process={index} must lie in 0..{count - 1} (--processes={count})")
    if coordinator is not None:
        _check_address(coordinator)
    import jax

    # On CPU two programs in flight may run in either order, and their collectives would not match.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_enable_preemption_service", False)  # `preemption` does that
    try:
        if auto and not all(given):
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, count, index)
    except (RuntimeError, ValueError) as error:
        what = str(error).strip().splitlines()[0]
        late = isinstance(error, RuntimeError)  # a host may come up after the others
        raise (errors.Unavailable if late else InputError)(
            f"the processes did not find each other ({what}); is process 0 at "
            f"{coordinator or 'the address that jax found'} up, and reachable from here?"
        ) from error
    _this.index, _this.count = jax.process_index(), jax.process_count()
    if jax.default_backend() == "cpu":
        # Programs out of the cache start their collectives in another order than compiled ones.
        jax.config.update("jax_enable_compilation_cache", False)


def _check_address(coordinator: str) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InputError(
            f"--coordinator={coordinator}: give HOST:PORT of process 0, such as localhost:1234, "
            "with a port that is free there"
        )


def is_first() -> bool:
    """Whether this process writes."""
    return _this.index == 0


def index() -> int:
    """Which of the processes this is."""
    return _this.index


def count() -> int:
    """How many processes there are."""
    return _this.count


def wait(name: str) -> None:
    """Returns once every process has come here."""
    if _this.count > 1:
        from jax.experimental import multihost_utils

        mine = None if shared is None else shared.publish()
        with heartbeat.doing(f"{heartbeat.WAITING} ({name})"):
            if mine is None:
                multihost_utils.sync_global_devices(name)
                return
            import numpy as np

            versions = multihost_utils.process_allgather(np.int32(mine)).tolist()
        shared.fetch(versions)


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` gives on the first process, on every process; it must be JSON.

    Raises:
      InputError: on every process, what `make` raised on the first.
    """
    if _this.count == 1:
        return make()
    import numpy as np
    from jax.experimental import multihost_utils

    data = json.dumps(_outcome(make)).encode() if is_first() else b""
    with heartbeat.doing(f"{heartbeat.WAITING} (for what the first one found)"):
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
        padded = np.frombuffer(data.ljust(size), np.uint8)
        kind, value = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
    if kind != "value":
        raise (errors.Unavailable if kind == "unavailable" else InputError)(value)
    return value


def _outcome(make: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "value", make()
    except InputError as error:
        again = errors.exit_code(error) == errors.AGAIN
        return "unavailable" if again else "error", str(error)


def tell(key: str, value: str = "") -> None:
    """Tells the other processes, none of which has to listen now; the last value of a key holds."""
    _store().key_value_set(_KEYS + key, value, allow_overwrite=True)


def heard(key: str) -> dict[str, str]:
    """What was told under `key` by any process: what follows `key` there -> value."""
    rows = _store().key_value_dir_get(_KEYS)
    start = _KEYS + key
    return {name.removeprefix(start): value for name, value in rows if name.startswith(start)}


def heard_leaving() -> tuple[int, int] | None:
    """(process, its exit code) of one that leaves after an error or was told to go."""
    return next(((int(i), int(code)) for i, code in heard(_LEAVING).items()), None)


def leave(code: int) -> int:
    """The exit code; not 0, all processes are told, met for a bounded time, and end together.

    Who ended alone would take the others with it: its launcher kills them while they still write,
    and without the first one, which has the store, jax aborts them.
    """
    if not code or _this.count == 1:
        return code
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        tell(f"{_LEAVING}{_this.index}", str(code))
        _store().wait_at_barrier(f"{_KEYS}end", int(_TOGETHER_S * 1000))
        _store().shutdown()
        _answered()  # from here on nobody needs the first one
    except Exception as error:  # jax has no class for it; who is missing is missing
        print("warning: not all processes ended together:", error, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def _store():
    return _coordination().client


def _answered() -> None:
    """Returns, on the first process, once the others have its service's last answers.

    jax aborts who hears nothing of its own shutdown.
    """
    service = _coordination().service
    if service is not None:
        service.shutdown()


def _coordination():
    from jax._src import distributed  # jax has no other way to its coordination service

    return distributed.global_state
