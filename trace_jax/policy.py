"""Policies: clauses in words, for judges that read, with predicates for those that do not, in YAML.

    name: stories_new
    description: what the policy is for
    clauses:
      - id: no_fear
        tier: high                     # critical | high | standard (the default) | reduced
        requirement: The story must not frighten.
        exceptions: [A villain may be named.]   # contexts in which the requirement is waived
        omission: A flat refusal to tell any story violates this clause as well.
        zero_tolerance: false          # true: no context excuses a violation; no exceptions then
        when: ...                      # optional predicate: the clause is about these cases only
        rules: {not: {words: {in: response, any_of: [scared, afraid, fright*]}}}
        labels: {not: {label: frightening}}

`rules` and `labels` say when a response complies: to the judges of these names. A clause without
them is for judges that read. The predicates are listed in `predicates.py`, the whole in
docs/policies.md. `python -m trace_jax.policy diff OLD NEW` prints what changed, and which stored
verdicts stay valid. Standard library and PyYAML only.
"""

import dataclasses
import functools
import hashlib
import importlib.resources
import importlib.resources.abc
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trace_jax import predicates, remote
from trace_jax.errors import InputError

TIERS = ("critical", "high", "standard", "reduced")


def _compiled() -> Any:
    return dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Clause:
    """One requirement.

    Attributes:
      exceptions: contexts, in words, in which the requirement is waived.
      omission: in words, what leaves the requirement unmet although nothing forbidden is said.
      zero_tolerance: no context excuses a violation.
      rules, labels: predicates as written, None where none decides it.
      when: a predicate as written; where it does not hold, the clause asks for nothing.
      by_rules, by_labels: `rules` and `labels` where `when` holds, compiled; None without them.
      applies: `when`, compiled; None where the clause is about every case.
    """

    id: str
    tier: str
    requirement: str
    rules: Mapping[str, Any] | None = None
    when: Mapping[str, Any] | None = None
    labels: Mapping[str, Any] | None = None
    exceptions: tuple[str, ...] = ()
    omission: str = ""
    zero_tolerance: bool = False
    by_rules: predicates.Predicate | None = _compiled()
    by_labels: predicates.Predicate | None = _compiled()
    applies: predicates.Predicate | None = _compiled()

    def __hash__(self) -> int:
        return hash(self.hash)  # predicates as written are mappings, which have none

    @functools.cached_property
    def hash(self) -> str:
        """Over everything that can change a verdict on this clause."""
        parts = [predicates.LANGUAGE, self.id, self.tier, self.rules, self.when, self.labels]
        return _digest([*parts, self.text_hash])

    @functools.cached_property
    def text_hash(self) -> str:
        """Over what a judge that reads is shown of it; stored verdicts hold as long as this."""
        words = [self.requirement, *self.exceptions, self.omission]
        return _digest([self.id, self.zero_tolerance, [" ".join(text.split()) for text in words]])


@dataclasses.dataclass(frozen=True)
class Policy:
    """A named set of clauses. `source` is the YAML text it came from."""

    name: str
    description: str
    clauses: tuple[Clause, ...]
    source: str = dataclasses.field(default="", compare=False, repr=False)

    @functools.cached_property
    def hash(self) -> str:
        """Over everything that can change a verdict: all clauses in order, not name and prose."""
        return _digest([clause.hash for clause in self.clauses])


@dataclasses.dataclass(frozen=True)
class Diff:
    """Clause ids that the new policy added, removed, changed and kept."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    unchanged: tuple[str, ...]


def load(name_or_path: str | os.PathLike[str], *, extended_by: tuple[str, ...] = ()) -> Policy:
    """Loads a policy by shipped name or from a file. extended_by: files that want it for theirs.

    Raises:
      InputError: anything wrong with it, with file and line.
    """
    name = os.fspath(name_or_path)
    if not re.fullmatch(r"\w+", name):
        try:
            return parse(remote.local(name).read_text(encoding="utf-8"), name, extended_by)
        except OSError as error:
            raise InputError(
                f"{name}: cannot be read ({error.strerror}); check the path"
            ) from error
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: not UTF-8 ({error.reason}); re-encode the file") from error
    if name not in shipped():
        raise InputError(
            f"no policy {name!r} comes with the package; use one of {', '.join(shipped())} or the "
            "path of a .yaml file"
        )
    return _shipped(name)


@functools.cache
def _shipped(name: str) -> Policy:
    """A run asks for each several times; a file of a user's may change meanwhile."""
    return parse((_folder() / f"{name}.yaml").read_text(encoding="utf-8"), f"{name}.yaml")


