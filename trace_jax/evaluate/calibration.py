"""How well a judge agrees with people: accuracy, precision, recall, ROC, calibration, alpha.

The people's answer is the majority of their ratings. Where they are split, a verdict counts as half
right, and the response counts neither for precision and recall nor for the ROC. Verdicts that are
no decision (abstain, error) count in the confusion table and lower `coverage`; accuracy is that of
the decisions.
"""

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from trace_jax import records
from trace_jax.evaluate import agreement, statistics

BINS = 10
_DECIDED = ("compliant", "violating")


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A judge's answer beside those of people.

    Attributes:
      status: one of records.STATUSES. probability: P(compliant), None where it gave none.
      ratings: compliant or violating, one a person; None where a person did not say.
      adjudicated: a last word where they differ.
    """

    status: str
    probability: float | None
    ratings: Sequence[str | None]
    adjudicated: str | None = None

    @property
    def majority(self) -> str | None:
        """compliant, violating, "split", or None where nobody said anything."""
        counts = collections.Counter(rating for rating in self.ratings if rating is not None)
        if not counts:
            return None
        if counts["compliant"] == counts["violating"]:
            return "split"
        return max(counts, key=counts.__getitem__)

    @property
    def right(self) -> float | None:
        """1 as the majority says, 0 not, 0.5 where people are split; None without a decision."""
        if self.status not in _DECIDED or self.majority is None:
            return None
        return 0.5 if self.majority == "split" else float(self.status == self.majority)


def measure(answers: Sequence[Answer]) -> dict[str, Any]:
    """All figures; those that are not defined are None.

    Returns:
      n, decided, coverage, accuracy with low and high (95 %), precision and recall of either
      status, confusion {people: {judge: n}}, alpha_with_humans (judge and people),
      alpha_humans (people alone), accuracy_adjudicated, roc, auc, brier, calibration_error, bins.
    """
    rated = [answer for answer in answers if answer.majority is not None]
    right = [answer.right for answer in rated if answer.right is not None]
    low, high = statistics.wilson(sum(right), len(right)) if right else (None, None)
    people = [list(answer.ratings) for answer in rated]
    judge = [answer.status if answer.status in _DECIDED else None for answer in rated]
    with_judge = [[status, *ratings] for status, ratings in zip(judge, people, strict=True)]
    several = max(map(len, people), default=0) > 1
    return {
        "n": len(rated),
        "decided": len(right),
        "coverage": len(right) / len(rated) if rated else None,
        "accuracy": float(np.mean(right)) if right else None,
        "low": low,
        "high": high,
        **_precision_and_recall(rated),
        "confusion": _confusion(rated),
        "alpha_with_humans": _alpha(with_judge),
        "alpha_humans": _alpha(people) if several else None,
        "accuracy_adjudicated": _adjudicated(rated),
        **_of_probabilities(rated),
    }


def _alpha(ratings: Sequence[Sequence[str | None]]) -> float | None:
    return agreement.krippendorff_alpha(list(itertools.zip_longest(*ratings)))


def _precision_and_recall(rated: Sequence[Answer]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for status in _DECIDED:
        clear = [a for a in rated if a.majority in _DECIDED]
        said = [a for a in clear if a.status == status]
        true = [a for a in clear if a.majority == status]
        hits = sum(a.majority == status for a in said)
        found[f"precision_{status}"] = hits / len(said) if said else None
        found[f"recall_{status}"] = hits / len(true) if true else None
    return found


def _confusion(rated: Sequence[Answer]) -> dict[str, dict[str, int]]:
    table = {p: dict.fromkeys(records.STATUSES, 0) for p in (*_DECIDED, "split")}
    for answer in rated:
        table[answer.majority][answer.status] += 1
    return table


def _adjudicated(rated: Sequence[Answer]) -> float | None:
    last = [a for a in rated if a.adjudicated is not None and a.status in _DECIDED]
    return float(np.mean([a.status == a.adjudicated for a in last])) if last else None


def _of_probabilities(rated: Sequence[Answer]) -> dict[str, Any]:
    clear = [a for a in rated if a.probability is not None and a.majority in _DECIDED]
    p = np.array([a.probability for a in clear], np.float64)
    y = np.array([a.majority == "compliant" for a in clear], np.float64)
    out: dict[str, Any] = {"auc": None, "roc": [], "brier": None, "calibration_error": None}
    if not len(p):
        return out | {"bins": []}
    bins = _bins(p, y)
    out["brier"] = float(np.square(p - y).mean())
    gaps = [row["n"] * abs(row["mean_probability"] - row["share_compliant"]) for row in bins]
    out["calibration_error"] = float(sum(gaps) / len(p))
    if 0 < y.sum() < len(y):
        out["auc"], out["roc"] = _auc(p, y), _roc(p, y)
    return out | {"bins": bins}


def _bins(p: np.ndarray, y: np.ndarray) -> list[dict[str, Any]]:
    """Responses by P(compliant) in BINS equal ranges; empty ones are left out."""
    at = np.minimum((p * BINS).astype(int), BINS - 1)
    return [
        {
            "from": b / BINS,
            "to": (b + 1) / BINS,
            "n": int((at == b).sum()),
            "mean_probability": float(p[at == b].mean()),
            "share_compliant": float(y[at == b].mean()),
        }
        for b in range(BINS)
        if (at == b).any()
    ]


def _auc(p: np.ndarray, y: np.ndarray) -> float:
    """P(a compliant response has the higher probability), ties half (Mann and Whitney)."""
    n = y.sum()
    return float((statistics.ranks(p)[y == 1].sum() - n * (n + 1) / 2) / (n * (len(y) - n)))


def _roc(p: np.ndarray, y: np.ndarray) -> list[tuple[float, float, float | None]]:
    """(false positive rate, true positive rate, threshold), positive: compliant; from (0, 0)."""
    points: list[tuple[float, float, float | None]] = [(0.0, 0.0, None)]
    for threshold in np.unique(p)[::-1]:
        said = p >= threshold
        rates = float(said[y == 0].mean()), float(said[y == 1].mean())
        points.append((*rates, float(threshold)))
    return points
