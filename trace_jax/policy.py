"""Policies: clauses in words, each with a deterministic predicate for the `rules` judge, read from YAML.

    name: stories_new
    description: what it is for
    clauses:
      - id: no_fear
        tier: high                     # critical | high | standard | reduced
        requirement: The story must not frighten.
        rules: {not: {words: {in: response, any_of: [scared, afraid, fright*]}}}

A predicate is a mapping with one key; `docs` of each are in `_PREDICATES`. `python -m trace_jax.policy diff OLD NEW` prints
what changed. Standard library and PyYAML only.
"""

import dataclasses
import hashlib
import importlib.resources
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from trace_jax.errors import InputError

Predicate = Callable[[str, str], bool]  # (prompt, response) -> does it hold?
TIERS = ("critical", "high", "standard", "reduced")
REGIONS = ("response", "prompt", "ending")
ENDING_WORDS = 20  # `ending` is the last so many words of the response


@dataclasses.dataclass(frozen=True)
class Clause:
    """One requirement. `rules` is its predicate as written, None where no rule can decide it."""

    id: str
    tier: str
    requirement: str
    rules: Mapping[str, Any] | None
    predicate: Predicate | None = dataclasses.field(compare=False, repr=False)

    @property
    def hash(self) -> str:
        """Over everything that can change a verdict on this clause."""
        return _digest([self.id, self.tier, self.requirement, self.rules])


@dataclasses.dataclass(frozen=True)
class Policy:
    """A named set of clauses. `source` is the YAML text it came from."""

    name: str
    description: str
    clauses: tuple[Clause, ...]
    source: str = dataclasses.field(compare=False, repr=False)

    @property
    def hash(self) -> str:
        """Over all clauses."""
        return _digest([clause.hash for clause in self.clauses])


@dataclasses.dataclass(frozen=True)
class Diff:
    """Clause ids that the new policy added, removed, changed and kept."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    unchanged: tuple[str, ...]


def load(name_or_path: str) -> Policy:
    """A policy by shipped name or file; anything wrong with it is one InputError line with file and line number."""
    return parse(*_read(name_or_path))


def shipped() -> tuple[str, ...]:
    """Names of the policies that come with the package."""
    folder = importlib.resources.files("trace_jax") / "policies"
    return tuple(sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml")))


def _read(name_or_path: str) -> tuple[str, str]:
    if re.fullmatch(r"\w+", name_or_path):
        if name_or_path not in shipped():
            raise InputError(f"no policy named {name_or_path!r} is shipped ({', '.join(shipped())}); give a .yaml file")
        file = importlib.resources.files("trace_jax") / "policies" / f"{name_or_path}.yaml"
        return file.read_text(encoding="utf-8"), file.name
    try:
        return Path(name_or_path).read_text(encoding="utf-8"), name_or_path
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"policy file {name_or_path} cannot be read: {error}") from error


def parse(text: str, where: str = "policy") -> Policy:
    """A policy from YAML text; `where` names it in errors."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{where}{line}: not valid YAML ({getattr(error, 'problem', error)})") from error
    if not isinstance(data, dict):
        raise InputError(f"{where}: a policy is a mapping with name, description and clauses")
    _keys(data, {"name", "clauses"}, {"description"}, where)
    if not isinstance(data["clauses"], list) or not data["clauses"]:
        raise InputError(f"{where}: the policy has no clauses; write at least one")
    lines = _clause_lines(root)
    clauses = tuple(_clause(c, f"{where}:{line}") for c, line in zip(data["clauses"], lines, strict=True))
    seen: set[str] = set()
    for clause, line in zip(clauses, lines, strict=True):
        if clause.id in seen:
            raise InputError(f"{where}:{line}: two clauses have the id {clause.id!r}; rename one")
        seen.add(clause.id)
    return Policy(str(data["name"]), str(data.get("description", "")), clauses, text)


def _clause_lines(root: yaml.Node) -> list[int]:
    for key, value in root.value:
        if key.value == "clauses":
            return [node.start_mark.line + 1 for node in value.value]
    return []


def _clause(data: Any, where: str) -> Clause:
    if not isinstance(data, dict):
        raise InputError(f"{where}: a clause is a mapping with id and requirement")
    _keys(data, {"id", "requirement"}, {"tier", "rules"}, where)
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", str(data["id"])):
        raise InputError(f"{where}: clause id {data['id']!r} may hold letters, digits, '_', '.' and '-' only")
    tier = data.get("tier", "standard")
    if tier not in TIERS:
        raise InputError(f"{where}: tier {tier!r} is unknown; use one of {', '.join(TIERS)}")
    rules = data.get("rules")
    predicate = None if rules is None else _compile(rules, f"{where}: clause {data['id']}")
    return Clause(str(data["id"]), tier, str(data["requirement"]).strip(), rules, predicate)


def _keys(data: Mapping, required: set[str], optional: set[str], where: str) -> None:
    missing, unknown = required - data.keys(), data.keys() - required - optional
    if missing:
        raise InputError(f"{where}: {', '.join(sorted(missing))} missing")
    if unknown:
        known = ", ".join(sorted(required | optional))
        raise InputError(f"{where}: unknown key {', '.join(sorted(map(str, unknown)))}; known: {known}")


