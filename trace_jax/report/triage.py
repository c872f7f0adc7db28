"""How the pairs were treated, with examples, their corrections, and pairs worth a look."""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_jax import methods, policy, reasons, records, shortlist
from trace_jax import workdir as workdirs
from trace_jax.report import files
from trace_jax.report.files import Row

DOUBTFUL_SHOWN = 6
_SIDES = ("prompt", "chosen", "rejected")


def collect(workdir: Path, config: Row) -> Row | None:
    """See `report.collect`."""
    rows = files.read_jsonl(workdir / "triage.jsonl")
    if not rows:
        return None
    actions = Counter(row["action"] for row in rows)
    counted = [
        {"action": action, "n": actions[action], "share": actions[action] / len(rows)}
        for action in records.ACTIONS
    ]
    listed = shortlist.of_workdir(workdir, DOUBTFUL_SHOWN)
    doubtful = [row for row in listed if row["value"] > 1]  # of what a judge is sure of, none
    return {
        "n": len(rows),
        "n_conflicts": sum(actions[action] for action in methods.CONFLICTS),
        "actions": counted,
        "clauses": files.read_json(workdir / "coverage.json") or [],
        "examples": _examples(workdir, config, rows),
        "corrections": _told_corrections(workdir, config, actions["PUNISH"]),
        "overridden": sum("override" in row for row in rows),
        "corrupted": sum("noise" in row for row in rows),
        "doubtful": doubtful,
    }


def told(workdir: Path, ids: Collection[str]) -> dict[str, Row]:
    """Record id -> its row as `reasons.told`, of PUNISH with its correction."""
    rows = files.read_jsonl(workdir / "triage.jsonl") or ()
    found = _corrections(workdir)
    return {r["id"]: reasons.told(r) | _corrected(r["id"], found) for r in rows if r["id"] in ids}


def _examples(workdir: Path, config: Row, rows: Sequence[Row]) -> list[Row]:
    """`reasons.examples`, of PUNISH with their corrections."""
    if "policy" not in config:
        return []
    kept = workdirs.store(workdir, config)
    clauses = reasons.examples(rows, policy.load(config["policy"]["new"]), kept)
    ids = {_key(row): row["id"] for row in rows if row["action"] == "PUNISH"}
    found = _corrections(workdir)
    for of_action in (action for clause in clauses for action in clause["actions"]):
        if of_action["action"] == "PUNISH":
            shown = of_action["rows"]
            of_action["rows"] = [row | _corrected(ids[_key(row)], found) for row in shown]
    return clauses


def _key(row: Row) -> str:
    return json.dumps([row[side] for side in _SIDES], sort_keys=True)


def _corrections(workdir: Path) -> dict[str, Row]:
    """Record id -> its row of corrections.jsonl."""
    rows = files.read_jsonl(workdir / "corrections.jsonl") or ()
    return {row["id"]: row for row in rows}


def _corrected(name: str, found: Mapping[str, Row]) -> Row:
    """{"correction": {"response" or None, "tries"}} where one was sought for this record."""
    return {"correction": found[name]} if name in found else {}


def _told_corrections(workdir: Path, config: Row, n: int) -> str | None:
    """How many PUNISH pairs have a correction, and what becomes of all n of them in the loss."""
    rows = files.read_jsonl(workdir / "corrections.jsonl")
    if rows is None or not n:
        return None
    corrected = sum(row["response"] is not None for row in rows)
    return f"Of {n} PUNISH pairs {corrected} were corrected{_used(config, n - corrected)}"


def _used(config: Row, others: int) -> str:
    """What the method does with a correction y_c, and with the other PUNISH pairs."""
    settings: Mapping[str, Any] = files.flat(config)
    method, punish = settings.get("train.method"), settings.get("train.punish")
    rest = f" The other {others} are left out." if others else ""
    if method == "sft":
        return f": the model learns the complying text y_c.{rest}"
    if method in ("dpo_gold", "dpo_gold_nll"):
        return f": they train as (y_c, chosen), y_c being a text that complies.{rest}"
    if method == "trace_invert_only" or method not in methods.TRACE:
        return f"; method {method} makes no use of that." if method else "."
    if punish == "dual_npo":
        return "; train.punish=dual_npo suppresses both responses of all of them by dual NPO."
    rest = f" The other {others} are suppressed: dual NPO on both responses." if others else ""
    return f": they train as (y_c, chosen), y_c being a text that complies.{rest}"
