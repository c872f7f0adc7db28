"""Copies of SQLite files while others write them: a file and its log, read apart, fit together by
luck alone."""

import contextlib
import sqlite3
from pathlib import Path

from trace_jax import remote
from trace_jax.errors import InputError

_ENDING, _LOG = ".sqlite", "-wal"
_BESIDE = (f"{_ENDING}{_LOG}", f"{_ENDING}-shm", f"{_ENDING}-journal")


def is_database(name: str) -> bool:
    """Whether a file is one of which `readable` gives a copy."""
    return name.endswith(_ENDING)


def is_beside(name: str) -> bool:
    """Whether a file belongs to a database of which copies are whole without it."""
    return name.endswith(_BESIDE)


def token(file: Path) -> str:
    """`remote.token`; of a database it changes with what is in its log as well.

    Raises:
      FileNotFoundError: there is no such file.
    """
    found = remote.token(file)
    if file.name.endswith(_ENDING):
        with contextlib.suppress(FileNotFoundError):
            found += "+" + remote.token(file.with_name(file.name + _LOG))
    return found


@contextlib.contextmanager
def readable(file: Path):
    """The file itself, or of a database a copy of what it was at one moment.

    Raises:
      InputError: the copy cannot be written.
    """
    if not file.name.endswith(_ENDING):
        yield file
        return
    copy = file.with_name(file.name + ".tmp")
    copy.unlink(missing_ok=True)
    try:
        yield copy if _copied(file, copy) else file
    finally:
        copy.unlink(missing_ok=True)


def _copied(file: Path, copy: Path) -> bool:
    """Whether there was a database to copy: what cannot be read goes on as the bytes that it is."""
    try:
        with (
            contextlib.closing(sqlite3.connect(file, timeout=60.0)) as live,
            contextlib.closing(sqlite3.connect(copy)) as target,
        ):
            live.backup(target)
    except sqlite3.OperationalError as error:
        raise InputError(f"{file}: cannot be copied ({error}); make room on the disk") from error
    except sqlite3.DatabaseError:
        return False
    return True


def forget_log(file: Path) -> None:
    """Deletes what an earlier state of a database, about to be replaced, has beside it."""
    if file.name.endswith(_ENDING):
        for ending in _BESIDE:
            file.with_name(file.name.removesuffix(_ENDING) + ending).unlink(missing_ok=True)
