"""Coverage: what the new policy asks for, and how much of it the conflicts show.

A clause that no conflict touches is not learnt from this data, however well training goes.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from trace_jax import policy as policies
from trace_jax import records

CONFLICTS = ("INVERT", "PUNISH")


@dataclasses.dataclass(frozen=True)
class Clause:
    """One clause of the new policy in the triaged data.

    Attributes:
      chosen, rejected: responses of that side that violate it.
      conflicts: INVERT and PUNISH records with a response that violates it.
      undecided: responses on which the judge decided nothing for this clause.
      rare: fewer conflicts than wanted.
    """

    id: str
    tier: str
    chosen: int
    rejected: int
    conflicts: int
    undecided: int
    rare: bool


def of(
    policy: policies.Policy, triaged: Iterable[records.TriagedRecord], *, least: int
) -> list[Clause]:
    """Counts for every clause of `policy`, in its order; rare: fewer than `least` conflicts."""
    counts = {clause.id: dict.fromkeys(("chosen", "rejected", "conflicts", "undecided"), 0)
              for clause in policy.clauses}  # fmt: skip
    for item in triaged:
        sides = {"chosen": item.chosen_verdict, "rejected": item.rejected_verdict}
        for name, count in counts.items():
            given = {s: v.clauses[name].status for s, v in sides.items() if name in v.clauses}
            for side, status in given.items():
                count[side] += status == "violating"
                count["undecided"] += status in ("abstain", "error")
            count["conflicts"] += item.action in CONFLICTS and "violating" in given.values()
    return [
        Clause(c.id, c.tier, **counts[c.id], rare=counts[c.id]["conflicts"] < least)
        for c in policy.clauses
    ]


def warnings(clauses: Sequence[Clause], *, least: int) -> list[str]:
    """One line for each clause that the data hardly shows."""
    return [
        f"clause {c.id} ({c.tier}): {c.conflicts} conflicts touch it, fewer than {least}; the data "
        "hardly shows what it asks for"
        for c in clauses
        if c.rare
    ]
