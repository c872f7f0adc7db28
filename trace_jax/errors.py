"""What a user is meant to see of what went wrong."""

import errno

AGAIN = 75  # a temporary failure (sysexits.h): start the same command again
_INPUT = 2

_DISK = {
    errno.ENOSPC: "no space left on device",
    errno.EDQUOT: "disk quota exceeded",
    errno.EROFS: "the file system is read-only",
}
# What a file system over a network says while its server or the way there is gone.
_PASSING = {
    errno.EIO: "the disk or its server fails (input/output error)",
    errno.ESTALE: "the file system was mounted anew (stale file handle)",
    errno.ENOTCONN: "the file system is not connected",
    errno.ESHUTDOWN: "the server of the file system is gone",
    errno.ETIMEDOUT: "the server of the file system does not answer",
}
_OF_SOCKETS = (errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT)  # too: of storage with a path
# Libraries wrap what the system says in exceptions of their own; the words stay.
_WORDS = {
    "no space left on device": errno.ENOSPC,
    "database or disk is full": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "read-only file system": errno.EROFS,
    "attempt to write a readonly database": errno.EROFS,
    "remote i/o error": errno.EIO,
    "input/output error": errno.EIO,
    "disk i/o error": errno.EIO,
    "stale file handle": errno.ESTALE,
}
# What Orbax's arrays (TensorStore) say of a bucket.
_BUCKET = (
    "unavailable: ",
    "deadline_exceeded: ",
    "http response code: 429",
    "http response code: 5",
)
_MEMORY = ("out of memory", "unable to allocate", "cannot allocate memory", "bad_alloc")


_LONGEST = 1000  # characters of a line


class InputError(Exception):
    """What the user can mend: one line that says what is wrong and what to do (exit code 2)."""

    def __str__(self) -> str:
        text = printable(" ".join(super().__str__().split("\n")))
        if len(text) > _LONGEST:
            half = _LONGEST // 2
            text = f"{text[:half]} ... {text[-half:]}"
        return text


class Unavailable(InputError):
    """What passes by itself: the same line, and the same command may go on later (exit code 75)."""


def printable(text: str) -> str:
    """Text that does nothing to a terminal: control and bidirectional characters as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def of_the_machine(error: BaseException) -> str | None:
    """One line for an exception that comes from a disk or full memory; None for any other."""
    if isinstance(error, MemoryError):
        return _out_of_memory()
    number = _number(error)
    if number is not None:
        path = getattr(error, "filename", None)
        where = f"{path}: " if isinstance(path, str) else ""
        if number in _PASSING:
            return f"{where}{_PASSING[number]}; when it is back, the same command goes on from here"
        return f"{where}{_DISK[number]}; mend that, and the same command goes on from here"
    if any(words in str(error).lower() for words in _MEMORY):
        return _out_of_memory()
    return None


def exit_code(error: BaseException) -> int:
    """75 where storage that comes back is at the bottom of it (`Unavailable`, a cause), else 2."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Unavailable):
            return AGAIN
        if not isinstance(cause, InputError):
            number = _number(cause)
            if number is not None:
                return AGAIN if number in _PASSING else _INPUT
            if any(words in str(cause).lower() for words in _BUCKET):
                return AGAIN
        cause = cause.__cause__
    return _INPUT


def _number(error: BaseException) -> int | None:
    """The errno of a fault of storage, None for anything else."""
    if isinstance(error, OSError) and (error.errno in _DISK or error.errno in _PASSING):
        named = error.filename is not None or error.errno not in _OF_SOCKETS
        return error.errno if named else None
    text = str(error).lower()
    return next((n for words, n in _WORDS.items() if words in text), None)


def _out_of_memory() -> str:
    return (
        "out of memory; take fewer rows at once (train.micro_rows, impact.micro_rows, "
        "evaluate.batch_rows), more devices or a larger machine, and the same command goes on; "
        "--plan says what a run needs"
    )
