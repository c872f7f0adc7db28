"""Who is at work in a workdir in a bucket: one run, which gives a sign of life every half minute.

Objects cannot be locked. `.owner.json` says who is there, from before a run reads the workdir until
all that it wrote is there; a run that finds another's in place of its own writes nothing more.
"""

import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from trace_jax import metrics, remote
from trace_jax.errors import InputError

_NAME = ".owner.json"
_COPY = ".copy"  # beside the local copies of a machine's processes: which copies they are
_PERIOD = 30.0  # seconds between two signs of life
_STALE = 4 * _PERIOD  # an owner that was silent for so long is dead
_LOOK = 2.0  # seconds between two looks for a sign of life of another


def heard_of(folder: Any) -> dict[str, Any] | None:
    """{"host", "process", "since", "time"} of who holds a workdir and was heard of not long ago."""
    found = _read(folder / _NAME)
    return found if found is not None and time.time() - found["time"] < _STALE else None


def _read(file: Any) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None


class Owner:
    """This run's claim to the workdir at `url`; its local copies are in `folder`, which is locked.

    Of several processes the first one has it.
    """

    def __init__(self, url: str, folder: Path):
        self.url, self._folder = url, folder
        self._remote = remote.open_path(url)
        self._file = self._remote / _NAME
        self._since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Says in the bucket that this run is at work there, and goes on saying so.

        Another machine that was there a moment ago may be gone, and a launcher starts the job here
        at once: this one waits until that one was silent for long enough.

        Raises:
          InputError: it gave another sign of life.
        """
        with remote.told(self.url):
            self._outlast()
            remote.patiently(self.url, self._sign)
            self._check()  # of two that waited for the same dead one, who signed last has it
        self._thread = threading.Thread(target=self._sign_again, name="owner", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Nothing where the workdir is still this run's, or was never taken.

        Raises:
          InputError: another run took it over, as after a long time without a way to the bucket.
        """
        if self._thread is not None:
            with remote.told(self.url):
                self._check()

    def _check(self) -> None:
        found = remote.patiently(self._file, lambda: _read(self._file))
        if found is None or not self._is_mine(found):
            by = "" if found is None else f" (on {found['host']}, since {found['since']})"
            raise InputError(
                f"{self.url}: another run took this workdir over while this one was silent{by}; "
                "this one writes nothing more there"
            )

    def release(self) -> None:
        """Gives the workdir free, if it is still this run's."""
        self._stop.set()
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        with remote.told(self.url):
            found = remote.patiently(self._file, lambda: _read(self._file))
            if found is not None and self._is_mine(found):
                remote.patiently(self._file, lambda: self._file.unlink(missing_ok=True))

    def _outlast(self) -> None:
        """Returns once nobody else is there."""
        first = remote.patiently(self.url, lambda: _read(self._file))
        if first is None or first.get("copy") == self._copy():
            return
        left = _STALE - remote.patiently(self.url, self._age)
        if left <= 0:
            return
        metrics.say(
            f"  {self.url}: a run on {first['host']} was at work there a moment ago; waiting until "
            f"it shows that it is, for at most {left:.0f} s"
        )
        end = time.monotonic() + left
        while time.monotonic() < end:
            found = remote.patiently(self.url, lambda: _read(self._file))
            if found is None:
                return
            if found["time"] != first["time"]:
                raise InputError(
                    f"{self.url}: another run is at work there (on {found['host']}, since "
                    f"{found['since']}); wait for its end, or use another --workdir"
                )
            time.sleep(_LOOK)

    def _age(self) -> float:
        """Seconds since the last sign of life, by the bucket's clock: those of machines differ."""
        probe = self._remote / f"{_NAME}.{self._copy()}"
        probe.write_text("")
        now = probe.stat().mtime
        probe.unlink(missing_ok=True)
        try:
            return now - self._file.stat().mtime
        except FileNotFoundError:  # it was given free just now
            return _STALE

    def _sign(self) -> None:
        self._remote.mkdir(parents=True, exist_ok=True)
        told = {"host": socket.gethostname(), "process": os.getpid(), "copy": self._copy()}
        self._file.write_text(json.dumps(told | {"since": self._since, "time": time.time()}))

    def _sign_again(self) -> None:
        while not self._stop.wait(_PERIOD):
            try:
                self.check()
                with remote.told(self.url):
                    self._sign()
            except InputError as error:  # who is gone for good is told when something is written
                metrics.warn(str(error))

    def _is_mine(self, found: dict[str, Any]) -> bool:
        mine = {"copy": self._copy(), "process": os.getpid(), "since": self._since}
        return all(found.get(key) == value for key, value in mine.items())

    def _copy(self) -> str:
        """What tells these local copies from others: pods of different clusters share a name."""
        file = self._folder / _COPY
        if not (file.exists() and file.read_text()):
            file.write_text(uuid.uuid4().hex)
        return file.read_text()
