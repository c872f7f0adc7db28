"""Workdirs in a bucket (gs://): worked on in local copies.

A run in a bucket works in a folder of this machine. What it writes goes to the bucket whenever
processes meet, when a stage ends, and every half minute; what other processes wrote comes from
there. Checkpoints are written to the bucket itself (Orbax). `.files/PROCESS-VERSION.json` says
which files the bucket has; it is written after them, so a kill in between leaves the list before.
"""

import contextlib
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trace_jax import locks, metrics, processes, remote, snapshots
from trace_jax.errors import InputError

CHECKPOINTS = ".checkpoints"  # folder of the bucket that Orbax writes to
_FILES, _OWNER, _STATE = ".files", ".owner.json", ".bucket.json"
_PERIOD = 30.0  # seconds between two looks at what is new
_STALE = 4 * _PERIOD  # an owner that was silent for so long is dead
_LOOK = 2.0  # seconds between two looks for a sign of life of an owner
_LISTS = 4  # lists of files that stay: a slow process may still read the one before

_active: "Mirror | None" = None


@contextlib.contextmanager
def opened(path: str | os.PathLike, *, read_only: bool = False) -> Iterator[Path]:
    """A local folder that stands for the workdir `path` while this is open; itself if it is local.

    read_only: what is there now; nothing goes back.

    Raises:
      InputError: the bucket cannot be reached or written, or another run is at work there.
    """
    global _active
    if not remote.is_remote(path):
        yield Path(path)
        return
    if read_only:
        view = Mirror(os.fspath(path), kind="views")
        view.pull(weights=False)
        yield view.local
        return
    mirror = Mirror(os.fspath(path))
    with locks.of(mirror.local.parent):  # before anything here is changed: a run may be at work
        processes.from_first(mirror.take)
        mirror.pull()
        _active, processes.shared = mirror, mirror
        mirror.start()
        ended = False
        try:
            yield mirror.local
            ended = True
        finally:
            _active, processes.shared = None, None
            try:
                mirror.close()
            except InputError as error:
                if ended:
                    raise
                metrics.warn(str(error))  # the error to tell is what ended the run


def owner(path: str | os.PathLike) -> dict[str, Any] | None:
    """{"host", "process", "since"} of the run at work in a bucket, None if none is."""
    if not remote.is_remote(path):
        return None
    with remote.told(os.fspath(path)):
        return _owner(remote.open_path(os.fspath(path)))


def publish() -> None:
    """Brings to the bucket what is new in the workdir, if that is in one."""
    if _active is not None:
        _active.publish()


def close() -> None:
    """Brings what is new to the bucket and gives the workdir free, for a run that is cut off."""
    if _active is not None:
        _active.close()


def checkpoints(directory: Path) -> Any:
    """Where the checkpoints of `directory` are: there, or for a workdir in a bucket, in the bucket
    (an `epath.Path`)."""
    directory = Path(directory).resolve()
    if _active is None:
        return directory
    return _active.remote / CHECKPOINTS / directory.relative_to(_active.local).as_posix()


def removed(path: Path) -> None:
    """Deletes the checkpoints that the bucket keeps for a folder which is gone."""
    if _active is not None:
        kept = checkpoints(path)
        with remote.told(str(kept)):
            remote.patiently(kept, lambda: kept.exists() and kept.rmtree())


