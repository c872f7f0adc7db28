"""Win rates: which of two responses to a prompt a judge prefers, asked in both orders.

A pair is won only by a judge that prefers the same response in both orders. Where the order
decides, the pair is a tie that counts as inconsistent; where either reply decides nothing, it
counts nowhere but is reported.

A judge of a policy may well prefer a text that says nothing, since it violates nothing. Guarded, a
degenerate response (`guard.py`) loses to one that is not, whatever the judge said; two tie.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from trace_jax import judges, records
from trace_jax.evaluate import statistics

OUTCOMES = ("a", "b", "tie", "inconsistent", "undecided")
_MIRROR = {"a": "b", "b": "a", "tie": "tie", "undecided": "undecided"}
_SCORES = {"a": 1.0, "b": 0.0, "tie": 0.5, "inconsistent": 0.5}


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one prompt; a is the one whose win rate is asked for.

    Attributes:
      seed: of the runs that gave them.
      degenerate: whether the guard refuses a, and b; None where nobody looked.
    """

    prompt: records.Text
    a: records.Text
    b: records.Text
    seed: int = 0
    degenerate: tuple[bool, bool] | None = None


def outcomes(judge: judges.Comparer, pairs: Sequence[Pair]) -> list[str]:
    """One of OUTCOMES per pair; equal responses tie without a question."""
    asked = [pair for pair in pairs if pair.a != pair.b]
    orders = [(p.prompt, p.a, p.b) for p in asked] + [(p.prompt, p.b, p.a) for p in asked]
    answers = judge.compare(orders)
    both = zip(answers[: len(asked)], answers[len(asked) :], strict=True)
    found = (_outcome(*answer) for answer in both)
    return ["tie" if pair.a == pair.b else next(found) for pair in pairs]


def _outcome(straight: str, mirrored: str) -> str:
    if "undecided" in (straight, mirrored):
        return "undecided"
    return straight if straight == _MIRROR[mirrored] else "inconsistent"


def guarded(pairs: Sequence[Pair], found: Sequence[str]) -> list[str]:
    """The outcomes where a degenerate response loses to one that is not, and two tie."""
    decided = {(True, True): "tie", (True, False): "b", (False, True): "a"}
    return [decided.get(pair.degenerate, outcome)
            for pair, outcome in zip(pairs, found, strict=True)]  # fmt: skip


def summary(pairs: Sequence[Pair], found: Sequence[str]) -> dict[str, Any]:
    """The win rate of a over b: wins and half of the ties, of all decided pairs.

    Returns:
      win_rate (the mean over prompts and seeds) with low and high (95 %, over prompts and seeds), n
      (decided pairs), ties (their share that the judge calls equal), counts, position_consistency
      (of decided pairs that are not equal texts), longer_wins (share of won pairs of different
      length that the longer response won), length_ratio (a over b, characters); and, where the
      guard was asked, guarded: the first five of these for `guarded` outcomes.
    """
    counts = dict.fromkeys(OUTCOMES, 0) | collections.Counter(found)
    decided = [(pair, outcome) for pair, outcome in zip(pairs, found, strict=True)
               if outcome != "undecided"]  # fmt: skip
    different = [outcome for pair, outcome in decided if pair.a != pair.b]
    consistent = [outcome != "inconsistent" for outcome in different]
    lengths = [(_length(pair.a), _length(pair.b)) for pair in pairs]
    won = [
        (a > b) == (outcome == "a")
        for (a, b), outcome in zip(lengths, found, strict=True)
        if outcome in ("a", "b") and a != b
    ]
    total_b = sum(b for _, b in lengths)
    out = {
        **_rate(pairs, found),
        "counts": counts,
        "position_consistency": float(np.mean(consistent)) if consistent else None,
        "longer_wins": float(np.mean(won)) if won else None,
        "length_ratio": sum(a for a, _ in lengths) / total_b if total_b else None,
    }
    if pairs and all(pair.degenerate is not None for pair in pairs):
        out["guarded"] = _rate(pairs, guarded(pairs, found))
    return out


def _rate(pairs: Sequence[Pair], found: Sequence[str]) -> dict[str, Any]:
    scores: dict[tuple[int, str], list[float]] = {}
    for pair, outcome in zip(pairs, found, strict=True):
        if outcome != "undecided":
            key = pair.seed, records.content_id(pair.prompt)
            scores.setdefault(key, []).append(_SCORES[outcome])
    if not scores:
        return {"win_rate": None, "low": None, "high": None, "n": 0, "ties": None}
    seeds, prompts = (list(dict.fromkeys(names)) for names in zip(*scores, strict=True))
    cells = [[np.mean(scores.get((k, p), [np.nan])) for p in prompts] for k in seeds]
    rate = statistics.rate_of_means_over_seeds(np.array(cells))
    n = sum(outcome != "undecided" for outcome in found)
    return {
        "win_rate": rate.rate,
        "low": rate.low,
        "high": rate.high,
        "n": n,
        "ties": sum(outcome == "tie" for outcome in found) / n,
    }


def _length(text: records.Text) -> int:
    return len(judges.response_text(text))
