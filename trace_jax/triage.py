"""Triage: the new policy's verdicts on both responses of a record decide what is done with it.

| chosen compliant | rejected compliant | action     |
|------------------|--------------------|------------|
| no               | yes                | INVERT     |
| no               | no                 | PUNISH     |
| yes              | whatever           | RETAIN     |
| anything else    |                    | UNRESOLVED |

Soft triage gives every action its probability mass instead. Never imports jax.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

from trace_jax import judges, noise, overrides, records
from trace_jax.errors import InputError

_BATCH = 1000  # records judged between two writes


@dataclasses.dataclass(frozen=True)
class Settings:
    """How verdicts become actions; fields as in config section `triage`.

    Attributes:
      decide_by: "status": the judge's own; "probability": compliant_from and violating_below.
      soft: give every record masses of all actions beside its action.
      by_hand: record id -> what people said of it.
      corruptions: record id -> how its verdicts are corrupted, for studies of robustness.
    """

    decide_by: str = "status"
    compliant_from: float = 0.5
    violating_below: float = 0.5
    soft: bool = False
    by_hand: Mapping[str, overrides.Override] = dataclasses.field(default_factory=dict)
    corruptions: Mapping[str, noise.Corruption] = dataclasses.field(default_factory=dict)


def action(chosen_compliant: bool | None, rejected_compliant: bool | None) -> str:
    """INVERT, PUNISH, RETAIN or UNRESOLVED; None is "not decided" and decides nothing."""
    if chosen_compliant is True:
        return "RETAIN"
    if chosen_compliant is None or rejected_compliant is None:
        return "UNRESOLVED"
    return "INVERT" if rejected_compliant else "PUNISH"


def masses(chosen: records.Verdict, rejected: records.Verdict) -> dict[str, float]:
    """Probability of each action, p = P(compliant) of each response; they sum to 1.

    INVERT (1 - p_w) p_l, PUNISH (1 - p_w)(1 - p_l), RETAIN p_w; with p of 0 and 1 the hard table.
    What an undecided response would have decided is UNRESOLVED.
    """
    p_w, p_l = chosen.p_compliant, rejected.p_compliant
    if p_w is None:
        found = {"UNRESOLVED": 1.0}
    elif p_l is None:
        found = {"RETAIN": p_w, "UNRESOLVED": 1 - p_w}
    else:
        found = {"INVERT": (1 - p_w) * p_l, "PUNISH": (1 - p_w) * (1 - p_l), "RETAIN": p_w}
    return {name: found.get(name, 0.0) for name in records.ACTIONS}


def compliant(verdict: records.Verdict, settings: Settings) -> bool | None:
    """Whether the response counts as compliant, None where that is not decided."""
    if settings.decide_by == "status":
        return verdict.compliant
    p = verdict.p_compliant
    if p is None or settings.violating_below <= p < settings.compliant_from:
        return None
    return p >= settings.compliant_from


def decide(
    record: records.PreferenceRecord,
    chosen: records.Verdict,
    rejected: records.Verdict,
    settings: Settings,
) -> records.TriagedRecord:
    """The action from two verdicts, after what people said and any noise asked for."""
    by_hand = settings.by_hand.get(record.id)
    if by_hand is not None:
        chosen, rejected = by_hand.verdicts(chosen, rejected)
    found = action(compliant(chosen, settings), compliant(rejected, settings))
    if by_hand is not None and by_hand.action is not None:
        found = by_hand.action
        chosen, rejected = records.verdicts_of(found, chosen, rejected)
    corruption = settings.corruptions.get(record.id)
    if corruption is not None and found != "UNRESOLVED":
        chosen, rejected, found = corruption.applied(chosen, rejected, found)
        if found is None:
            found = action(compliant(chosen, settings), compliant(rejected, settings))
    return records.TriagedRecord(
        record,
        chosen,
        rejected,
        found,
        masses=_soft(found, by_hand, chosen, rejected) if settings.soft else None,
        override=None if by_hand is None else by_hand.to_json(),
        noise=None if corruption is None else corruption.kind,
    )


def _soft(
    action: str,
    by_hand: overrides.Override | None,
    chosen: records.Verdict,
    rejected: records.Verdict,
) -> dict[str, float]:
    """`masses`, unless people left the record undecided."""
    if by_hand is not None and by_hand.action == action == "UNRESOLVED":
        return {name: float(name == "UNRESOLVED") for name in records.ACTIONS}
    return masses(chosen, rejected)


def trains_nothing(item: records.TriagedRecord) -> bool:
    """Whether it is UNRESOLVED as a whole: soft triage trains on its shares of other actions."""
    if item.masses is None:
        return item.action == "UNRESOLVED"
    return all(not mass for name, mass in item.masses.items() if name != "UNRESOLVED")


def triage(
    found: Sequence[records.PreferenceRecord],
    judge: judges.Judge,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    *,
    progress: Callable[[int], None] | None = None,
) -> list[records.TriagedRecord]:
    """Judges both responses of every record."""
    sides = ("chosen", "rejected")
    items = [judges.Item(r.prompt, getattr(r, s), r.labels_of(s)) for r in found for s in sides]
    verdicts = judge.judge(items, progress=progress)
    pairs = zip(found, verdicts[::2], verdicts[1::2], strict=True)
    return [decide(r, chosen, rejected, settings) for r, chosen, rejected in pairs]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Records per action, and per clause how many responses (of both sides) violate it.

    errors, abstentions: responses whose verdict is one.
    """

    actions: dict[str, int]
    violations: dict[str, int]
    errors: int = 0
    abstentions: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{name} {n}" for name, n in self.actions.items())


def run(
    found: Sequence[records.PreferenceRecord],
    judge: judges.Judge,
    path: records.AnyPath,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    *,
    progress: Callable[[int], None] | None = None,
) -> Summary:
    """Writes triage.jsonl in record order; what a partial file already holds is not judged again.

    progress: called with the number of responses just done, those of the partial file first.

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
            progress(2 * (len(found) - len(remaining)))
        # A judge that keeps its answers is asked for all at once: no call waits for a slow other.
        size = max(1, len(remaining)) if judge.keeps_answers else _BATCH
        for start in range(0, len(remaining), size):
            batch = triage(remaining[start : start + size], judge, settings, progress=progress)
            out.append(triaged.to_json() for triaged in batch)
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
    undecided: collections.Counter[str] = collections.Counter()
    for item in triaged:
        actions[item.action] += 1
        sides = (item.chosen_verdict, item.rejected_verdict)
        undecided.update(verdict.status for verdict in sides)
        clauses = (verdict.clauses.items() for verdict in sides)
        for name, clause in itertools.chain.from_iterable(clauses):
            violations[name] += clause.status == "violating"
    return Summary(actions, dict(violations), undecided["error"], undecided["abstain"])
