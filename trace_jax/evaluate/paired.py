"""Methods against each other on the same prompts: differences, tests, effect sizes, gaps.

Legend: K seeds, P prompts, R resamples. Every resample draws seeds and, independently, prompts, as
`statistics.rate_over_seeds` does; a method's seed k is paired with another's seed k. Where all
resamples give one difference, Newcombe's interval on the number of prompts takes their place.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from trace_jax.evaluate import statistics


@dataclasses.dataclass(frozen=True, slots=True)
class Paired:
    """rate(a) - rate(b) over prompts and seeds.

    Attributes:
      difference, low, high: in -1..1, with the 95 % interval.
      p: two-sided, of the difference being `margin`, from the same resamples, or as that interval
        allows; at least 2 / (resamples + 1).
      cohens_h: of the two rates (0.2 small, 0.5 medium, 0.8 large).
      n, seeds: prompts, and pairs of runs.
    """

    difference: float
    low: float
    high: float
    p: float
    cohens_h: float
    n: int
    seeds: int


def compare(a: Sequence[np.ndarray], b: Sequence[np.ndarray], *, margin: float = 0.0) -> Paired:
    """From outcomes [prompts, samples] 0/1 of each seed, in the order of the same prompts."""
    difference_KP = _means(a) - _means(b)
    rate_a, rate_b = float(_means(a).mean()), float(_means(b).mean())
    K, P = difference_KP.shape
    found = _resampled_means(difference_KP)
    least = 2 / (len(found) + 1)
    if statistics.all_equal(found):
        low, high = statistics.newcombe(rate_a, rate_b, P)
        p = statistics.newcombe_p(rate_a, rate_b, P, margin=margin, least=least)
    else:
        low, high = (float(x) for x in np.percentile(found, (2.5, 97.5)))
        beyond = min((found <= margin).sum(), (found >= margin).sum())
        p = float(min(1.0, 2 * (beyond + 1) / (len(found) + 1)))
    mean, h = float(difference_KP.mean()), cohens_h(rate_a, rate_b)
    return Paired(mean, max(-1.0, low), min(1.0, high), p, h, n=P, seeds=K)


def cohens_h(a: float, b: float) -> float:
    """2 asin sqrt(a) - 2 asin sqrt(b) (Cohen 1988)."""
    return float(2 * np.arcsin(np.sqrt(a)) - 2 * np.arcsin(np.sqrt(b)))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction of a family of p-values, in their order."""
    order = np.argsort(p, kind="stable")
    found, worst = np.zeros(len(p)), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        found[i] = worst
    return [float(x) for x in found]


def gap_closed(
    method: Sequence[np.ndarray], lower: Sequence[np.ndarray], upper: Sequence[np.ndarray]
) -> dict[str, float | None]:
    """(method - lower) / (upper - lower) of the rates: {"rate", "low", "high"}.

    All None where upper is not above lower by its own 95 % interval: there is no gap to close.
    """
    parts = [_means(of) for of in (method, lower, upper)]
    gap_KP, closed_KP = parts[2] - parts[1], parts[0] - parts[1]
    rng = np.random.default_rng(statistics.SEED)
    gap, closed = _resampled_means(np.stack([gap_KP, closed_KP]), rng)
    if np.percentile(gap, 2.5) <= 0:
        return {"rate": None, "low": None, "high": None}
    low, high = np.percentile(closed / gap, (2.5, 97.5))
    rate = closed_KP.mean() / gap_KP.mean()
    return {"rate": float(rate), "low": float(low), "high": float(high)}


def _means(outcomes: Sequence[np.ndarray]) -> np.ndarray:
    """Mean outcome by seed and prompt, [K, P]."""
    means = [np.asarray(o, np.float64).mean(axis=1) for o in outcomes]
    if len({len(m) for m in means}) != 1:
        raise ValueError("the seeds need the same prompts, and at least one")
    return np.stack(means)


def _resampled_means(value_KP: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """Means of values [..., K, P] over R resamples of seeds and prompts, [..., R].

    Deviations of seeds are widened by sqrt(K / (K - 1)), so that their variance is not too small.
    """
    rng = rng or np.random.default_rng(statistics.SEED)
    *_, K, P = value_KP.shape
    if K > 1:
        seed_means = value_KP.mean(axis=-1, keepdims=True)
        mean = seed_means.mean(axis=-2, keepdims=True)
        value_KP = value_KP + (np.sqrt(K / (K - 1)) - 1) * (seed_means - mean)
    draws = []
    for size in statistics.chunks(statistics.RESAMPLES, P):
        seeds_RK = rng.multinomial(K, np.full(K, 1 / K), size=size) / K
        prompts_RP = rng.multinomial(P, np.full(P, 1 / P), size=size) / P
        draws.append(np.einsum("rk,...kp,rp->...r", seeds_RK, value_KP, prompts_RP, optimize=True))
    return np.concatenate(draws, axis=-1)
