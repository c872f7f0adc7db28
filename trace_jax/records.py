"""Records, verdicts, triaged records; JSONL files that survive a kill. Standard library only."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TextIO

from trace_jax import processes
from trace_jax.errors import InputError

Text = str | list[dict[str, str]]  # plain text, or chat messages {"role", "content"}
AnyPath = str | os.PathLike[str]

STATUSES = ("compliant", "violating", "abstain", "error")
ACTIONS = ("INVERT", "PUNISH", "RETAIN", "UNRESOLVED")


@dataclasses.dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """A prompt, a chosen and a rejected response, in their ORIGINAL order.

    `labels` are the dataset's own annotations, {"prompt": {name: value}, "chosen": {...},
    "rejected": {...}}, None where it has none.
    """

    id: str
    prompt: Text
    chosen: Text
    rejected: Text
    labels: Any = None

    def labels_of(self, side: str) -> Mapping[str, Any]:
        """Annotations of the prompt and of one response ("chosen" or "rejected"), by name."""
        if not isinstance(self.labels, Mapping):
            return {}
        parts = (self.labels.get(part) for part in ("prompt", side))
        return {k: v for part in parts if isinstance(part, Mapping) for k, v in part.items()}

    def to_json(self) -> dict[str, Any]:
        """The line of records.jsonl; without labels where there are none."""
        row = {
            "id": self.id,
            "prompt": self.prompt,
            "chosen": self.chosen,
            "rejected": self.rejected,
        }
        return row if self.labels is None else row | {"labels": self.labels}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Reads back `to_json`; other keys are left alone."""
        return cls(row["id"], row["prompt"], row["chosen"], row["rejected"], row.get("labels"))


@dataclasses.dataclass(frozen=True, slots=True)
class ClauseVerdict:
    """A judge's answer on one clause: a status, and P(compliant), None where it gives none."""

    status: str
    probability: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's answer on one response.

    Attributes:
      clauses: clause id -> ClauseVerdict.
      rationale: the judge's own words, where it gave any; raw replies stay in the store.
      template_hash: of the question, for judges that read.
      date: when the last of its clauses was answered, ISO 8601 in UTC.
      tokens: input and output tokens of the calls that answered.
    """

    status: str
    probability: float | None
    clauses: Mapping[str, ClauseVerdict]
    rationale: str = ""
    judge: str = ""
    policy_hash: str = ""
    template_hash: str = ""
    date: str = ""
    tokens: int = 0

    @property
    def compliant(self) -> bool | None:
        """True, False, or None where nothing was decided."""
        return {"compliant": True, "violating": False}.get(self.status)

    @property
    def p_compliant(self) -> float | None:
        """P(compliant): the judge's where it gave one, else 1 or 0; None where it is not known.

        After an abstention it is known only if every clause has one; after an error it never is.
        """
        if self.status == "abstain":
            given = [clause.probability for clause in self.clauses.values()]
            return min(given) if given and None not in given else None
        if self.compliant is None or self.probability is not None:
            return None if self.status == "error" else self.probability
        return float(self.compliant)

    def replaced(self, status: str | None) -> Self:
        """This verdict with another status, for sure; itself for None."""
        if status is None:
            return self
        return dataclasses.replace(self, status=status, probability=float(status == "compliant"))

    def to_json(self) -> dict[str, Any]:
        """What triage.jsonl keeps of it."""
        clauses = {name: dataclasses.asdict(clause) for name, clause in self.clauses.items()}
        return {"status": self.status, "probability": self.probability, "clauses": clauses}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Reads back `to_json`."""
        clauses = {name: ClauseVerdict(**clause) for name, clause in row["clauses"].items()}
        return cls(row["status"], row["probability"], clauses)


@dataclasses.dataclass(frozen=True, slots=True)
class TriagedRecord:
    """A record, the new policy's verdicts on both responses, and the action they give.

    Attributes:
      masses: probability of each action, for soft triage.
      override: what people said of it. noise: how its verdicts were corrupted on purpose.
    """

    record: PreferenceRecord
    chosen_verdict: Verdict
    rejected_verdict: Verdict
    action: str
    masses: Mapping[str, float] | None = None
    override: Mapping[str, str] | None = None
    noise: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The line of triage.jsonl; without masses, override and noise where there are none."""
        more = {key: getattr(self, key) for key in ("masses", "override", "noise")}
        return self._row() | {key: value for key, value in more.items() if value is not None}

    def _row(self) -> dict[str, Any]:
        return {
            "id": self.record.id,
            "prompt": self.record.prompt,
            "chosen": self.record.chosen,
            "rejected": self.record.rejected,
            "chosen_verdict": self.chosen_verdict.to_json(),
            "rejected_verdict": self.rejected_verdict.to_json(),
            "action": self.action,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Reads back `to_json`."""
        verdicts = (Verdict.from_json(row[f"{side}_verdict"]) for side in ("chosen", "rejected"))
        more = (row.get(key) for key in ("masses", "override", "noise"))
        return cls(PreferenceRecord.from_json(row), *verdicts, row["action"], *more)


