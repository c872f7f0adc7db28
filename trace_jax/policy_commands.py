"""`python -m trace_jax.policy`: list, check and compare policies."""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from trace_jax import commands, errors, policy
from trace_jax.errors import InputError

_KEYS = ("tier", "when", "rules", "labels")


def main(argv: Sequence[str]) -> int:
    """Runs a command; 2 where its input is wrong."""
    return commands.run(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trace_jax.policy", description=__doc__)
    found = parser.add_subparsers(required=True, metavar="COMMAND")
    command = found.add_parser("list", help="the policies that come with the package")
    command.set_defaults(run=_printing(lambda arguments: _list()))
    command = found.add_parser("check", help="validate policies and say who can judge them")
    command.add_argument("policies", nargs="+", metavar="POLICY", help="a shipped name or a file")
    command.set_defaults(run=_printing(lambda arguments: _check(arguments.policies)))
    command = found.add_parser("diff", help="what changed, and which stored verdicts stay valid")
    command.add_argument("old", metavar="OLD", help="a shipped name or a file")
    command.add_argument("new", metavar="NEW", help="a shipped name or a file")
    command.add_argument("--store", help="count the verdicts of this judgement store")
    command.set_defaults(run=_printing(_diff))
    return parser


def _printing(lines: Callable[[argparse.Namespace], Iterator[str]]) -> Callable[..., None]:
    """All lines or, after an error, none."""
    return lambda arguments: print("\n".join([errors.printable(x) for x in lines(arguments)]))


def _list() -> Iterator[str]:
    found = [policy.load(name) for name in policy.shipped()]
    width = max(len(one.name) for one in found)
    for one in found:
        description = " ".join(one.description.split())
        yield f"{one.name:{width}}  {len(one.clauses):2} clauses  {description}"


def _check(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        one = policy.load(name)
        n = len(one.clauses)
        by = {
            "rules": sum(clause.by_rules is not None for clause in one.clauses),
            "labels": sum(clause.by_labels is not None for clause in one.clauses),
        }
        decided = ", ".join(f"{judge} can decide {k} of {n}" for judge, k in by.items())
        yield f"{name}: valid; {n} clauses, {decided}; judges that read can decide all; {one.hash}"


def _diff(arguments: argparse.Namespace) -> Iterator[str]:
    old, new = policy.load(arguments.old), policy.load(arguments.new)
    before = {clause.id: clause for clause in old.clauses}
    after = {clause.id: clause for clause in new.clauses}
    for kind, ids in dataclasses.asdict(policy.diff(old, new)).items():
        for i in ids:
            yield f"{kind:9}  {i}: {_words_of(before.get(i, after.get(i)))}"
            if kind == "changed":
                yield from _changes(before[i], after[i])
    yield ""
    valid = [c.id for c in new.clauses if c.text_hash in {b.text_hash for b in old.clauses}]
    asked = [c.id for c in new.clauses if c.id not in valid]
    yield f"stored verdicts of judges that read stay valid for: {', '.join(valid) or 'no clause'}"
    yield f"they are asked anew for: {', '.join(asked) or 'no clause'}"
    if arguments.store is not None:
        yield from _stored(arguments.store, old, new)


def _stored(path: str, old: policy.Policy, new: policy.Policy) -> Iterator[str]:
    from trace_jax.judges import store

    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; give the judgement store of a run (--store)")
    kept = store.Store(path, read_only=True)
    valid = kept.counts(new.clauses)
    n_old, n_new = sum(kept.counts(old.clauses).values()), sum(valid.values())
    counts = ", ".join(f"{i} {n}" for i, n in valid.items())
    yield f"{path}: {n_old} verdicts on the clauses of {old.name}, {n_new} valid for {new.name}"
    yield f"of them on: {counts}"


def _words_of(clause: policy.Clause) -> str:
    """What a judge that reads is shown of a clause, in one line."""
    parts = [clause.requirement]
    parts += [f"Except: {text}" for text in clause.exceptions]
    parts += [f"By omission: {clause.omission}"] if clause.omission else []
    parts += ["Zero tolerance."] if clause.zero_tolerance else []
    return " ".join(" ".join(parts).split())


def _changes(old: policy.Clause, new: policy.Clause) -> Iterator[str]:
    if _words_of(old) != _words_of(new):
        yield f"{'':9}  now: {_words_of(new)}"
    keys = [key for key in _KEYS if getattr(old, key) != getattr(new, key)]
    if keys:
        yield f"{'':9}  in {', '.join(keys)}" + (" only" if old.text_hash == new.text_hash else "")
