"""Predicates: deterministic rules on the text of a prompt and a response, as policy files have.

A predicate is a mapping with one key:

    words:  {in: REGION, any_of: [dog, "fright*", "at last"], at_least: 1}
            holds if so many different entries are found, as whole words in any case; a final *
            stands for the rest of a word
    regex:  {in: REGION, pattern: '[?]'}   a Python regular expression is found anywhere
    length: {in: REGION, unit: words | characters, min: 1, max: 80}   both ends included
    not: P    all: [P, ...]    any: [P, ...]    if: {when: P, then: P}

REGION is prompt, response or ending (the last ENDING_WORDS words of the response).
"""

import functools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from trace_jax.errors import InputError

Predicate = Callable[[str, str], bool]  # (prompt, response) -> does it hold?

ENDING_WORDS = 20
LANGUAGE = 1  # part of every policy hash; raise it when a predicate comes to mean something else


def compile_rules(rules: Any, where: str) -> Predicate:
    """Compiles a predicate; `where` names it in errors.

    Raises:
      InputError: it is malformed.
    """
    known = ", ".join(_PREDICATES)
    if not isinstance(rules, dict) or len(rules) != 1:
        raise InputError(f"{where}: a predicate is a mapping with one key, one of {known}")
    ((name, body),) = rules.items()
    if name not in _PREDICATES:
        raise InputError(f"{where}: unknown predicate {name!r}; use one of {known}")
    return _PREDICATES[name](body, f"{where}: {name}")


def _all(body: Any, where: str) -> Predicate:
    parts = _compile_list(body, where)
    return lambda prompt, response: all(part(prompt, response) for part in parts)


def _any(body: Any, where: str) -> Predicate:
    parts = _compile_list(body, where)
    return lambda prompt, response: any(part(prompt, response) for part in parts)


def _not(body: Any, where: str) -> Predicate:
    part = compile_rules(body, where)
    return lambda prompt, response: not part(prompt, response)


def _if(body: Any, where: str) -> Predicate:
    check_mapping(body, where, required=("when", "then"))
    when = compile_rules(body["when"], f"{where}: when")
    return implies(when, compile_rules(body["then"], f"{where}: then"))


def implies(when: Predicate, then: Predicate) -> Predicate:
    """`then` where `when` holds, true elsewhere."""
    return lambda prompt, response: not when(prompt, response) or then(prompt, response)


def _words(body: Any, where: str) -> Predicate:
    check_mapping(body, where, required=("in", "any_of"), optional=("at_least",))
    region, entries = _region(body["in"], where), body["any_of"]
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{where}: any_of must be a list of words")
    entries = {_entry(entry, where) for entry in entries}
    least = _number(body.get("at_least", 1), f"{where}: at_least")
    if not 1 <= least <= len(entries):
        raise InputError(f"{where}: at_least={least} must be from 1 to {len(entries)}, the entries")
    single = frozenset(entry for entry in entries if re.fullmatch(r"\w+", entry))
    others = [re.compile(_pattern(entry)).search for entry in sorted(entries - single)]

    def holds(prompt: str, response: str) -> bool:
        text = region(prompt, response).casefold()
        missing = least - len(single & _word_set(text))
        return missing <= 0 or _reaches(missing, (search(text) for search in others))

    return holds


def _reaches(least: int, found: Iterable[object]) -> bool:
    """Whether so many are found; looks no further than needed."""
    hits = (hit for hit in found if hit is not None)
    return any(n >= least for n, _ in enumerate(hits, start=1))


@functools.lru_cache(maxsize=1024)
def _word_set(text: str) -> frozenset[str]:
    """The words of a text, kept for the next clauses that ask about the same text."""
    return frozenset(re.findall(r"\w+", text))


def _entry(entry: Any, where: str) -> str:
    entry = " ".join(string(entry, f"{where}: any_of").casefold().split())
    if not entry.removesuffix("*").strip() or "*" in entry[:-1]:
        raise InputError(
            f"{where}: entry {entry!r}: write a word or phrase, with * at its end only"
        )
    return entry


def _pattern(entry: str) -> str:
    body = r"\s+".join(re.escape(word) for word in entry.removesuffix("*").split())
    return rf"(?<!\w){body}" + ("" if entry.endswith("*") else r"(?!\w)")


def _regex(body: Any, where: str) -> Predicate:
    check_mapping(body, where, required=("in", "pattern"))
    region, pattern = _region(body["in"], where), string(body["pattern"], f"{where}: pattern")
    try:
        search = re.compile(pattern).search
    except (re.error, OverflowError) as error:  # OverflowError: a{9...9}
        raise InputError(
            f"{where}: {pattern!r} is not a valid regular expression ({error}); mend it"
        ) from error
    return lambda prompt, response: search(region(prompt, response)) is not None


def _length(body: Any, where: str) -> Predicate:
    check_mapping(body, where, required=("in", "unit"), optional=("min", "max"))
    region, unit = _region(body["in"], where), body["unit"]
    if unit not in ("words", "characters"):
        raise InputError(f"{where}: unit {unit!r} is unknown; use words or characters")
    if not body.keys() & {"min", "max"}:
        raise InputError(f"{where}: needs min or max")
    low = _number(body.get("min", 0), f"{where}: min")
    high = _number(body.get("max", sys.maxsize), f"{where}: max")
    if low > high:
        raise InputError(f"{where}: min={low} is above max={high}; nothing could satisfy it")

    def holds(prompt: str, response: str) -> bool:
        text = region(prompt, response)
        return low <= (len(text.split()) if unit == "words" else len(text)) <= high

    return holds


_PREDICATES: dict[str, Callable[[Any, str], Predicate]] = {
    "words": _words,
    "regex": _regex,
    "length": _length,
    "not": _not,
    "all": _all,
    "any": _any,
    "if": _if,
}

_REGIONS: dict[str, Callable[[str, str], str]] = {
    "prompt": lambda prompt, response: prompt,
    "response": lambda prompt, response: response,
    "ending": lambda prompt, response: " ".join(response.split()[-ENDING_WORDS:]),
}


def _region(name: Any, where: str) -> Callable[[str, str], str]:
    if not isinstance(name, str) or name not in _REGIONS:
        raise InputError(f"{where}: in: {name!r} is unknown; use one of {', '.join(_REGIONS)}")
    return _REGIONS[name]


def _compile_list(body: Any, where: str) -> list[Predicate]:
    if not isinstance(body, list) or not body:
        raise InputError(f"{where}: needs a list of at least one predicate")
    return [compile_rules(part, where) for part in body]


def check_mapping(
    data: Any, where: str, required: Sequence[str], optional: Sequence[str] = ()
) -> None:
    """Raises InputError unless data is a mapping with these keys."""
    known = ", ".join([*required, *optional])
    if not isinstance(data, dict):
        raise InputError(f"{where}: must be a mapping with the keys {known}")
    for key in required:
        if key not in data:
            raise InputError(f"{where}: key {key!r} is missing; add it")
    for key in data:
        if key not in (*required, *optional):
            raise InputError(f"{where}: unknown key {key!r}; use {known}")


def string(value: Any, where: str) -> str:
    """The value, if it is a text; InputError otherwise."""
    if not isinstance(value, str):  # YAML reads a bare no, yes, on, off as a truth value
        raise InputError(f"{where}: {value!r} is not a text; put it in quotes")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise InputError(f"{where}: {value!r} holds half a surrogate pair; write the character")
    return value


def _number(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{where}: {value!r} must be a whole number, 0 or more")
    return value
