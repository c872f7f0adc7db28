"""Krippendorff's alpha: agreement of raters beyond chance, with ratings missing.

Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability".
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

LEVELS = ("nominal", "ordinal", "interval")


def krippendorff_alpha(
    ratings: Sequence[Sequence[Any]], level: str = "nominal", order: Sequence[Any] | None = None
) -> float | None:
    """1 - observed / expected disagreement: 1 perfect, 0 as by chance, below 0 systematic.

    Args:
      ratings: raters x units, NaN or None where a rating is missing. Units with fewer than two
        ratings count nowhere.
      level: nominal (equal or not), ordinal (by rank), interval (by squared difference of numbers).
      order: the values from lowest to highest, for ordinal; None: as they sort.

    Returns:
      None where it is not defined: nothing to pair, or all ratings are one value.

    Raises:
      ValueError: ratings that are no table, an unknown level, or a rating that is not in `order`.
    """
    if level not in LEVELS:
        raise ValueError(f"level={level!r} is unknown; use one of {', '.join(LEVELS)}")
    units = [unit for unit in _by_unit(ratings) if len(unit) >= 2]
    found = {value for unit in units for value in unit}
    values = list(order) if order is not None else sorted(found)
    if missing := found - set(values):
        raise ValueError(f"ratings {sorted(missing, key=str)} are not in order={values}")
    observed = _coincidences(units, values)
    totals = observed.sum(axis=1)
    n = totals.sum()
    if np.count_nonzero(totals) < 2:
        return None
    distances = _DISTANCES[level](values, totals)
    expected = (np.outer(totals, totals) - np.diag(totals)) / (n - 1)
    return float(1 - (observed * distances).sum() / (expected * distances).sum())


def _by_unit(ratings: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """The ratings that each unit has."""
    table = np.array(ratings, dtype=object)
    if table.size and table.ndim != 2:
        raise ValueError(
            "ratings are raters x units: one row a rater, all of one length, with NaN or None "
            "where a rating is missing"
        )
    # NaN alone is not equal to itself.
    return [[value for value in unit if value is not None and value == value] for unit in table.T]


def _coincidences(units: Sequence[Sequence[Any]], values: Sequence[Any]) -> np.ndarray:
    """How often each pair of values meets in a unit, each unit weighing as its ratings."""
    index = {value: i for i, value in enumerate(values)}
    matrix = np.zeros((len(values), len(values)))
    for unit in units:
        counts = np.bincount([index[value] for value in unit], minlength=len(values))
        matrix += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    return matrix


def _nominal(values: Sequence[Any], totals: np.ndarray) -> np.ndarray:
    return 1 - np.eye(len(values))


def _ordinal(values: Sequence[Any], totals: np.ndarray) -> np.ndarray:
    """Squared number of ratings from the one value to the other, the ends counting half."""
    middle = np.cumsum(totals) - totals / 2
    return np.subtract.outer(middle, middle) ** 2


def _interval(values: Sequence[Any], totals: np.ndarray) -> np.ndarray:
    numbers = np.array(values, float)
    return np.subtract.outer(numbers, numbers) ** 2


_DISTANCES: dict[str, Callable[[Sequence[Any], np.ndarray], np.ndarray]] = {
    "nominal": _nominal,
    "ordinal": _ordinal,
    "interval": _interval,
}
