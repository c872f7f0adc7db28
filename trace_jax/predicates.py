"""Predicates: deterministic rules on prompt, response and annotations, as policy files have them.

A predicate is a mapping with one key:

    words:  {in: REGION, any_of: [dog, "fright*", "at last"], at_least: 1}
            holds if so many different entries are found, as whole words in any case; a final *
            stands for the rest of a word
    regex:  {in: REGION, pattern: '[?]'}   a Python regular expression is found anywhere
    length: {in: REGION, unit: words | characters, min: 1, max: 80}   both ends included
    refusal: any | full | partial          the response declines (refusals.py; English)
    label:  NAME   the data set's own annotation of that name is true; or {name: NAME, is: VALUE},
            {name: NAME, at_least: 2, at_most: 3} for texts and numbers
    not: P    all: [P, ...]    any: [P, ...]    if: {when: P, then: P}

REGION is prompt, response or ending (the last ENDING_WORDS words of the response). A `label` that
is not there is unknown: None. The others follow Kleene's logic, so that what is unknown matters
only where it would decide.
"""

import functools
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from trace_jax import refusals
from trace_jax.errors import InputError

Labels = Mapping[str, Any]
NO_LABELS: Labels = types.MappingProxyType({})

ENDING_WORDS = 20
LANGUAGE = 2  # part of every policy hash; raise it when a predicate comes to mean something else


class Predicate(Protocol):
    """Whether something holds of a prompt, a response and their labels; None: not known."""

    def __call__(self, prompt: str, response: str, labels: Labels = NO_LABELS) -> bool | None: ...


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
    return _conjunction(_compile_list(body, where), found_at=False)


def _any(body: Any, where: str) -> Predicate:
    return _conjunction(_compile_list(body, where), found_at=True)


def _conjunction(parts: Sequence[Predicate], *, found_at: bool) -> Predicate:
    """`found_at` as soon as one part is; otherwise None if one is None, else the opposite."""

    def holds(prompt: str, response: str, labels: Labels = NO_LABELS) -> bool | None:
        value: bool | None = not found_at
        for part in parts:
            found = part(prompt, response, labels)
            if found is found_at:
                return found_at
            if found is None:
                value = None
        return value

    return holds


def _not(body: Any, where: str) -> Predicate:
    return _negation(compile_rules(body, where))


def _negation(part: Predicate) -> Predicate:
    def holds(prompt: str, response: str, labels: Labels = NO_LABELS) -> bool | None:
        found = part(prompt, response, labels)
        return None if found is None else not found

    return holds


def _if(body: Any, where: str) -> Predicate:
    check_mapping(body, where, required=("when", "then"))
    when = compile_rules(body["when"], f"{where}: when")
    return implies(when, compile_rules(body["then"], f"{where}: then"))


def implies(when: Predicate, then: Predicate) -> Predicate:
    """`then` where `when` holds, true elsewhere."""
    return _conjunction([_negation(when), then], found_at=True)


def _label(body: Any, where: str) -> Predicate:
    body = {"name": body} if isinstance(body, str) else body
    check_mapping(body, where, required=("name",), optional=("is", "at_least", "at_most"))
    name = string(body["name"], f"{where}: name")
    wanted = {key: value for key, value in body.items() if key != "name"}
    if "is" in wanted and len(wanted) > 1:
        raise InputError(f"{where}: give either 'is', or 'at_least' and 'at_most'")
    for key in ("at_least", "at_most"):
        if key in wanted and not _is_number(wanted[key]):
            raise InputError(f"{where}: {key}: {wanted[key]!r} must be a number")

    def holds(prompt: str, response: str, labels: Labels = NO_LABELS) -> bool | None:
        value = labels.get(name)
        if value is None:
            return None
        if not wanted:
            return value if isinstance(value, bool) else None
        if "is" in wanted:
            return value == wanted["is"]
        if not _is_number(value):
            return None
        return wanted.get("at_least", value) <= value <= wanted.get("at_most", value)

    return holds


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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

    def holds(prompt: str, response: str, labels: Labels = NO_LABELS) -> bool:
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

    def holds(prompt: str, response: str, labels: Labels = NO_LABELS) -> bool:
        return search(region(prompt, response)) is not None

    return holds


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

    def holds(prompt: str, response: str, labels: Labels = NO_LABELS) -> bool:
        text = region(prompt, response)
        return low <= (len(text.split()) if unit == "words" else len(text)) <= high

    return holds


def _refusal(body: Any, where: str) -> Predicate:
    if body not in ("any", *refusals.KINDS[1:]):
        raise InputError(f"{where}: {body!r} is unknown; use any, full or partial")

    def holds(prompt: str, response: str, labels: Labels = NO_LABELS) -> bool:
        kind = _refusal_kind(response)
        return kind != "none" if body == "any" else kind == body

    return holds


_refusal_kind = functools.lru_cache(maxsize=1024)(refusals.kind)


_PREDICATES: dict[str, Callable[[Any, str], Predicate]] = {
    "words": _words,
    "regex": _regex,
    "length": _length,
    "refusal": _refusal,
    "label": _label,
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
