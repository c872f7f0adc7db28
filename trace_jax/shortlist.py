"""The short list for people: records that the judge most likely got wrong.

    python -m trace_jax.shortlist WORKDIR [--n=50] [--out=FILE]

A record's value is the judge's uncertainty about its action, 0 to 1, plus how far down it is among
the impact scores of that action, 0 to 1: what was judged wrong points away from the gold batch.
Uncertainty times the size of the score, tried before, lists what the judge got right (docs/
results.md has the shares). Fill in "verdict" and give the file back with
--config.triage.overrides=FILE (overrides.py says what may stand there).
"""

import argparse
import bisect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_jax import commands, metrics, records, triage
from trace_jax.errors import InputError


def uncertainty(item: records.TriagedRecord) -> float:
    """0 where one action has all the probability, 1 where three share it or nothing is known."""
    if item.override is not None:
        return 0.0
    masses = triage.masses(item.chosen_verdict, item.rejected_verdict)
    resolved = max(masses[action] for action in ("INVERT", "PUNISH", "RETAIN"))
    return min(1.0, 1.5 * (1.0 - resolved))


def rank(
    triaged: Sequence[records.TriagedRecord], scores: Mapping[str, float], n: int
) -> list[dict[str, Any]]:
    """The n records of highest value, as lines for people to fill in.

    scores: record id -> impact score; records without one stand in the middle of their action.
    """
    of_action: dict[str, list[float]] = {}
    for item in triaged:
        if item.record.id in scores:
            of_action.setdefault(item.action, []).append(scores[item.record.id])
    for found in of_action.values():
        found.sort()
    listed = []
    for item in triaged:
        if item.override is not None:
            continue
        score = scores.get(item.record.id)
        doubt = 0.5 if score is None else _share_above(score, of_action[item.action])
        listed.append((uncertainty(item) + doubt, item))
    listed.sort(key=lambda entry: entry[0], reverse=True)
    return [_line(item, value, scores.get(item.record.id)) for value, item in listed[:n]]


def _share_above(score: float, in_order: Sequence[float]) -> float:
    """Of other scores, 0 to 1; 0.5 where there is no other."""
    others = len(in_order) - 1
    return (len(in_order) - bisect.bisect_right(in_order, score)) / others if others else 0.5


def _line(item: records.TriagedRecord, value: float, score: float | None) -> dict[str, Any]:
    masses = triage.masses(item.chosen_verdict, item.rejected_verdict)
    return {
        "id": item.record.id,
        "verdict": None,
        "by": None,
        "prompt": item.record.prompt,
        "chosen_text": item.record.chosen,
        "rejected_text": item.record.rejected,
        "action": item.action,
        "probabilities": {name: round(mass, 4) for name, mass in masses.items()},
        "score": score,
        "value": value,
    }


def of_workdir(workdir: Path, n: int) -> list[dict[str, Any]]:
    """The short list of a run: after triage, better after impact."""
    if not (workdir / "triage.jsonl").exists():
        raise InputError(f"{workdir}: no triage.jsonl there; run stage triage first")
    impact = workdir / "impact.jsonl"
    rows = (row for _, row in records.read_jsonl(impact)) if impact.exists() else ()
    scores: dict[str, float] = {}
    for row in rows:
        if row["score"] is not None and abs(row["score"]) >= abs(scores.get(row["id"], 0.0)):
            scores[row["id"]] = row["score"]
    return rank(triage.read(workdir / "triage.jsonl"), scores, n)


def main(argv: Sequence[str]) -> int:
    """Exit code 0 written, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m trace_jax.shortlist", description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--n", type=commands.at_least(1), default=50, help="records to list")
    parser.add_argument("--out", type=Path, help="file; default WORKDIR/shortlist.jsonl")
    parser.set_defaults(run=_write)
    return commands.run(parser, argv)


def _write(arguments: argparse.Namespace) -> None:
    rows = of_workdir(arguments.workdir, arguments.n)
    out = arguments.out or arguments.workdir / "shortlist.jsonl"
    records.write_jsonl(out, rows)
    metrics.show(f"{len(rows)} records: {out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
