"""Workdirs in a bucket (gs://): worked on in local copies.

A run in a bucket works in a folder of this machine. What it writes goes to the bucket whenever
processes meet, before a checkpoint, when a stage ends, and every half minute; what other processes
wrote comes from there. Checkpoints are written to the bucket itself (Orbax).
`.files/PROCESS-VERSION.json` says which files the bucket has: it is written after those that are
new and before those that are gone are deleted, so a kill in between leaves the list before.
"""

import contextlib
import functools
import hashlib
import json
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trace_jax import bucket_owner, locks, metrics, processes, records, remote, snapshots
from trace_jax.errors import InputError

CHECKPOINTS = ".checkpoints"  # folder of the bucket that Orbax writes to
_FILES, _ID, _STATE = ".files", ".id", ".bucket.json"
_PERIOD = 30.0  # seconds between two looks at what is new
_AT_WORK = (".stages", ".responses")  # hidden, with files that are written whole or not at all
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
    # Before anything here is changed: a run may be at work.
    with locks.of(mirror.local.parent), mirror.taken():
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
        return bucket_owner.heard_of(remote.open_path(os.fspath(path)))


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
        _active.check_owner()
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
        self._owner = bucket_owner.Owner(self.url, self.local.parent)
        self._is_view = kind == "views"
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._known: dict[str, tuple[int, str | None]] = {}  # name -> (generation, token)
        self._own: dict[str, tuple[int, str | None]] = {}
        self._synced: dict[str, str] = {}  # name -> token here when it was as the bucket has it
        self._seen: dict[int, int] = {}  # process -> version of its list that was read
        self._gone: set[str] = set()  # objects that no list may name before they are deleted
        self._id = ""
        self._listed_as = ""  # hash of this process's newest list
        self._at: dict[str, dict] = {}  # such a hash -> what was known and synced with that list
        self._version = 0
        self._listed = True  # the list in the bucket has all that went there
        self._thread: threading.Thread | None = None
        self._closed = False

    def pull(self, *, weights: bool = True) -> None:
        """Makes the local copy what the bucket has; without `weights`, leaves out safetensors.

        If nobody wrote there since this machine did last, this machine is ahead: what it has stays,
        and goes there with the next `publish`; what other processes of its run wrote is brought.
        """
        with remote.told(self.url), self._lock:
            lists = remote.patiently(self.url, self._lists)
            for index, (version, text) in sorted(lists.items()):
                self._merge(json.loads(text))
                self._seen[index] = version
            self._version, own = lists.get(processes.index(), (0, ""))
            self._listed_as = _digest(own)
            self._id = "" if self._is_view else self._identify()
            left = self._left()
            self._synced = dict(left["synced"]) if left else {}
            for name, (generation, token) in self._known.items():
                if not weights and name.endswith(".safetensors"):
                    continue
                same = left is not None and left["known"].get(name) == [generation, token]
                if not (same and (name in self._synced or (self.local / name).exists())):
                    self._bring(name, token)
            if left is None:
                for name in self._scan(everything=True).keys() - self._synced.keys():
                    (self.local / name).unlink()
            if processes.is_first():
                self._own = dict(self._known)
            if not self._is_view:
                self._remember({self._listed_as: self._now()})

    def _identify(self) -> str:
        """What tells the workdir from one that was there before and was deleted."""
        file = self.remote / _ID

        def found() -> str:
            if processes.is_first() and not file.exists():
                self.remote.mkdir(parents=True, exist_ok=True)
                file.write_text(uuid.uuid4().hex)
            return file.read_text()

        return remote.patiently(file, found)

    def _left(self) -> dict[str, dict] | None:
        """What was known and synced here, if the bucket has the list that was written with it."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            state = json.loads((self.local / _STATE).read_text())
            at = state["at"].get(self._listed_as) if self._id and state["id"] == self._id else None
            return at and {key: at[key] for key in ("known", "synced")}
        return None

    def _now(self) -> dict[str, dict]:
        return {"known": dict(self._known), "synced": dict(self._synced)}

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
            self.check_owner()
            self._listed = False
            generation = self._generation() + 1
            for name in gone:
                del self._synced[name]
                self._known[name] = self._own[name] = (generation, None)
                self._gone.add(name)
            for name in sorted(changed, key=lambda n: (n.startswith(".stages/"), n)):
                with contextlib.suppress(FileNotFoundError):  # gone since it was seen
                    seen = snapshots.token(self.local / name)
                    with snapshots.readable(self.local / name) as file:
                        token = remote.token(file)
                        remote.upload(file, self.remote / name)
                    self._synced[name] = seen
                    self._known[name] = self._own[name] = (generation, token)
                    self._gone.discard(name)
            self._list()
            for name in sorted(self._gone):
                file = self.remote / name
                remote.patiently(file, functools.partial(file.unlink, missing_ok=True))
                self._gone.discard(name)
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
            self._remember({self._listed_as: self._now()})

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """In here the bucket says that this run is at work there; or until `close`.

        Raises:
          InputError: another one is.
        """
        processes.from_first(self._take)
        try:
            yield
        finally:
            self._owner.release()

    def _take(self) -> None:
        self._owner.take()
        with remote.told(self.url):
            self._identify()  # before other processes look for it

    def check_owner(self) -> None:
        """Nothing where this run still has the workdir, else an InputError: another one has it."""
        if processes.is_first():
            self._owner.check()

    def start(self) -> None:
        """Publishes from time to time until `close`."""
        self._thread = threading.Thread(target=self._publish_again, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Publishes once more and gives the workdir free."""
        if self._closed:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.publish()
            self._closed = True
        finally:
            self._owner.release()

    def _publish_again(self) -> None:
        while not self._stop.wait(_PERIOD):
            try:
                self.publish(everything=False)
            except InputError as error:  # the next try, or the end of the stage, may go better
                metrics.warn(str(error))

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
            try:
                remote.download(self.remote / name, here, int(token.partition("-")[2]))
            except FileNotFoundError:  # deleted since the list was written
                return self._bring(name, None)
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
        self.check_owner()  # uploads may have taken long
        self._version += 1
        folder, text = self.remote / _FILES, json.dumps(self._own)
        newest, oldest = (
            folder / _list_name(processes.index(), version)
            for version in (self._version, self._version - _LISTS)
        )

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            newest.write_text(text)
            oldest.unlink(missing_ok=True)

        before, self._listed_as = list(self._at.items())[-_LISTS:], _digest(text)
        # A kill, or a bucket that fails, leaves one of them there.
        self._remember(dict(before) | {self._listed_as: self._now()})
        remote.patiently(newest, write)
        self._at = {self._listed_as: self._now()}
        self._listed = True

    def _remember(self, at: dict[str, dict]) -> None:
        """What to go on from here, by the list that is then in the bucket."""
        self._at = at
        file = self.local / _STATE
        temporary = file.with_name(f"{_STATE}.tmp")
        temporary.write_text(json.dumps({"id": self._id, "at": at}))
        records.sync(temporary)
        temporary.replace(file)

    def _generation(self) -> int:
        return max((generation for generation, _ in self._known.values()), default=0)

    def _scan(self, *, everything: bool) -> dict[str, str]:
        """Name -> token of the files here; without `everything`, none that is being written."""
        found, is_first = {}, processes.is_first()
        for folder, folders, names in os.walk(self.local):
            at = Path(folder).relative_to(self.local)
            folders[:] = [
                f for f in folders if everything or not f.startswith(".") or f in _AT_WORK
            ]
            for name in names:
                if name.endswith(".tmp") or (at == Path() and name in (_STATE, ".lock")):
                    continue
                if snapshots.is_beside(name) or (snapshots.is_database(name) and not is_first):
                    continue  # the first process alone writes the store
                with contextlib.suppress(FileNotFoundError):
                    found[(at / name).as_posix()] = snapshots.token(Path(folder, name))
        return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest() if text else ""


def _list_name(index: int, version: int) -> str:
    return f"{index}-{version}.json"


def _inside(name: str) -> bool:
    return bool(name) and not name.startswith("/") and ".." not in name.split("/")
