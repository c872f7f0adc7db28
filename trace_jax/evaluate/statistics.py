"""Rates and their 95 % intervals.

Legend: P prompts, S samples of one prompt, K seeds, N items. Outcomes are 0 or 1.

Samples of one prompt resemble each other, so every bootstrap here draws whole prompts. Where it has
nothing to draw from (every prompt has the same rate, or there is one sample a prompt) Wilson's
interval on the number of prompts takes its place.
"""

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
SEED = 20251102
_Z = statistics.NormalDist().inv_cdf(0.975)
_PERCENTILES = (2.5, 97.5)
_CHUNK_ELEMENTS = 2**22  # prompt counts kept in memory at once


@dataclasses.dataclass(frozen=True, slots=True)
class Rate:
    """A rate in 0..1 with its 95 % interval; n is the number of prompts."""

    rate: float
    low: float
    high: float
    n: int


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """rate(a) - rate(b) in -1..1 with its 95 % interval; n is the number of prompts."""

    difference: float
    low: float
    high: float
    n: int


def rate(outcomes_PS: np.ndarray) -> Rate:
    """The mean outcome; the interval is a bootstrap over prompts, or Wilson's (see above)."""
    outcomes_PS = _checked(outcomes_PS)
    mean_P = outcomes_PS.mean(axis=1)
    P, S = outcomes_PS.shape
    mean = float(mean_P.mean())
    if S == 1 or all_equal(mean_P):
        return Rate(mean, *wilson(mean * P, P), n=P)
    return Rate(mean, *_bootstrap_mean(mean_P), n=P)


def rate_of_means(mean_P: np.ndarray) -> Rate:
    """The mean of one value in 0..1 a prompt; its interval as `rate` has it."""
    mean_P = np.asarray(mean_P, np.float64)
    if mean_P.ndim != 1 or not mean_P.size or not ((mean_P >= 0) & (mean_P <= 1)).all():
        raise ValueError("needs one value in 0..1 a prompt, and at least one prompt")
    mean, P = float(mean_P.mean()), len(mean_P)
    interval = wilson(mean * P, P) if all_equal(mean_P) else _bootstrap_mean(mean_P)
    return Rate(mean, *interval, n=P)


def wilson(successes: float, n: int, z: float = _Z) -> tuple[float, float]:
    """Wilson's score interval for successes out of n, at 95 %, or of z standard deviations."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes out of {n} is not a rate")
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # At the ends rounding would leave the share itself outside by 1e-18.
    return float(min(share, max(0.0, centre - half))), float(max(share, min(1.0, centre + half)))


def newcombe(a: float, b: float, n: int, z: float = _Z) -> tuple[float, float]:
    """Interval of a - b, two rates of n each, at 95 %, or of z standard deviations.

    From the two Wilson intervals (Newcombe, Statistics in Medicine 17, 1998, method 10), which
    supposes independence and so is wide for pairs.
    """
    (a_low, a_high), (b_low, b_high) = wilson(a * n, n, z), wilson(b * n, n, z)
    low = a - b - float(np.hypot(a - a_low, b_high - b))
    high = a - b + float(np.hypot(a_high - a, b - b_low))
    return max(-1.0, low), min(1.0, high)


def newcombe_p(a: float, b: float, n: int, *, margin: float = 0.0, least: float = 0.0) -> float:
    """Two-sided p of a - b being `margin`, not below `least`.

    The largest p whose interval of level 1 - p, `newcombe`'s, still holds the margin: below 0.05
    exactly where the 95 % interval does not.
    """
    held, beyond = least, 1.0
    for _ in range(60):
        p = (held + beyond) / 2
        low, high = newcombe(a, b, n, -statistics.NormalDist().inv_cdf(p / 2))
        held, beyond = (p, beyond) if low <= margin <= high else (held, p)
    return beyond


def paired_difference(a_PS: np.ndarray, b_PS: np.ndarray) -> Difference:
    """rate(a) - rate(b) on the same prompts; the numbers of samples may differ.

    A bootstrap of the difference per prompt; `newcombe` where that is the same for every prompt.
    """
    a_PS, b_PS = _checked(a_PS), _checked(b_PS)
    P = len(a_PS)
    if len(b_PS) != P:
        raise ValueError(f"paired outcomes need the same prompts: {P} against {len(b_PS)}")
    difference_P = a_PS.mean(axis=1) - b_PS.mean(axis=1)
    difference = float(difference_P.mean())
    if all_equal(difference_P):
        return Difference(difference, *newcombe(float(a_PS.mean()), float(b_PS.mean()), P), n=P)
    return Difference(difference, *_bootstrap_mean(difference_P), n=P)


def rate_over_seeds(outcomes: Sequence[np.ndarray]) -> Rate:
    """The mean rate of K runs on the same prompts, with both sources of chance in its interval.

    One seed: `rate`; several: `rate_of_means_over_seeds`.
    """
    if not outcomes:
        raise ValueError("rate_over_seeds needs the outcomes of at least one seed")
    if len(outcomes) == 1:
        return rate(outcomes[0])
    return rate_of_means_over_seeds(_stack_seeds(outcomes))


def rate_of_means_over_seeds(mean_KP: np.ndarray) -> Rate:
    """The mean of one value in 0..1 a seed and prompt; NaN where nothing is known.

    Each resample draws seeds and, independently, prompts (the same draw for all seeds, since they
    share the test set). Deviations of seeds are widened by sqrt(K / (K - 1)), which makes their
    bootstrap variance unbiased; with 2 or 3 seeds the interval is still too narrow where seeds
    differ much, so show the seeds beside it. One seed: `rate_of_means`.
    """
    mean_KP = np.asarray(mean_KP, np.float64)
    known = mean_KP[~np.isnan(mean_KP)]
    if mean_KP.ndim != 2 or not known.size or not ((known >= 0) & (known <= 1)).all():
        raise ValueError("needs one value in 0..1 a seed and prompt, and at least one")
    mean_KP = mean_KP[~np.isnan(mean_KP).all(axis=1)][:, ~np.isnan(mean_KP).all(axis=0)]
    K, P = mean_KP.shape
    if K == 1:
        return rate_of_means(mean_KP[0])
    mean = float(known.mean())
    if all_equal(known):
        return Rate(mean, *wilson(mean * P, P), n=P)
    seed_K1 = np.nanmean(mean_KP, axis=1, keepdims=True)
    widened_KP = mean_KP + (np.sqrt(K / (K - 1)) - 1) * (seed_K1 - mean)
    value_KP, known_KP = np.nan_to_num(widened_KP), (~np.isnan(mean_KP)).astype(np.float64)
    rng = np.random.default_rng(SEED)
    draws = []
    for size in chunks(RESAMPLES, P):
        seeds_RK = rng.multinomial(K, np.full(K, 1 / K), size=size) / K
        prompts_RP = rng.multinomial(P, np.full(P, 1 / P), size=size) / P
        count_R = ((seeds_RK @ known_KP) * prompts_RP).sum(axis=1)
        total_R = ((seeds_RK @ value_KP) * prompts_RP).sum(axis=1)
        draws.append(total_R[count_R > 0] / count_R[count_R > 0])
    low, high = np.clip(np.percentile(np.concatenate(draws), _PERCENTILES), 0.0, 1.0)
    return Rate(mean, float(low), float(high), n=P)


def effective_sample_size(weight_N: np.ndarray) -> float:
    """(sum w)^2 / sum w^2: as many equal weights carry as much (Kish); 0 where all are 0."""
    weight_N = np.asarray(weight_N, np.float64)
    squares = float(np.square(weight_N).sum())
    return float(weight_N.sum()) ** 2 / squares if squares else 0.0


def spearman(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Rank correlation with averaged ties; NaN for a constant side, a NaN, or fewer than 2."""
    a_N, b_N = np.asarray(a_N, np.float64), np.asarray(b_N, np.float64)
    if len(a_N) < 2 or all_equal(a_N) or all_equal(b_N) or np.isnan([a_N, b_N]).any():
        return float("nan")
    return float(np.corrcoef(ranks(a_N), ranks(b_N))[0, 1])


