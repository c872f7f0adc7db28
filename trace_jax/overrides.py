"""What people say of records, against the judge: a JSONL file, read before triage decides.

A line names a record and says, in one of these ways, what holds:

    {"id": "...", "verdict": "PUNISH"}                                  an action
    {"id": "...", "chosen": "violating", "rejected": "compliant"}       one response or both
    {"id": "...", "response": "chosen", "verdict": "violating"}         one response

"by" and "note" are kept; other keys are ignored, and so are lines whose verdict is null: the
short list for people (shortlist.py) is such a file, to be filled in.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from trace_jax import records
from trace_jax.errors import InputError

_SIDES = ("chosen", "rejected")
_STATUSES = ("compliant", "violating")
_SHORT = 20  # characters


@dataclasses.dataclass(frozen=True)
class Override:
    """What people say of one record; None where they say nothing."""

    chosen: str | None = None
    rejected: str | None = None
    action: str | None = None
    by: str | None = None
    note: str | None = None

    def verdicts(
        self, chosen: records.Verdict, rejected: records.Verdict
    ) -> tuple[records.Verdict, records.Verdict]:
        """The judge's verdicts with theirs in place; clauses stay as the judge saw them."""
        return chosen.replaced(self.chosen), rejected.replaced(self.rejected)

    def to_json(self) -> dict[str, str]:
        """What triage.jsonl keeps."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def read(path: records.AnyPath, known: Collection[str]) -> dict[str, Override]:
    """Record id -> Override; several lines on one record add up.

    known: ids of the records there are.

    Raises:
      InputError: a line that says nothing clear, contradicts another, or names no known record.
    """
    known, found = set(known), {}
    for number, row in records.read_jsonl(path):
        where = f"{path}:{number}"
        said = _said(row, where)
        if not said:
            continue
        name = str(row["id"]) if "id" in row else None
        if name not in known:
            raise InputError(f"{where}: there is no record {name!r}; check the id")
        before = dataclasses.asdict(found[name]) if name in found else {}
        for key, value in said.items():
            if before.get(key) not in (None, value) and key not in ("by", "note"):
                raise InputError(
                    f"{where}: {key} of record {name!r} is {value} here and {before[key]} above; "
                    "keep one line"
                )
        found[name] = Override(**{**before, **said})
    for name, override in found.items():
        if override.action is not None and (override.chosen or override.rejected):
            raise InputError(
                f"{path}: record {name!r} has both an action and verdicts on responses; keep one"
            )
    return found


def _said(row: Mapping[str, Any], where: str) -> dict[str, str]:
    said = {side: row[side] for side in _SIDES if row.get(side) in _STATUSES}
    for side in _SIDES:
        if side not in said and _is_meant(row.get(side), beside=bool(said)):
            raise InputError(
                f"{where}: {side} is {row[side]!r}; use compliant or violating, or leave it out"
            )
    verdict = row.get("verdict")
    if verdict in records.ACTIONS:
        said["action"] = verdict
    elif verdict in _STATUSES:
        if row.get("response") not in _SIDES:
            raise InputError(
                f"{where}: 'verdict' is {verdict!r} of which response? add "
                '"response": "chosen" or "rejected"'
            )
        said[row["response"]] = verdict
    elif verdict is not None:
        raise InputError(
            f"{where}: verdict {verdict!r} is unknown; use {', '.join(records.ACTIONS)}, or "
            "compliant or violating with a response"
        )
    elif not said and "verdict" not in row:
        raise InputError(
            f'{where}: says nothing; give "verdict", or "chosen" and "rejected" as compliant or '
            "violating"
        )
    if said:
        said |= {key: str(row[key]) for key in ("by", "note") if row.get(key)}
    return said


def _is_meant(value: Any, *, beside: bool) -> bool:
    """Whether it is a verdict that is misspelt, not the text of a response.

    beside: the other response has a verdict, so that what is short here is hardly a text.
    """
    if isinstance(value, str):
        word = value.strip()
        return word.casefold() in _STATUSES or (beside and 0 < len(word) <= _SHORT)
    return beside and isinstance(value, bool | int | float)