def verdicts_of(action: str, chosen: Verdict, rejected: Verdict) -> tuple[Verdict, Verdict]:
    """The verdicts, changed as little as the action needs."""
    if action == "RETAIN":
        return chosen.replaced("compliant"), rejected
    if action == "UNRESOLVED":
        return chosen, rejected
    return chosen.replaced("violating"), rejected.replaced(
        "compliant" if action == "INVERT" else "violating"
    )


def content_id(*parts: Text) -> str:
    """The id of a content: a record's prompt, chosen, rejected; or any other texts in order.

    The first 16 hex digits of SHA-256 over the canonical JSON of the parts.
    """
    canonical = json.dumps(list(parts), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def read_jsonl(path: AnyPath) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of every line that is not blank.

    Raises:
      InputError: the file cannot be read, or a line is not one JSON object in UTF-8.
    """
    try:
        with open(path, "rb") as stream:
            yield from parse_jsonl(stream, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def parse_jsonl(stream: Iterable[bytes], path: AnyPath) -> Iterator[tuple[int, dict[str, Any]]]:
    """`read_jsonl` of an open stream; `path` names it in errors."""
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put
        if line.strip():
            yield number, _parse(line, f"{path}:{number}")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error.reason}): re-encode the file") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error}): fix or delete the line") from error
    if not isinstance(row, dict):
        raise InputError(
            f"{where}: a line must be a JSON object, this is a {type(row).__name__}: fix or "
            "delete the line"
        )
    return row


def read_json(path: AnyPath) -> Any:
    """Reads a JSON file that `write_json` wrote."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); do its stage again with --redo"
        ) from error


def write_json(path: AnyPath, value: Any) -> None:
    """Writes the whole file or nothing, keys sorted. Of several processes the first one writes."""
    if processes.is_first():
        _write_json(path, value)
    processes.wait(f"{path} written")


def _write_json(path: AnyPath, value: Any) -> None:
    with _atomic(path) as stream:
        stream.write(json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n")


def write_text(path: AnyPath, text: str) -> None:
    """Writes the whole file or nothing. Of several processes the first one writes."""
    if processes.is_first():
        with _atomic(path) as stream:
            stream.write(text)
    processes.wait(f"{path} written")


def write_jsonl(path: AnyPath, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes the whole file or nothing. Of several processes the first one writes."""
    if processes.is_first():
        with _atomic(path) as stream:
            for row in rows:
                stream.write(_line(row))
    processes.wait(f"{path} written")


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _atomic(path: AnyPath) -> Iterator[TextIO]:
    """A file beside `path` that takes its place once it is written without an exception."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    try:
        opened = gzip.open if str(path).endswith(".gz") else open
        with opened(temporary, "wt", encoding="utf-8", newline="\n") as stream:
            yield stream
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync(path: AnyPath) -> None:
    """Returns once what was written to a file is on the disk: a power cut no longer loses it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: AnyPath, error: OSError) -> InputError:
    return InputError(
        f"{path}: cannot be written ({error.strerror}); free space or use another folder"
    )


class JsonlAppender:
    """Appends rows with an id to a JSONL file, in whole lines.

    Opening an existing file drops a last line that a kill cut off. `ids` are those in the file.
    Of several processes the first one writes, and all wait for it when the file is closed.
    """

    def __init__(self, path: AnyPath):
        self.path = Path(path)
        self.ids: set[str] = set()
        if processes.is_first() and self.path.exists():
            _drop_half_line(self.path)
        processes.wait(f"{path} whole")
        if self.path.exists():
            self.ids = {_id(row, f"{path}:{number}") for number, row in read_jsonl(path)}
        try:
            where = self.path if processes.is_first() else os.devnull
            self._stream = open(where, "a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise _unwritable(path, error) from error
        processes.wait(f"{self.path} open")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self._stream.close()
        if processes.is_first():
            sync(self.path)
        if kind is None:
            processes.wait(f"{self.path} closed")

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows and flushes: a kill of this process no longer loses them."""
        try:
            for row in rows:
                name, line = row["id"], _line(row)  # first: a row that cannot be written leaves
                self._stream.write(line)  # no trace, neither here nor in the ids
                self.ids.add(name)
            self._stream.flush()
        except OSError as error:
            raise _unwritable(self.path, error) from error


def _drop_half_line(path: Path) -> None:
    whole = path.read_bytes()
    end = whole.rfind(b"\n") + 1
    if end < len(whole):
        os.truncate(path, end)


def _id(row: Mapping[str, Any], where: str) -> str:
    if "id" not in row:
        raise InputError(f"{where}: the line has no id; do its stage again with --redo")
    return row["id"]
