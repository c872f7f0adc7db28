"""What a user sees of what went wrong: one line, that does nothing to a terminal."""

import errno
import sqlite3
import sys

import pytest

from trace_jax import commands, errors, remote
from trace_jax.errors import InputError


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: no space left on device"),
        (Exception("No space left on device (os error 28)"), "no space left on device"),
        (ValueError("RESOURCE_EXHAUSTED: write: No space left on device"), "no space left"),
        (sqlite3.OperationalError("database or disk is full"), "no space left on device"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota"),
        (OSError(errno.EIO, "Input/output error", "/x/y"), "/x/y: the disk or its server fails"),
        (OSError(errno.ESTALE, "Stale file handle", "/x/y"), "when it is back, the same command"),
        (OSError(errno.ETIMEDOUT, "Connection timed out", "/x/y"), "does not answer"),
        (OSError(errno.ETIMEDOUT, "Connection timed out"), None),  # of a socket
        (sqlite3.OperationalError("disk I/O error"), "the disk or its server fails"),
        (MemoryError(), "out of memory; take fewer rows"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "out of memory"),
        (FileNotFoundError(errno.ENOENT, "No such file"), None),
        (ValueError("a bug of ours"), None),
    ],
)
def test_what_the_machine_does_wrong_is_told_from_what_we_do(error, said):
    found = errors.of_the_machine(error)
    assert (found is None) if said is None else (said in found and "\n" not in found)


def _caused_by(cause: Exception) -> InputError:
    try:
        raise InputError("/x/y: cannot be written; make room") from cause
    except InputError as error:
        return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.Unavailable("the bucket cannot be reached"), 75),
        (OSError(errno.EIO, "Input/output error"), 75),
        (_caused_by(OSError(errno.ESTALE, "Stale file handle", "/x/y")), 75),
        (
            _caused_by(ValueError("UNAVAILABLE: Error writing gs://b/o: HTTP response code: 503")),
            75,
        ),
        (_caused_by(sqlite3.OperationalError("disk I/O error")), 75),
        (_caused_by(_caused_by(OSError(errno.EIO, "Input/output error"))), 75),
        (InputError("text: Input/output error"), 2),  # a user's words are no fault
        (_caused_by(OSError(errno.EROFS, "Read-only file system", "/x/y")), 2),
        (_caused_by(ValueError("PERMISSION_DENIED: HTTP response code: 403")), 2),
        (_caused_by(ValueError("no space left on device")), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (MemoryError(), 2),
    ],
)
def test_what_comes_back_by_itself_is_worth_another_start(error, code):
    assert errors.exit_code(error) == code


def test_programs_end_by_2_or_75_for_the_machine_and_by_a_traceback_for_us(capsys):
    import argparse

    def fails(error):
        parser = argparse.ArgumentParser()
        parser.set_defaults(run=lambda _: (_ for _ in ()).throw(error))
        return commands.run(parser, [])

    assert fails(OSError(errno.ENOSPC, "No space left on device")) == 2
    assert capsys.readouterr().err.startswith("error: no space left on device; ")
    assert fails(OSError(errno.EIO, "Input/output error")) == 75
    assert fails(errors.Unavailable("the bucket cannot be reached")) == 75
    assert len(capsys.readouterr().err.splitlines()) == 2
    with pytest.raises(KeyError):
        fails(KeyError("ours"))


def test_an_error_is_one_short_printable_line():
    text = str(InputError("a\nb \x1b[2J \u202e " + "x" * 5000 + " the end"))
    assert text.startswith(r"a b \x1b[2J \u202e xxx") and text.endswith("xxx the end")
    assert len(text) < 1100 and text.isprintable()
    assert errors.printable("é ü 漢字 plain") == "é ü 漢字 plain"


def test_what_is_to_be_installed_is_said_as_a_checkout_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"install it with pip install -e '\.\[gcs\]' in the chec"):
        remote.open_path("gs://bucket/run")