def shipped() -> tuple[str, ...]:
    """Names of the policies that come with the package."""
    return tuple(sorted(Path(f.name).stem for f in _folder().iterdir() if f.name.endswith(".yaml")))


def _folder() -> importlib.resources.abc.Traversable:
    return importlib.resources.files("trace_jax") / "policies"


def parse(text: str, where: str = "policy", extended_by: tuple[str, ...] = ()) -> Policy:
    """Reads a policy from YAML text; `where` names it in errors, and is what paths start from."""
    data, lines = _parse_yaml(text, where)
    try:
        if isinstance(data, dict) and "extends" in data:
            data, lines = _extended(data, lines, where, extended_by)
            text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)  # whole by itself
        return _policy(data, lines, where, text)
    except RecursionError as error:
        raise InputError(f"{where}: nested too deeply; does an anchor contain itself?") from error


def _extended(
    data: dict[str, Any], lines: Sequence[int], where: str, extended_by: tuple[str, ...]
) -> tuple[dict[str, Any], list[int]]:
    """The policy that `extends` names, with this one's clauses in place of those of their ids.

    New clauses come last; those of `without` are gone.
    """
    predicates.check_mapping(
        data, where, ("name", "extends"), ("description", "clauses", "without")
    )
    other = predicates.string(data["extends"], f"{where}: extends")
    if where in extended_by:
        raise InputError(f"{where}: extends itself, by way of {extended_by[-1]}")
    if not other.isprintable():
        raise InputError(f"{where}: extends: {other!r} is no name and no path")
    path = other if re.fullmatch(r"\w+", other) else os.path.join(os.path.dirname(where), other)
    base = load(path, extended_by=(*extended_by, where))
    own = data.get("clauses") or []
    dropped = data.get("without") or []
    if not isinstance(own, list) or not isinstance(dropped, list):
        raise InputError(f"{where}: clauses and without must be lists")
    places = {clause.id: 0 for clause in base.clauses}
    merged = {c["id"]: c for c in yaml.safe_load(base.source)["clauses"]}
    for line, clause in zip(lines, own, strict=True):
        if not isinstance(clause, dict) or not isinstance(clause.get("id"), str):
            raise InputError(f"{where}:{line}: a clause needs an id")
        if places.get(clause["id"]):
            raise InputError(
                f"{where}:{line}: two clauses have the id {clause['id']!r}; rename one"
            )
        merged[clause["id"]], places[clause["id"]] = clause, line
    for name in dropped:
        if not isinstance(name, str):
            raise InputError(f"{where}: without: {name!r} is no id of a clause")
        if merged.pop(name, None) is None:
            raise InputError(f"{where}: without: {other} has no clause {name!r}")
        places.pop(name)
    whole = {"name": data["name"], "description": data.get("description", base.description)}
    return whole | {"clauses": list(merged.values())}, list(places.values())


def _policy(data: Any, lines: Sequence[int], where: str, text: str) -> Policy:
    predicates.check_mapping(data, where, required=("name", "clauses"), optional=("description",))
    clauses = data["clauses"]
    if not isinstance(clauses, list) or not clauses:
        raise InputError(f"{where}: clauses must be a list of at least one clause")
    seen: dict[str, Clause] = {}
    for line, clause_data in zip(lines, clauses, strict=True):
        clause = _clause(clause_data, f"{where}:{line}")
        if clause.id in seen:
            raise InputError(f"{where}:{line}: two clauses have the id {clause.id!r}; rename one")
        seen[clause.id] = clause
    name = predicates.string(data["name"], f"{where}: name")
    description = predicates.string(data.get("description", ""), f"{where}: description")
    return Policy(name, description, tuple(seen.values()), text)