def ranks(x_N: np.ndarray) -> np.ndarray:
    """1 for the least and so on, ties their mean; scipy.stats, which has it, imports for 1.4 s."""
    _, inverse_N, counts = np.unique(x_N, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse_N]


def _checked(outcomes_PS: np.ndarray) -> np.ndarray:
    outcomes_PS = np.asarray(outcomes_PS, np.float64)
    if outcomes_PS.ndim != 2 or 0 in outcomes_PS.shape:
        raise ValueError(
            f"outcomes are prompts x samples, not empty; got shape {outcomes_PS.shape}"
        )
    if not np.isin(outcomes_PS, (0.0, 1.0)).all():
        raise ValueError("outcomes are 0 or 1; count an undecided verdict as 0 before")
    return outcomes_PS


def all_equal(values: np.ndarray) -> bool:
    """Whether nothing varies, but for rounding."""
    return bool(np.ptp(values) < 1e-12)


def _bootstrap_mean(value_P: np.ndarray) -> tuple[float, float]:
    """Percentile interval of the mean: a resample is a multinomial over the distinct values."""
    distinct, count = np.unique(value_P.round(12), return_counts=True)
    rng = np.random.default_rng(SEED)
    P = len(value_P)
    draws = [
        rng.multinomial(P, count / P, size=size) @ distinct / P
        for size in chunks(RESAMPLES, len(distinct))
    ]
    low, high = np.percentile(np.concatenate(draws), _PERCENTILES)
    return float(low), float(high)


def _stack_seeds(outcomes: Sequence[np.ndarray]) -> np.ndarray:
    checked = [_checked(outcomes_PS) for outcomes_PS in outcomes]
    sizes = sorted({len(outcomes_PS) for outcomes_PS in checked})
    if len(sizes) > 1:
        raise ValueError(f"the seeds need the same prompts; they have {sizes} of them")
    return np.stack([outcomes_PS.mean(axis=1) for outcomes_PS in checked])


def chunks(total: int, row_elements: int) -> list[int]:
    """Splits `total` resamples so that the counts of one chunk stay small."""
    size = max(1, min(total, _CHUNK_ELEMENTS // row_elements))
    return [size] * (total // size) + ([total % size] if total % size else [])
