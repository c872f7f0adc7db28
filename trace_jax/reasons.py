"""Why pairs were treated as they were: examples by clause and action, in the judge's words.

A judge that reads says why; its words are in the judgement store. Others (rules, labels) name the
clauses alone, which stand with what they ask for.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_jax import policy as policies
from trace_jax import records

EXAMPLES_SHOWN = 2  # of a clause and action
SIDES = ("chosen", "rejected")
_UNDECIDED = ("abstain", "error")

Row = dict[str, Any]


def examples(
    rows: Sequence[Row], policy: policies.Policy, store: Path | None = None
) -> list[dict[str, Any]]:
    """[{"clause", "requirement", "actions": [{"action", "n", "rows"}]}] of rows of triage.jsonl.

    An action's rows are those of its pairs of which a response violates the clause (UNRESOLVED: is
    undecided on it), n of them, and the first that no other clause or action shows. A row is
    `told` with "words": {side: what the judge said}. store: the judgement store, where there is
    one.
    """
    found, shown = [], set()
    for clause in policy.clauses:
        actions = []
        for action in records.ACTIONS:
            wanted = _UNDECIDED if action == "UNRESOLVED" else ("violating",)
            touched = [r for r in rows if r["action"] == action and _says(r, clause.id, wanted)]
            fresh = [r for r in touched if r["id"] not in shown]
            picked = (fresh or touched)[:EXAMPLES_SHOWN]
            shown |= {r["id"] for r in picked}
            if picked:
                actions.append({"action": action, "n": len(touched), "rows": picked})
        if actions:
            about = {"clause": clause.id, "requirement": clause.requirement}
            found.append(about | {"actions": actions})
    words = _words(found, policy, store)
    for of_clause in found:
        for of_action in of_clause["actions"]:
            of_action["rows"] = [
                told(row) | {"words": words.get(row["id"], {})} for row in of_action["rows"]
            ]
    return found


def told(row: Row) -> Row:
    """Texts of a triaged record, and the clauses that each side violates or leaves undecided."""
    out = {key: row[key] for key in ("prompt", *SIDES)}
    for side in SIDES:
        statuses = {name: _status(row, side, name) for name in row[f"{side}_verdict"]["clauses"]}
        out[f"{side}_violates"] = [c for c, s in statuses.items() if s == "violating"]
        out[f"{side}_undecided"] = [c for c, s in statuses.items() if s in _UNDECIDED]
    return out


def _says(row: Row, clause: str, wanted: Sequence[str]) -> bool:
    return any(_status(row, side, clause) in wanted for side in SIDES)


def _status(row: Row, side: str, clause: str) -> str | None:
    found = row[f"{side}_verdict"]["clauses"].get(clause)
    return found["status"] if isinstance(found, Mapping) else found


def _words(found: Sequence[Row], policy: policies.Policy, path: Path | None) -> dict[str, Row]:
    """Record id -> side -> the judge's own words."""
    if path is None or not path.exists():
        return {}
    from trace_jax.judges import store

    rows = [row for c in found for a in c["actions"] for row in a["rows"]]
    hashes = {
        (row["id"], side): store.item_hash(row["prompt"], row[side])
        for row in rows
        for side in SIDES
    }
    kept = store.Store(path, read_only=True)
    said = kept.words(policy.clauses, set(hashes.values()))
    kept.close()
    out: dict[str, Row] = {}
    for (name, side), item in hashes.items():
        if item in said:
            out.setdefault(name, {})[side] = said[item]
    return out