def _parse_yaml(text: str, where: str) -> tuple[Any, list[int]]:
    """The document, and the line of each of its clauses."""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        _check_nodes(root, where)
        data = loader.construct_document(root) if root else None
        return data, _clause_lines(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{where}:{mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
        raise InputError(f"{at}: not valid YAML ({problem})") from error
    except (
        ValueError,
        TypeError,
        RecursionError,
    ) as error:  # 2024-99-99; 10,000 brackets
        raise InputError(f"{where}: not valid YAML ({error})") from error


def _check_nodes(root: yaml.Node | None, where: str) -> None:
    """YAML's loader would let the last of two equal keys win, and halves of characters pass."""
    remaining, seen = [root], set()
    while remaining:
        node = remaining.pop()
        if id(node) in seen or node is None:
            continue
        seen.add(id(node))
        line = node.start_mark.line + 1
        if isinstance(node, yaml.ScalarNode):
            if any("\ud800" <= character <= "\udfff" for character in node.value):
                raise InputError(f"{where}:{line}: half of a surrogate pair; write the character")
            continue
        if isinstance(node, yaml.SequenceNode):
            remaining += node.value
            continue
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise InputError(f"{where}:{line}: key {twice!r} is given twice; keep one")
        remaining += [part for pair in node.value for part in pair]


def _clause_lines(root: yaml.Node | None) -> list[int]:
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    lists = [v for k, v in pairs if k.value == "clauses" and isinstance(v, yaml.SequenceNode)]
    return [node.start_mark.line + 1 for found in lists for node in found.value]


_OPTIONAL = ("tier", "exceptions", "omission", "zero_tolerance", "when", "rules", "labels")


def _clause(data: Any, where: str) -> Clause:
    predicates.check_mapping(data, where, ("id", "requirement"), _OPTIONAL)
    name = predicates.string(data["id"], f"{where}: id")
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise InputError(f"{where}: id {name!r} may hold letters, digits, '_', '.' and '-' only")
    where = f"{where}: clause {name}"
    requirement = predicates.string(data["requirement"], f"{where}: requirement").strip()
    if not requirement:
        raise InputError(f"{where}: requirement is empty; say in words what is asked")
    tier = data.get("tier", "standard")
    if tier not in TIERS:
        raise InputError(f"{where}: tier {tier!r} is unknown; use one of {', '.join(TIERS)}")
    exceptions = _exceptions(data.get("exceptions", []), where)
    zero_tolerance = data.get("zero_tolerance", False)
    if not isinstance(zero_tolerance, bool):
        raise InputError(f"{where}: zero_tolerance: {zero_tolerance!r} must be true or false")
    if zero_tolerance and exceptions:
        raise InputError(f"{where}: zero_tolerance and exceptions contradict each other; drop one")
    compiled = {
        key: predicates.compile_rules(data[key], where if key == "rules" else f"{where}: {key}")
        for key in ("rules", "labels", "when")
        if key in data
    }
    applies = compiled.pop("when", None)
    if applies is not None:
        compiled = {key: predicates.implies(applies, p) for key, p in compiled.items()}
    return Clause(
        name,
        tier,
        requirement,
        rules=data.get("rules"),
        when=data.get("when"),
        labels=data.get("labels"),
        exceptions=exceptions,
        omission=predicates.string(data.get("omission", ""), f"{where}: omission").strip(),
        zero_tolerance=zero_tolerance,
        by_rules=compiled.get("rules"),
        by_labels=compiled.get("labels"),
        applies=applies,
    )


def _exceptions(found: Any, where: str) -> tuple[str, ...]:
    if not isinstance(found, list):
        raise InputError(f"{where}: exceptions must be a list of texts")
    texts = tuple(predicates.string(text, f"{where}: exceptions").strip() for text in found)
    if not all(texts):
        raise InputError(f"{where}: an exception is empty; say in words when it holds, or drop it")
    return texts


def _digest(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def diff(old: Policy, new: Policy) -> Diff:
    """What changed from old to new, by clause id; a clause with another hash is changed."""
    before = {clause.id: clause.hash for clause in old.clauses}
    after = {clause.id: clause.hash for clause in new.clauses}
    return Diff(
        added=tuple(i for i in after if i not in before),
        removed=tuple(i for i in before if i not in after),
        changed=tuple(i for i in after if i in before and before[i] != after[i]),
        unchanged=tuple(i for i in after if before.get(i) == after[i]),
    )


if __name__ == "__main__":
    from trace_jax import policy_commands

    sys.exit(policy_commands.main(sys.argv[1:]))