class Mirror:
    """The local copy of a workdir in a bucket, as one process keeps it.

    Attributes:
      remote: the workdir in the bucket. local: its copy here.
    """

    def __init__(self, url: str, kind: str = "workdirs"):
        self.url = url.rstrip("/")
        self.remote = remote.open_path(self.url)
        self.local = (remote.cache(kind, self.url) / f"p{processes.index()}").resolve()
        self.local.mkdir(parents=True, exist_ok=True)
        self._since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._known: dict[str, tuple[int, str | None]] = {}  # name -> (generation, token)
        self._own: dict[str, tuple[int, str | None]] = {}
        self._synced: dict[str, str] = {}  # name -> token here when it was as the bucket has it
        self._seen: dict[int, int] = {}  # process -> version of its list that was read
        self._version = 0
        self._listed = True  # the list in the bucket has all that went there
        self._thread: threading.Thread | None = None

    def pull(self, *, weights: bool = True) -> None:
        """Makes the local copy what the bucket has; without `weights`, leaves out safetensors.

        If nothing was written there since this machine did last, this machine is ahead: what it has
        stays, and goes there with the next `publish`.
        """
        with remote.told(self.url), self._lock:
            for index, (version, text) in sorted(remote.patiently(self.url, self._lists).items()):
                self._merge(json.loads(text))
                self._seen[index] = version
            self._version = self._seen.get(processes.index(), 0)
            state = self._state()
            ahead = state["generation"] == self._generation()
            self._synced = dict(state["synced"]) if ahead else {}
            for name, (_, token) in self._known.items():
                if not weights and name.endswith(".safetensors"):
                    continue
                if not (ahead and (name in self._synced or (self.local / name).exists())):
                    self._bring(name, token)
            if not ahead:
                for name in self._scan(everything=True).keys() - self._synced.keys():
                    (self.local / name).unlink()
            if processes.is_first():
                self._own = dict(self._known)

    def publish(self, *, everything: bool = True) -> int:
        """Brings to the bucket what changed here; a number that grows when something did."""
        with remote.told(self.url), self._lock:
            here = self._scan(everything=everything)
            gone = [
                n
                for n in self._synced
                if snapshots.is_beside(n) or (n not in here and not (self.local / n).exists())
            ]
            changed = [n for n, token in here.items() if self._synced.get(n) != token]
            if not gone and not changed and self._listed:
                return self._version
            self._listed = False
            generation = self._generation() + 1
            for name in gone:
                file = self.remote / name
                remote.patiently(file, functools.partial(file.unlink, missing_ok=True))
                del self._synced[name]
                self._known[name] = self._own[name] = (generation, None)
            for name in sorted(changed, key=lambda n: (n.startswith(".stages/"), n)):
                with contextlib.suppress(FileNotFoundError):  # gone since it was seen
                    seen = snapshots.token(self.local / name)
                    with snapshots.readable(self.local / name) as file:
                        token = remote.token(file)
                        remote.upload(file, self.remote / name)
                    self._synced[name] = seen
                    self._known[name] = self._own[name] = (generation, token)
            self._list()
            return self._version

    def fetch(self, versions: list[int]) -> None:
        """Brings here what other processes published, by the numbers that `publish` gave them."""
        with remote.told(self.url), self._lock:
            for index, version in enumerate(versions):
                if index == processes.index() or self._seen.get(index, 0) == version:
                    continue
                self._seen[index] = version
                theirs = self.remote / _FILES / _list_name(index, version)
                for name in self._merge(json.loads(remote.patiently(theirs, theirs.read_text))):
                    self._bring(name, self._known[name][1])
            self._remember()

    def take(self) -> None:
        """Says in the bucket that this run is at work there.

        Another machine that was there a moment ago may be gone, and a launcher starts the job here
        at once: this one waits until that one was silent for long enough.

        Raises:
          InputError: it gave another sign of life.
        """
        with remote.told(self.url):
            first, began = None, time.monotonic()
            while (found := self._elsewhere()) and time.monotonic() - began < _STALE:
                if first is None:
                    first = found
                    metrics.say(
                        f"  {self.url}: a run on {first['host']} was at work there a moment ago; "
                        f"waiting until it shows that it is, for at most {_STALE:.0f} s"
                    )
                if found["time"] != first["time"]:
                    raise InputError(
                        f"{self.url}: another run is at work there (on {found['host']}, since "
                        f"{found['since']}); wait for its end, or use another --workdir"
                    )
                time.sleep(_LOOK)
            remote.patiently(self.url, self._sign)

    def _elsewhere(self) -> dict[str, Any] | None:
        found = remote.patiently(self.url, lambda: _owner(self.remote))
        return None if found is None or found["host"] == socket.gethostname() else found

    def start(self) -> None:
        """Publishes from time to time until `close`."""
        self._thread = threading.Thread(target=self._publish_again, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Publishes once more and gives the workdir free."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.publish()
        if processes.is_first():
            with remote.told(self.url):
                owner = self.remote / _OWNER
                remote.patiently(owner, lambda: owner.unlink(missing_ok=True))

    def _publish_again(self) -> None:
        while not self._stop.wait(_PERIOD):
            try:
                self.publish(everything=False)
                if processes.is_first():
                    with remote.told(self.url):
                        self._sign()
            except InputError as error:  # the next try, or the end of the stage, may go better
                metrics.warn(str(error))

    def _sign(self) -> None:
        self.remote.mkdir(parents=True, exist_ok=True)
        owner = {"host": socket.gethostname(), "process": os.getpid(), "since": self._since}
        (self.remote / _OWNER).write_text(json.dumps(owner | {"time": time.time()}))

    def _merge(self, files: dict[str, list]) -> list[str]:
        """Takes over what is newer in a list of files; the names."""
        found = []
        for name, (generation, token) in files.items():
            if not _inside(name):
                raise InputError(f"{self.url}/{_FILES}: {name!r} leaves the workdir; delete it")
            if generation > self._known.get(name, (-1, None))[0]:
                self._known[name] = (generation, token)
                found.append(name)
        return found

    def _bring(self, name: str, token: str | None) -> None:
        here = self.local / name
        if token is None:
            here.unlink(missing_ok=True)
            self._synced.pop(name, None)
            return
        if not here.exists() or snapshots.token(here) != token:
            snapshots.forget_log(here)
            remote.download(self.remote / name, here, int(token.partition("-")[2]))
        self._synced[name] = snapshots.token(here)

    def _lists(self) -> dict[int, tuple[int, str]]:
        """Process -> (version, its newest list of files, as text)."""
        folder, found = self.remote / _FILES, {}
        for file in folder.iterdir() if folder.exists() else ():
            index, _, version = file.name.removesuffix(".json").partition("-")
            newest = (int(version), file)
            found[int(index)] = max(found.get(int(index), newest), newest, key=lambda x: x[0])
        return {index: (version, file.read_text()) for index, (version, file) in found.items()}

    def _list(self) -> None:
        """Says in the bucket what files this process wrote, in a new list: others read the old."""
        self._version += 1
        folder = self.remote / _FILES
        newest, oldest = (
            folder / _list_name(processes.index(), version)
            for version in (self._version, self._version - _LISTS)
        )

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            newest.write_text(json.dumps(self._own))
            oldest.unlink(missing_ok=True)

        remote.patiently(newest, write)
        self._listed = True
        self._remember()

    def _remember(self) -> None:
        state = {"generation": self._generation(), "synced": self._synced}
        (self.local / _STATE).write_text(json.dumps(state))

    def _generation(self) -> int:
        return max((generation for generation, _ in self._known.values()), default=0)

    def _state(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.local / _STATE).read_text())
        return {"generation": 0, "synced": {}}  # ahead of a bucket where nothing was written yet

    def _scan(self, *, everything: bool) -> dict[str, str]:
        """Name -> token of the files here; without `everything`, none that is being written."""
        found = {}
        for folder, folders, names in os.walk(self.local):
            at = Path(folder).relative_to(self.local)
            folders[:] = [
                f for f in folders if everything or not f.startswith(".") or f == ".stages"
            ]
            for name in names:
                if name.endswith(".tmp") or (at == Path() and name in (_STATE, ".lock")):
                    continue
                if snapshots.is_beside(name):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found[(at / name).as_posix()] = snapshots.token(Path(folder, name))
        return found


def _owner(folder: Any) -> dict[str, Any] | None:
    """Who holds a workdir and was heard of not long ago."""
    file = folder / _OWNER
    found = json.loads(file.read_text()) if file.exists() else None
    return found if found is not None and time.time() - found["time"] < _STALE else None


def _list_name(index: int, version: int) -> str:
    return f"{index}-{version}.json"


def _inside(name: str) -> bool:
    return bool(name) and not name.startswith("/") and ".." not in name.split("/")
