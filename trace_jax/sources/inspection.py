"""What is in a file of preferences: counts, lengths, repetitions, contradictions, labels.

One pass that holds 16 bytes a response, not the texts.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from trace_jax import records, sources

_BETTER, _WORSE = 1, 2
PARTS = ("prompt", "chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Of one part, in one unit."""

    median: int
    p90: int
    p99: int
    longest: int
    longest_id: str


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
      counts: what was read and left out.
      prompts: different ones. chats: records whose prompt is a chat. system: with a system message.
      turns: mean messages of a chat prompt.
      characters: part -> Lengths. tokens: the same in tokens; of pairs: prompt and longer response.
      too_long: records whose prompt and longer response have more tokens than `max_length`.
      judgements: different (prompt, response), which is what a judge is asked.
      asked: responses in the file, repeated records too, which is what a naive one is asked.
      contradictions: responses that are better in one record and worse in another.
      examples: ids of records with the first of those.
      labels: "side.name" -> value -> records.
    """

    counts: sources.Counts
    prompts: int
    chats: int
    system: int
    turns: float
    characters: dict[str, Lengths]
    tokens: dict[str, Lengths]
    max_length: int
    too_long: int
    asked: int
    judgements: int
    contradictions: int
    examples: tuple[str, ...]
    labels: dict[str, dict[str, int]]

    def to_json(self) -> dict[str, Any]:
        """The whole of it."""
        return dataclasses.asdict(self)


def inspect(
    found: sources.Records,
    count_tokens: Callable[[records.PreferenceRecord], Sequence[int]] | None,
    *,
    max_length: int = 0,
) -> Inspection:
    """Reads all records once.

    count_tokens: tokens of prompt, chosen, rejected of a record, if a tokenizer is at hand.
    """
    prompts: set[bytes] = set()
    roles: dict[bytes, int] = {}
    holders: dict[bytes, str] = {}
    contradicted: dict[bytes, tuple[str, str]] = {}
    characters: list[tuple[int, ...]] = []
    tokens: list[tuple[int, ...]] = []
    ids: list[str] = []
    labels: dict[str, collections.Counter[str]] = {}
    chats = system = turns = 0
    for record in found:
        prompts.add(_hash(record.prompt))
        ids.append(record.id)
        characters.append(tuple(_characters(getattr(record, part)) for part in PARTS))
        if isinstance(record.prompt, list):
            chats, turns = chats + 1, turns + len(record.prompt)
            system += record.prompt[0]["role"] == "system"
        for side, role in (("chosen", _BETTER), ("rejected", _WORSE)):
            key = _hash([record.prompt, getattr(record, side)])
            roles[key] = roles.get(key, 0) | role
            first = holders.setdefault(key, record.id)
            if roles[key] == _BETTER | _WORSE:
                contradicted.setdefault(key, (first, record.id))
        for name, value in _labels(record):
            labels.setdefault(name, collections.Counter())[value] += 1
        if count_tokens is not None:
            prompt, chosen, rejected = count_tokens(record)
            tokens.append((prompt, chosen, rejected, prompt + max(chosen, rejected)))
    first_pair = next(iter(contradicted.values()), ())
    return Inspection(
        counts=found.counts,
        prompts=len(prompts),
        chats=chats,
        system=system,
        turns=turns / chats if chats else 0.0,
        characters=_lengths(characters, PARTS, ids),
        tokens=_lengths(tokens, (*PARTS, "pair"), ids) if tokens else {},
        max_length=max_length,
        too_long=sum(row[-1] >= max_length for row in tokens),
        asked=2 * (len(ids) + found.counts.duplicates),
        judgements=len(roles),
        contradictions=len(contradicted),
        examples=first_pair,
        labels={name: dict(values.most_common(6)) for name, values in sorted(labels.items())},
    )


def lines(found: Inspection, path: str) -> Iterable[str]:
    """The same for people."""
    n = found.counts.records
    yield f"{path}: {found.counts}"
    yield f"prompts    {found.prompts} different; {_chats(found, n)}"
    saved = 1 - found.judgements / found.asked
    yield (
        f"judgements {found.judgements} different (prompt, response) of {found.asked}: a judge is "
        f"spared {saved:.0%} of the calls"
    )
    which = " and ".join(dict.fromkeys(found.examples))
    yield (
        f"contradictions: {found.contradictions} responses are better in one record and worse in "
        "another" + (f", as in records {which}" if which else "")
    )
    for unit, table in (("characters", found.characters), ("tokens", found.tokens)):
        if table:
            yield f"{unit:12} {'median':>8} {'90 %':>8} {'99 %':>8} {'longest':>8}  in record"
        for part, row in table.items():
            numbers = f"{row.median:8} {row.p90:8} {row.p99:8} {row.longest:8}"
            yield f"  {part:10} {numbers}  {row.longest_id}"
    if found.tokens:
        yield f"{found.too_long} records have more than {found.max_length} tokens with their end"
    for name, values in found.labels.items():
        yield f"label {name}: " + ", ".join(f"{value} {k}" for value, k in values.items())


def _chats(found: Inspection, n: int) -> str:
    if not found.chats:
        return "plain text"
    kind = "chats" if found.chats == n else f"{found.chats} chats, {n - found.chats} plain texts"
    return f"{kind} of {found.turns:.1f} messages, {found.system} with a system message"


def _labels(record: records.PreferenceRecord) -> Iterable[tuple[str, str]]:
    if not isinstance(record.labels, dict):
        return
    for side in PARTS:
        of_side = record.labels.get(side)
        for name, value in of_side.items() if isinstance(of_side, dict) else ():
            yield f"{side}.{name}", str(value)[:40]


def _lengths(
    rows: Sequence[tuple[int, ...]], names: Sequence[str], ids: Sequence[str]
) -> dict[str, Lengths]:
    found = {}
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        order = sorted(column)
        at = [order[min(len(order) - 1, int(share * len(order)))] for share in (0.5, 0.9, 0.99)]
        longest = max(range(len(column)), key=column.__getitem__)
        found[name] = Lengths(*at, column[longest], ids[longest])
    return found


def _characters(text: records.Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(m["content"]) for m in text)


def _hash(value: Any) -> bytes:
    return bytes.fromhex(records.content_id(value))
