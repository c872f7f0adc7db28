"""Impact scores and weights of a run: their figures, what they mean, the extremes, two charts."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_jax import charts, methods
from trace_jax.report import files, triage
from trace_jax.report.files import Row

INFLUENTIAL_SHOWN = 5  # of the most and of the least influential records
_NORMALISED = {
    "mean_one": "weights are scaled to a mean of 1, so they compare with weight 1 for all.",
    "sum_to_one": "weights are scaled to a sum of 1, as in the paper, so their mean is 1 / n.",
}


def collect(workdir: Path, settings: Mapping[str, Any]) -> Row | None:
    """impact_summary.json with "charts", "influential" and "terms": [(name, one line)]."""
    summary = files.read_json(workdir / "impact_summary.json")
    if summary is None:
        return None
    rows = files.read_jsonl(workdir / "impact.jsonl") or ()
    scored = [row for row in rows if row["score"] is not None and not row["gold"]]
    drawn = [_histogram("Impact scores", "score", scored),
             _histogram("Weights in the loss", "weight", scored)]  # fmt: skip
    return summary | {
        "charts": [chart for chart in drawn if chart["names"]],
        "influential": _influential(workdir, scored),
        "terms": _terms(summary, scored, settings) if scored else [],
    }


def _influential(workdir: Path, scored: Sequence[Row]) -> dict[str, list[Row]]:
    """{"most", "least": rows}; none where the two would have records in common."""
    ranked = sorted(scored, key=lambda row: -row["score"])
    ends = {"most": ranked[:INFLUENTIAL_SHOWN], "least": ranked[::-1][:INFLUENTIAL_SHOWN]}
    if len(ranked) < 2 * INFLUENTIAL_SHOWN:
        return {}
    triaged = triage.told(workdir, {row["id"] for of in ends.values() for row in of})
    return {
        name: [row | triaged[row["id"]] for row in of if row["id"] in triaged]
        for name, of in ends.items()
    }


def _terms(
    summary: Row, scored: Sequence[Row], settings: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """What stands in the table and above it, one line each."""
    found = [
        ("Negative score", _negative(scored, settings)),
        (summary["normalisation"], _NORMALISED.get(summary["normalisation"])),
        ("Effective sample size", "(sum of the weights)² / sum of their squares: as many conflicts "
         "of equal weight would carry as much."),
        ("Stability", "rank correlation of the scores from the two halves of the gold batch. 1: "
         "both order the conflicts alike; 0: the order is chance."),
    ]  # fmt: skip
    return [(name, line) for name, line in found if line]


def _negative(scored: Sequence[Row], settings: Mapping[str, Any]) -> str | None:
    """What becomes of a score below 0, as the weights themselves show."""
    if settings.get("impact.weights") == "shuffled":
        return "the weights are dealt to the conflicts of an action at random, a control."
    weights = [row["weight"] for row in scored if row["score"] <= 0]
    lowest = min(weights, default=None)
    if lowest is None or not all(math.isclose(w, lowest, abs_tol=1e-9) for w in weights):
        return None
    if lowest == 0:
        return "counts as 0, which leaves the weight 0: these conflicts do not train."
    strength = settings.get("impact.strength")
    why = "" if strength is None else f": impact.strength={strength:g} is what scores decide of it"
    return f"counts as 0, which leaves the weight {lowest:.3g}{why}."


def _histogram(title: str, key: str, rows: Sequence[Row]) -> Row:
    groups = {a: [row[key] for row in rows if row["action"] == a] for a in methods.CONFLICTS}
    groups = {action: values for action, values in groups.items() if values}
    svg = charts.histogram(groups, f"{title}, records per value", titles=(key, "conflicts"))
    return {"title": title, "names": list(groups), "svg": svg}
