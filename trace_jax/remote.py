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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trace_jax import metrics
from trace_jax.errors import InputError

SCHEME = "gs://"
_BLOCK = 16 * 2**20


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
        if not remote.exists():
            raise InputError(f"{path}: no such object or folder in the bucket; check the path")
        files = [p for p in remote.iterdir() if not p.is_dir()] if remote.is_dir() else [remote]
        names = {file.name for file in files}
        for stale in copy.iterdir() if copy.is_dir() else ():
            if stale.name not in names:
                stale.unlink()
        for file in files:
            target = copy / file.name if remote.is_dir() else copy
            found = file.stat()
            if target.exists() and token(target) == f"{found.length}-{nanoseconds(found.mtime)}":
                continue
            metrics.say(f"  fetching {file} ({found.length / 2**20:.0f} MiB)")
            download(file, target, nanoseconds(found.mtime))
    return copy


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
            f"{url}: buckets need gcsfs; install it with pip install 'trace_jax[gcs]'"
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


def upload(file: Path, remote: Any) -> None:
    """Writes a local file to the bucket."""
    remote.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "rb") as source, remote.open("wb") as target:
        shutil.copyfileobj(source, target, _BLOCK)


def download(remote: Any, file: Path, mtime_ns: int) -> None:
    """Writes an object to a local file, whole or not at all, with that time of last change."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    with remote.open("rb") as source, open(temporary, "wb") as target:
        shutil.copyfileobj(source, target, _BLOCK)
    os.utime(temporary, ns=(mtime_ns, mtime_ns))
    os.replace(temporary, file)


@contextlib.contextmanager
def told(url: str) -> Iterator[None]:
    """Whatever a bucket answers with becomes one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # gcsfs, aiohttp, google.auth and the system each have their own
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{url}: the bucket cannot be used ({what}); check its name, the network, and that "
            "this machine may write there (gcloud auth application-default login), then run the "
            "same command again"
        ) from error
