"""Where records come from: JSONL with prompt, chosen, rejected, optional id and labels.

A text is a string or a list of chat messages {"role", "content"}; a response's text is its last
message. Whatever is malformed is an InputError naming file and line; whatever is left out is
counted.
"""

import collections
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from trace_jax import records
from trace_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Counts:
    """What was read: records kept, records left out as duplicates, and ignored keys -> lines."""

    records: int
    duplicates: int
    ignored_keys: Mapping[str, int]

    def __str__(self) -> str:
        parts = [f"{self.records} records"]
        if self.duplicates:
            parts.append(f"{self.duplicates} duplicates left out")
        if self.ignored_keys:
            keys = ", ".join(f"{key} ({n})" for key, n in sorted(self.ignored_keys.items()))
            parts.append(f"keys ignored: {keys}")
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True, slots=True)
class HeldOutPrompt:
    """A prompt to evaluate on."""

    id: str
    prompt: records.Text


def read_records(path: records.AnyPath) -> tuple[list[records.PreferenceRecord], Counts]:
    """Reads preference records; those of equal content are kept once.

    Raises:
      InputError: a malformed line, one id for two contents, or no records at all.
    """
    ignored: collections.Counter[str] = collections.Counter()
    n_duplicates = 0
    lines: dict[str, int] = {}  # id -> line
    found: dict[str, records.PreferenceRecord] = {}  # content -> record
    for number, row in records.read_jsonl(path):
        where = f"{path}:{number}"
        _check_unicode(row, where)
        prompt, chosen, rejected = (_text(row, k, where) for k in ("prompt", "chosen", "rejected"))
        if chosen == rejected:
            raise InputError(f"{where}: chosen and rejected are the same; fix or delete the line")
        ignored.update(_other_keys(row, ("prompt", "chosen", "rejected"), ("id", "labels")))
        content = records.content_id(prompt, chosen, rejected)
        if content in found:
            n_duplicates += 1
            continue
        name = _claim_id(row, content, lines, path, number)
        found[content] = records.PreferenceRecord(name, prompt, chosen, rejected, row.get("labels"))
    if not found:
        raise InputError(f"{path}: no records; a line needs prompt, chosen and rejected")
    return list(found.values()), Counts(len(found), n_duplicates, dict(ignored))


def read_prompts(path: records.AnyPath) -> list[HeldOutPrompt]:
    """Reads held-out prompts: JSONL with prompt and optional id; equal prompts are kept once.

    Raises:
      InputError: a malformed line, one id for two prompts, or no prompts at all.
    """
    lines: dict[str, int] = {}
    found: dict[str, HeldOutPrompt] = {}
    for number, row in records.read_jsonl(path):
        _check_unicode(row, f"{path}:{number}")
        prompt = _text(row, "prompt", f"{path}:{number}")
        content = records.content_id(prompt)
        if content not in found:
            found[content] = HeldOutPrompt(_claim_id(row, content, lines, path, number), prompt)
    if not found:
        raise InputError(f"{path}: no prompts; a line needs prompt")
    return list(found.values())


def _check_unicode(row: Mapping[str, Any], where: str) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise InputError(
            f"{where}: holds {half}, half a character, which no file can keep; fix or delete the "
            "line"
        ) from error


def _claim_id(
    row: Mapping[str, Any], content: str, lines: dict[str, int], path: records.AnyPath, number: int
) -> str:
    """The line's id, or that of its content; `lines` remembers who has it."""
    given = row.get("id", content)
    if not isinstance(given, str | int) or isinstance(given, bool) or not str(given).strip():
        raise InputError(f"{path}:{number}: id must be a text or a whole number, or left out")
    name = str(given)
    if name in lines:
        raise InputError(
            f"{path}:{number}: id {name!r} is already that of line {lines[name]}, whose content "
            "differs; rename one"
        )
    lines[name] = number
    return name


def _text(row: Mapping[str, Any], key: str, where: str) -> records.Text:
    if key not in row:
        raise InputError(f"{where}: {key!r} is missing; add it or delete the line")
    value = row[key]
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        text = value[-1]["content"]
        value = [{"role": message["role"], "content": message["content"]} for message in value]
    elif isinstance(value, str):
        text = value
    else:
        raise InputError(
            f"{where}: {key!r} must be a text or a list of chat messages with role and content"
        )
    if not text.strip():
        raise InputError(f"{where}: {key!r} is empty; fix or delete the line")
    return value


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


def _other_keys(
    row: Mapping[str, Any], texts: tuple[str, ...], others: tuple[str, ...]
) -> set[str]:
    """Keys of a line that nothing reads; those of chat messages as "chosen.name"."""
    of_messages = {
        f"{key}.{inner}"
        for key in texts
        if isinstance(row[key], list)
        for message in row[key]
        for inner in message.keys() - {"role", "content"}
    }
    return (row.keys() - {*texts, *others}) | of_messages
