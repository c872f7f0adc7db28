"""Triage: the new policy's verdicts on both responses of a record decide what is done with it.

| chosen compliant | rejected compliant | action     |
|------------------|--------------------|------------|
| no               | yes                | INVERT     |
| no               | no                 | PUNISH     |
| yes              | whatever           | RETAIN     |
| anything else    |                    | UNRESOLVED |

Never imports jax.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

from trace_jax import judges, records
from trace_jax.errors import InputError

_BATCH = 1000  # records judged between two writes


def action(chosen_compliant: bool | None, rejected_compliant: bool | None) -> str:
    """INVERT, PUNISH, RETAIN or UNRESOLVED; None is "not decided" and decides nothing."""
    if chosen_compliant is True:
        return "RETAIN"
    if chosen_compliant is None or rejected_compliant is None:
        return "UNRESOLVED"
    return "INVERT" if rejected_compliant else "PUNISH"


def triage(
    found: Sequence[records.PreferenceRecord], judge: judges.Judge
) -> list[records.TriagedRecord]:
    """Judges both responses of every record."""
    verdicts = judge.judge([(r.prompt, y) for r in found for y in (r.chosen, r.rejected)])
    return [
        records.TriagedRecord(r, chosen, rejected, action(chosen.compliant, rejected.compliant))
        for r, chosen, rejected in zip(found, verdicts[::2], verdicts[1::2], strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Records per action, and per clause how many responses (of both sides) violate it."""

    actions: dict[str, int]
    violations: dict[str, int]

    def __str__(self) -> str:
        return ", ".join(f"{name} {n}" for name, n in self.actions.items())


def run(
    found: Sequence[records.PreferenceRecord],
    judge: judges.Judge,
    path: records.AnyPath,
    *,
    progress: Callable[[int], None] | None = None,
) -> Summary:
    """Writes triage.jsonl in record order; what a partial file already holds is not judged again.

    progress: called with the number of records just done, those of the partial file first.

    Raises:
      InputError: the file holds records that are not in `found`, so it belongs to another run.
    """
    with records.JsonlAppender(path) as out:
        foreign = sorted(out.ids - {r.id for r in found})
        if foreign:
            raise InputError(
                f"{path}: holds record {foreign[0]!r}, which is not among the records; delete the "
                "file or use another --workdir"
            )
        remaining = [r for r in found if r.id not in out.ids]
        if progress is not None:
            progress(len(found) - len(remaining))
        for start in range(0, len(remaining), _BATCH):
            batch = remaining[start : start + _BATCH]
            out.append(triaged.to_json() for triaged in triage(batch, judge))
            if progress is not None:
                progress(len(batch))
    return summary(read(path))


def read(path: records.AnyPath) -> list[records.TriagedRecord]:
    """Reads the triaged records of a finished file; a line that is none is an InputError."""
    found = []
    for number, row in records.read_jsonl(path):
        try:
            found.append(records.TriagedRecord.from_json(row))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}:{number}: not a triaged record ({error!r}); delete the line and run again"
            ) from error
    return found


def summary(triaged: Iterable[records.TriagedRecord]) -> Summary:
    """Counts actions and violated clauses; every action and every clause appears, also with 0."""
    actions = dict.fromkeys(records.ACTIONS, 0)
    violations: collections.Counter[str] = collections.Counter()
    for item in triaged:
        actions[item.action] += 1
        sides = (item.chosen_verdict.clauses, item.rejected_verdict.clauses)
        for name, clause in itertools.chain.from_iterable(side.items() for side in sides):
            violations[name] += clause.status == "violating"
    return Summary(actions, dict(violations))
