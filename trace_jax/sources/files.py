"""Rows of a file, one at a time: JSONL, JSON, CSV, Parquet, saved data sets, data sets of the hub.

Nothing is held but the row, so that a file may be larger than memory.
"""

import csv
import glob
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from trace_jax import records, remote, workdir
from trace_jax.errors import InputError

Row = Mapping[str, Any]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_BATCH = 1024  # Parquet rows at once


def rows(path: records.AnyPath, split: str = "train") -> Iterator[tuple[str, Row]]:
    """Yields (where, row): "FILE:LINE" or "FILE, row N" for errors, and column -> value.

    Args:
      path: a file (SUFFIXES, also with .gz), a pattern such as "data/*.csv", a folder of such
        files, one that `datasets.save_to_disk` wrote, or organisation/name on the Hugging Face hub.
      split: of data sets that have several.

    Raises:
      InputError: what cannot be read, and where.
    """
    path = str(remote.local(path))
    here = Path(path)
    try:
        if here.is_dir():
            yield from _folder(here, split)
        elif here.exists():  # also one whose name reads like a pattern
            yield from _file(here)
        elif any(c in path for c in "*?["):
            yield from _every(path)
        elif _HUB.fullmatch(path):
            yield from _hub(path, split)
        else:
            raise InputError(f"{path}: no such file or folder; check the path")
    except OSError as error:
        why = error.strerror or str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be read ({why}); check the path") from error


def is_here(path: str) -> bool:
    """Whether there is something to read without a network."""
    if remote.is_remote(path):
        return False
    return Path(path).exists() or (any(c in path for c in "*?[") and bool(glob.glob(path)))


def exists(path: str) -> bool:
    """Whether it is here, or may be in a bucket or a data set of the hub."""
    return is_here(path) or remote.is_remote(path) or bool(_HUB.fullmatch(path))


def digest(path: str) -> str:
    """A hash of what is there; "" for a data set of the hub, whose name has to do."""
    path = str(remote.local(path))
    if Path(path).exists() or not any(c in path for c in "*?["):
        return workdir.hash_path(Path(path))
    return " ".join(workdir.hash_path(Path(found)) for found in sorted(glob.glob(path)))


def _every(pattern: str) -> Iterator[tuple[str, Row]]:
    found = sorted(glob.glob(pattern))
    if not found:
        raise InputError(f"{pattern}: no file matches; check the path")
    for path in found:
        yield from _file(Path(path))


def _folder(folder: Path, split: str) -> Iterator[tuple[str, Row]]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        yield from _saved(folder, split)
        return
    files = sorted(p for p in folder.iterdir() if _suffix(p) in SUFFIXES)
    if not files:
        raise InputError(f"{folder}: a folder without {', '.join(SUFFIXES)} files")
    for file in files:
        yield from _file(file)


def _file(path: Path) -> Iterator[tuple[str, Row]]:
    suffix = _suffix(path)
    if suffix not in _READERS:
        raise InputError(
            f"{path}: unknown kind of file; give {', '.join(SUFFIXES)}, also with .gz, or a folder"
        )
    try:
        yield from _READERS[suffix](path)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path}: damaged gzip ({error}); fetch it again") from error


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    with _open(path) as stream:
        for number, row in records.parse_jsonl(stream, path):
            yield f"{path}:{number}", row


def _json(path: Path) -> Iterator[tuple[str, Row]]:
    """An array of objects, or lines of them."""
    with _open(path) as stream:
        start = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        if start != b"[":
            yield from _jsonl(path)
            return
        stream.seek(0)
        try:
            found = json.loads(stream.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not valid JSON ({error}); mend the file") from error
    for number, row in enumerate(found, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {number}: must be a JSON object; mend it")
        yield f"{path}, row {number}", row


def _csv(path: Path, delimiter: str = ",") -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(2**31 - 1)
    lines = _text_lines(path)
    try:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise InputError(
                    f"{where}: has not as many cells as the header ({len(reader.fieldnames)}); "
                    "quote cells that hold the delimiter or a line break"
                )
            yield where, row
    except csv.Error as error:
        at = f"{path}:{reader.line_num + 1}"
        raise InputError(f"{at}: not valid CSV ({error}); mend it") from error


def _text_lines(path: Path) -> Iterator[str]:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}:{number}: not UTF-8 ({error.reason}): re-encode the file"
                ) from error


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        number = 0
        for batch in file.iter_batches(_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        first = str(error).splitlines()[0]
        raise InputError(f"{path}: not readable as Parquet ({first}); fetch it again") from error


def _saved(folder: Path, split: str) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises what its storage raises
        raise _unreadable(str(folder), error) from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise InputError(f"{folder}: no split {split!r}; it has {', '.join(found)}")
        found = found[split]
    for number, row in enumerate(found, start=1):
        yield f"{folder}, row {number}", row


def _hub(name: str, split: str) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        found = datasets.load_dataset(name, split=split, streaming=True)
        for number, row in enumerate(found, start=1):
            yield f"{name}, {split} row {number}", row
    except InputError:
        raise
    except Exception as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> InputError:
    first = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
    return InputError(
        f"{name}: neither a file here nor a data set that can be loaded ({first}); check the name, "
        "the split and the connection"
    )


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": lambda path: _csv(path, "\t"),
    ".parquet": _parquet,
}
