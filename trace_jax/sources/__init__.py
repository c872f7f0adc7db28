"""Where records come from: files and data sets (files.py) in several forms (forms.py).

A text is a string or a list of chat messages {"role", "content"}; a response's text is its last
message. Whatever is malformed is an InputError naming file and line, or is left out and counted;
records of equal content are kept once. `python -m trace_jax.sources` inspects and converts.
"""

import collections
import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from trace_jax import records
from trace_jax.errors import InputError
from trace_jax.sources import files, forms


@dataclasses.dataclass(frozen=True)
class Reading:
    """How rows become records.

    Attributes:
      form: one of forms.NAMES; "auto" goes by the columns of the first row.
      columns: our name -> the file's, where they differ.
      split: of data sets with several.
      limit: most records, drawn at random over the whole file; 0: all.
      first: read no further than so many records; 0: all.
      malformed: "error" stops at a malformed row, "drop" leaves it out and counts it.
      seed: of the draw.
    """

    form: str = "auto"
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    split: str = "train"
    limit: int = 0
    first: int = 0
    malformed: str = "error"
    seed: int = 0

    @classmethod
    def of(cls, data: Any, seed: int) -> "Reading":
        """From config section `data`."""
        columns = forms.columns_of(data.columns)
        return cls(
            form=data.form,
            columns=columns,
            split=data.split,
            limit=data.limit,
            malformed=data.malformed,
            seed=seed,
        )

    def pass_over(self, error: InputError) -> None:
        """Of a malformed row: returns where it is left out, and raises with what to do if not."""
        if self.malformed == "error":
            raise InputError(f"{error} (data.malformed=drop leaves such rows out)") from error


@dataclasses.dataclass(frozen=True)
class Counts:
    """What was read: records kept, duplicates left out, ignored keys -> rows, left out -> rows."""

    records: int
    duplicates: int
    ignored_keys: Mapping[str, int]
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{self.records} records"]
        if self.duplicates:
            parts.append(f"{self.duplicates} duplicates left out")
        parts += [f"{n} left out: {why}" for why, n in sorted(self.left_out.items())]
        if self.ignored_keys:
            keys = ", ".join(f"{key} ({n})" for key, n in sorted(self.ignored_keys.items()))
            parts.append(f"keys ignored: {keys}")
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True, slots=True)
class HeldOutPrompt:
    """A prompt to evaluate on, and the data set's annotations of it."""

    id: str
    prompt: records.Text
    labels: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Records:
    """The records of a file, read as they are asked for; only ids and content hashes are held.

    Once it is read to the end, `counts` says what was found.

    Raises:
      InputError: a malformed row (by `reading.malformed`), one id for two contents, no records.
    """

    def __init__(self, path: records.AnyPath, reading: Reading | None = None):
        self.path, self.reading = path, reading or Reading()
        self._found, self._duplicates = 0, 0
        self._ignored: collections.Counter[str] = collections.Counter()
        self._left_out: collections.Counter[str] = collections.Counter()

    @property
    def counts(self) -> Counts:
        """What was read so far."""
        return Counts(self._found, self._duplicates, dict(self._ignored), dict(self._left_out))

    def __iter__(self) -> Iterator[records.PreferenceRecord]:
        lines: dict[str, str] = {}  # id -> where
        seen: set[str] = set()
        for where, pair in self._pairs():
            self._ignored.update(pair.ignored)
            try:
                content = _content(pair, where)
                if content in seen:
                    self._duplicates += 1
                    continue
                name = _claim_id(pair.id, content, lines, where)
            except InputError as error:
                self._malformed(error)
                continue
            seen.add(content)
            self._found += 1
            yield records.PreferenceRecord(
                name, pair.prompt, pair.chosen, pair.rejected, pair.labels
            )
            if self._found == self.reading.first:
                return
        if not self._found:
            why = f" ({self.counts})" if self._left_out else ""
            raise InputError(
                f"{self.path}: no records{why}; a line needs prompt, chosen and rejected"
            )

    def _pairs(self) -> Iterator[tuple[str, forms.Pair]]:
        rows = files.rows(self.path, self.reading.split)
        first = next(rows, None)
        if first is None:
            return
        form, begin = self.reading.form, forms.renamed(first[1], self.reading.columns, first[0])
        every = itertools.chain([first], rows)
        if forms.is_xstest(form, begin):
            from trace_jax.sources import xstest

            yield from xstest.pairs(self._each(every, xstest.read))
            return
        yield from self._each(every, forms.reader(form, begin, first[0]))

    def _each(
        self, rows: Iterable[tuple[str, files.Row]], read: Callable[[files.Row, str], Any]
    ) -> Iterator[tuple[str, Any]]:
        """What `read` makes of every row that is well-formed."""
        for where, row in rows:
            try:
                yield where, read(_named(row, self.reading.columns, where), where)
            except forms.Skipped as reason:
                self._left_out[str(reason)] += 1
            except InputError as error:
                self._malformed(error)

    def _malformed(self, error: InputError) -> None:
        self.reading.pass_over(error)
        self._left_out["malformed"] += 1


