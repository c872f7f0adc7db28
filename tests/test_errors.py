"""What a user sees of what went wrong: one line, that does nothing to a terminal."""

import errno
import sqlite3

import pytest

from trace_jax import commands, errors
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
        (MemoryError(), "out of memory; take fewer rows"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "out of memory"),
        (FileNotFoundError(errno.ENOENT, "No such file"), None),
        (ValueError("a bug of ours"), None),
    ],
)
def test_what_the_machine_does_wrong_is_told_from_what_we_do(error, said):
    found = errors.of_the_machine(error)
    assert (found is None) if said is None else (said in found and "\n" not in found)


def test_programs_end_by_2_for_the_machine_and_by_a_traceback_for_us(capsys):
    import argparse

    def fails(error):
        parser = argparse.ArgumentParser()
        parser.set_defaults(run=lambda _: (_ for _ in ()).throw(error))
        return commands.run(parser, [])

    assert fails(OSError(errno.ENOSPC, "No space left on device")) == 2
    assert capsys.readouterr().err.startswith("error: no space left on device; ")
    with pytest.raises(KeyError):
        fails(KeyError("ours"))


def test_an_error_is_one_short_printable_line():
    text = str(InputError("a\nb \x1b[2J \u202e " + "x" * 5000 + " the end"))
    assert text.startswith(r"a b \x1b[2J \u202e xxx") and text.endswith("xxx the end")
    assert len(text) < 1100 and text.isprintable()
    assert errors.printable("é ü 漢字 plain") == "é ü 漢字 plain"
