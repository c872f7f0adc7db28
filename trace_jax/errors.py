"""What a user is meant to see of what went wrong."""

import errno

_DISK = {
    errno.ENOSPC: "no space left on device",
    errno.EDQUOT: "disk quota exceeded",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk or its server fails (input/output error)",
    errno.ESTALE: "the file system was mounted anew (stale file handle)",
}
# Libraries wrap what the system says in exceptions of their own; the words stay.
_WORDS = {
    "no space left on device": errno.ENOSPC,
    "database or disk is full": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "read-only file system": errno.EROFS,
    "attempt to write a readonly database": errno.EROFS,
    "input/output error": errno.EIO,
}
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


def printable(text: str) -> str:
    """Text that does nothing to a terminal: control and bidirectional characters as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def of_the_machine(error: BaseException) -> str | None:
    """One line for an exception that comes from a full disk or memory; None for any other."""
    if isinstance(error, MemoryError):
        return _out_of_memory()
    number = error.errno if isinstance(error, OSError) else None
    text = str(error).lower()
    if number not in _DISK:
        number = next((n for words, n in _WORDS.items() if words in text), None)
    if number is not None:
        path = getattr(error, "filename", None)
        where = f"{path}: " if isinstance(path, str) else ""
        return f"{where}{_DISK[number]}; mend that, and the same command goes on from here"
    if any(words in text for words in _MEMORY):
        return _out_of_memory()
    return None


def _out_of_memory() -> str:
    return (
        "out of memory; take fewer rows at once (train.micro_rows, impact.micro_rows, "
        "evaluate.batch_rows), more devices or a larger machine, and the same command goes on; "
        "--plan says what a run needs"
    )