def read_records(
    path: records.AnyPath, reading: Reading | None = None
) -> tuple[list[records.PreferenceRecord], Counts]:
    """Reads preference records into memory; at most `reading.limit`, in the file's order.

    Raises:
      InputError: see `Records`.
    """
    reading = reading or Reading()
    found = Records(path, reading)
    if not reading.limit:
        return list(found), found.counts
    kept = _sample(found, reading.limit, reading.seed)
    counts = found.counts
    more = {"beyond data.limit": counts.records - len(kept)} if counts.records > len(kept) else {}
    left_out = {**counts.left_out, **more}
    return kept, dataclasses.replace(counts, records=len(kept), left_out=left_out)


def _sample(found: Records, n: int, seed: int) -> list[records.PreferenceRecord]:
    """n of them, each equally likely, in one pass that holds no more (reservoir sampling)."""
    rng = random.Random(f"data.limit {seed}")
    kept: list[tuple[int, records.PreferenceRecord]] = []
    for i, record in enumerate(found):
        if i < n:
            kept.append((i, record))
        elif (at := rng.randrange(i + 1)) < n:
            kept[at] = i, record
    return [record for _, record in sorted(kept, key=lambda pair: pair[0])]


def read_prompts(
    path: records.AnyPath, reading: Reading | None = None
) -> tuple[list[HeldOutPrompt], int]:
    """Reads held-out prompts: rows with prompt and optional id, or pairs, whose prompts they are.

    Returns them, equal ones once, and how many malformed rows were left out.

    Raises:
      InputError: a malformed row (by `reading.malformed`), one id for two prompts, or no prompts.
    """
    lines: dict[str, str] = {}
    found: dict[str, HeldOutPrompt] = {}
    left_out = 0
    reading = reading or Reading()
    wanted = ("prompt", "chosen", "rejected", "labels")
    columns = [(o, t) for o, t in reading.columns.items() if o in wanted or t == "labels"]
    for where, row in files.rows(path, reading.split):
        try:
            _check_unicode(row, where)
            row = forms.renamed(row, {o: t for o, t in columns if t in row}, where)
            prompt = forms.prompt(row, reading.form, where)
            content = records.content_id(prompt)
            if content not in found:
                name = _claim_id(row.get("id", forms.ABSENT), content, lines, where)
                labels = forms.prompt_labels(row, reading.form, where)
                found[content] = HeldOutPrompt(name, prompt, labels)
        except InputError as error:
            reading.pass_over(error)
            left_out += 1
    if not found:
        raise InputError(f"{path}: no prompts; a line needs prompt")
    return list(found.values()), left_out


def _content(pair: forms.Pair, where: str) -> str:
    if pair.chosen == pair.rejected:
        raise InputError(f"{where}: chosen and rejected are the same; fix or delete the line")
    return records.content_id(pair.prompt, pair.chosen, pair.rejected)


def _named(row: files.Row, columns: Mapping[str, str], where: str) -> files.Row:
    _check_unicode(row, where)
    return forms.renamed(row, columns, where)


def _check_unicode(row: Any, where: str) -> None:
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise InputError(
            f"{where}: holds {half}, half a character, which no file can keep; fix or delete the "
            "line"
        ) from error


def _claim_id(given: Any, content: str, lines: dict[str, str], where: str) -> str:
    """The row's id, or that of its content; `lines` remembers who has it."""
    given = content if given is forms.ABSENT else given
    if not isinstance(given, str | int) or isinstance(given, bool) or not str(given).strip():
        raise InputError(f"{where}: id must be a text or a whole number, or left out")
    name = str(given)
    if name in lines:
        raise InputError(
            f"{where}: id {name!r} is already that of {_line_of(lines[name])}, whose content "
            "differs; rename one"
        )
    lines[name] = where
    return name


def _line_of(where: str) -> str:
    number = where.rpartition(":")[2]
    return f"line {number}" if number.isdigit() else where.rpartition(", ")[2]
