"""Objects of a bucket (gs://), through etils.epath and gcsfs: local copies, one-line errors.

Environment: TRACE_JAX_CACHE, the folder for local copies (default ~/.cache/trace_jax).
"""

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trace_jax import errors, metrics
from trace_jax.errors import InputError

SCHEME = "gs://"
_BLOCK = 16 * 2**20
_WAITS = (2.0, 5.0, 15.0, 30.0, 60.0)  # seconds between tries; gcsfs tries for half a minute each
_in_vain = False  # the last wait for a bucket


def is_remote(path: str | os.PathLike) -> bool:
    """Whether it names something in a bucket."""
    return os.fspath(path).startswith(SCHEME)


def local(path: str | os.PathLike) -> Path:
    """A local copy of a model or data in a bucket, fetched once; a local path as it is.

    Raises:
      InputError: it is not there, or cannot be read.
    """
    return _fetched(os.fspath(path)) if is_remote(path) else Path(path)


@functools.cache  # a process sees one state of it, and asks the bucket once
def _fetched(path: str) -> Path:
    remote = open_path(path)
    copy = cache("copies", path) / remote.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    with open(copy.parent / ".lock", "w") as lock, told(path):
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes here, one fetches
        files = patiently(path, lambda: _files(remote))
        if files is None:
            raise InputError(f"{path}: no such object or folder in the bucket; check the path")
        names = {file.name for file, _ in files}
        for stale in copy.iterdir() if copy.is_dir() else ():
            if stale.name not in names:
                stale.unlink()
        for file, found in files:
            target = copy if file is remote else copy / file.name
            if target.exists() and token(target) == f"{found.length}-{nanoseconds(found.mtime)}":
                continue
            metrics.say(f"  fetching {file} ({found.length / 2**20:.0f} MiB)")
            download(file, target, nanoseconds(found.mtime))
    return copy


def _files(remote: Any) -> list[tuple[Any, Any]] | None:
    """(object, its stat) of a folder's objects, or of the object itself; None: nothing is there."""
    if not remote.exists():
        return None
    files = [p for p in remote.iterdir() if not p.is_dir()] if remote.is_dir() else [remote]
    return [(file, file.stat()) for file in files]


def open_path(url: str) -> Any:
    """The `epath.Path`, ready to be used."""
    # What new kinds of buckets need first asks another service for the kind of this one.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fsspec.config
        import gcsfs  # noqa: F401  (epath reaches buckets through it)
        from etils import epath
    except ImportError as error:
        raise InputError(
            f"{url}: buckets need gcsfs; install it with pip install -e '.[gcs]' in the checkout"
        ) from error
    # What it lists is not remembered: other processes write there too.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    for name in ("gcsfs", "google.auth._default"):  # what goes wrong, `_told` says
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return epath.Path(url)


def cache(kind: str, url: str) -> Path:
    """A folder of this machine for what is at `url`."""
    root = Path(os.environ.get("TRACE_JAX_CACHE") or Path.home() / ".cache" / "trace_jax")
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    return root / kind / f"{url.rpartition('/')[2]}-{digest}"


def token(file: Path) -> str:
    """What tells one content of a file from another: bytes and time of the last change."""
    found = file.stat()
    return f"{found.st_size}-{found.st_mtime_ns}"


def nanoseconds(seconds: float) -> int:
    """Of a time in seconds, to the microsecond."""
    return int(seconds * 1e6) * 1000


def patiently(url: Any, operation: Callable[[], Any]) -> Any:
    """What `operation` gives, which may be done twice; tried again while the bucket fails.

    What it raises in the end, or for another reason, is for `told`. Once it was waited for in
    vain, nothing waits again before something succeeds.
    """
    global _in_vain
    for wait in () if _in_vain else _WAITS:
        try:
            return operation()
        except Exception as error:  # see `told`
            if not _passes(error):
                raise
            metrics.warn(f"{url}: the bucket fails ({_words(error)}); next try in {wait:.0f} s")
        time.sleep(wait)
    _in_vain = True
    found = operation()
    _in_vain = False
    return found


def upload(file: Path, remote: Any) -> None:
    """Writes a local file to the bucket."""

    def write() -> None:
        remote.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "rb") as source, remote.open("wb") as target:
            shutil.copyfileobj(source, target, _BLOCK)

    patiently(remote, write)


def download(remote: Any, file: Path, mtime_ns: int) -> None:
    """Writes an object to a local file, whole or not at all, with that time of last change."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")

    def read() -> None:
        with remote.open("rb") as source, open(temporary, "wb") as target:
            shutil.copyfileobj(source, target, _BLOCK)

    patiently(remote, read)
    os.utime(temporary, ns=(mtime_ns, mtime_ns))
    os.replace(temporary, file)


@contextlib.contextmanager
def told(url: str) -> Iterator[None]:
    """Whatever a bucket answers with becomes one line: `Unavailable` what passes by itself."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # gcsfs, aiohttp, google.auth and the system each have their own
        if _passes(error):
            raise errors.Unavailable(
                f"{url}: the bucket cannot be reached ({_words(error)}); run the same command "
                "again once it, and the network, are back"
            ) from error
        raise InputError(
            f"{url}: the bucket cannot be used ({_words(error)}); check its name, the network, and "
            "that this machine may write there (gcloud auth application-default login), then run "
            "the same command again"
        ) from error


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _passes(error: BaseException) -> bool:
    """Whether the bucket, or the way to it, is out of order for a while: no 403, no 404."""
    import aiohttp
    import google.auth.exceptions
    import requests

    code = getattr(error, "code", getattr(error, "status", None))
    if str(code).isdigit():
        return int(code) in (408, 429) or int(code) >= 500
    if getattr(error, "retryable", False) or errors.exit_code(error) == errors.AGAIN:
        return True
    connection = (
        ConnectionError,
        TimeoutError,
        aiohttp.ClientConnectionError,
        aiohttp.ClientPayloadError,
        google.auth.exceptions.TransportError,
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
        requests.exceptions.ContentDecodingError,
    )
    return isinstance(error, connection)