def _compile(rules: Any, where: str) -> Predicate:
    if not isinstance(rules, dict) or len(rules) != 1:
        raise InputError(f"{where}: a predicate is a mapping with one key, one of {', '.join(_PREDICATES)}")
    (name, body), *_ = rules.items()
    if name not in _PREDICATES:
        raise InputError(f"{where}: unknown predicate {name!r}; known: {', '.join(_PREDICATES)}")
    return _PREDICATES[name](body, f"{where}: {name}")


def _all(body: Any, where: str) -> Predicate:
    """all: [predicates], every one holds."""
    parts = _list_of(body, where)
    return lambda prompt, response: all(p(prompt, response) for p in parts)


def _any(body: Any, where: str) -> Predicate:
    """any: [predicates], at least one holds."""
    parts = _list_of(body, where)
    return lambda prompt, response: any(p(prompt, response) for p in parts)


def _not(body: Any, where: str) -> Predicate:
    """not: predicate."""
    part = _compile(body, where)
    return lambda prompt, response: not part(prompt, response)


def _if(body: Any, where: str) -> Predicate:
    """if: {when: predicate, then: predicate}, holds where `when` does not."""
    _mapping(body, {"when", "then"}, set(), where)
    when, then = _compile(body["when"], where), _compile(body["then"], where)
    return lambda prompt, response: not when(prompt, response) or then(prompt, response)


def _words(body: Any, where: str) -> Predicate:
    """words: {in: region, any_of: [words or phrases, "fright*" for a beginning], at_least: 1}, whole words, any case."""
    _mapping(body, {"in", "any_of"}, {"at_least"}, where)
    entries = body["any_of"]
    if not isinstance(entries, list) or not entries or not all(isinstance(e, str) and e.strip("* ") for e in entries):
        raise InputError(f"{where}: any_of must be a list of words")
    pattern = re.compile("|".join(_word_pattern(e) for e in entries), re.IGNORECASE)
    region, least = _region(body["in"], where), _count(body.get("at_least", 1), where)
    if least == 1:
        return lambda prompt, response: pattern.search(region(prompt, response)) is not None
    return lambda prompt, response: len(pattern.findall(region(prompt, response))) >= least


def _word_pattern(entry: str) -> str:
    body = r"\s+".join(re.escape(w) for w in entry.rstrip("*").split())
    return rf"(?<!\w){body}" + (r"\w*" if entry.endswith("*") else r"(?!\w)")


def _regex(body: Any, where: str) -> Predicate:
    """regex: {in: region, pattern: Python regular expression}, found anywhere."""
    _mapping(body, {"in", "pattern"}, set(), where)
    region = _region(body["in"], where)
    try:
        pattern = re.compile(body["pattern"])
    except (re.error, TypeError) as error:
        raise InputError(f"{where}: pattern {body['pattern']!r} is not a regular expression ({error})") from error
    return lambda prompt, response: pattern.search(region(prompt, response)) is not None


def _length(body: Any, where: str) -> Predicate:
    """length: {in: region, unit: words | characters, min: n, max: n}, both ends included."""
    _mapping(body, {"in", "unit"}, {"min", "max"}, where)
    if body["unit"] not in ("words", "characters"):
        raise InputError(f"{where}: unit {body['unit']!r} is unknown; use words or characters")
    region = _region(body["in"], where)
    low, high = _count(body.get("min", 0), where), body.get("max")
    high = None if high is None else _count(high, where)

    def holds(prompt: str, response: str) -> bool:
        text = region(prompt, response)
        n = len(text.split()) if body["unit"] == "words" else len(text)
        return low <= n and (high is None or n <= high)

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


def _list_of(body: Any, where: str) -> list[Predicate]:
    if not isinstance(body, list) or not body:
        raise InputError(f"{where}: needs a list of predicates")
    return [_compile(part, where) for part in body]


def _mapping(body: Any, required: set[str], optional: set[str], where: str) -> None:
    if not isinstance(body, dict):
        raise InputError(f"{where}: needs {', '.join(sorted(required))}")
    _keys(body, required, optional, where)


def _count(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{where}: {value!r} must be a whole number, 0 or more")
    return value


def _region(name: Any, where: str) -> Callable[[str, str], str]:
    if name not in REGIONS:
        raise InputError(f"{where}: in: {name!r} is unknown; use one of {', '.join(REGIONS)}")
    if name == "ending":
        return lambda prompt, response: " ".join(response.split()[-ENDING_WORDS:])
    return (lambda prompt, response: response) if name == "response" else (lambda prompt, response: prompt)


def diff(old: Policy, new: Policy) -> Diff:
    """What changed from old to new, by clause id; a clause that reads otherwise is changed."""
    before = {c.id: c.hash for c in old.clauses}
    after = {c.id: c.hash for c in new.clauses}
    return Diff(
        added=tuple(i for i in after if i not in before),
        removed=tuple(i for i in before if i not in after),
        changed=tuple(i for i in after if i in before and before[i] != after[i]),
        unchanged=tuple(i for i in after if before.get(i) == after[i]),
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def main(argv: list[str]) -> int:
    """`python -m trace_jax.policy diff OLD NEW`."""
    if len(argv) != 4 or argv[1] != "diff":
        print("usage: python -m trace_jax.policy diff OLD NEW (shipped names or files)", file=sys.stderr)
        return 2
    try:
        old, new = load(argv[2]), load(argv[3])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found, requirement = diff(old, new), {c.id: c.requirement for c in old.clauses + new.clauses}
    for kind, ids in dataclasses.asdict(found).items():
        for clause_id in ids:
            print(f"{kind:9}  {clause_id}: {requirement[clause_id]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
