import itertools

import numpy as np
import pytest

from trace_jax.evaluate import agreement

# The example of Krippendorff (2011), section C and D: 4 observers, 12 units, missing data.
A = [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None]
B = [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3]
C = [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None]
D = [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None]
RATERS = [A, B, C, D]


@pytest.mark.parametrize("ratings", [RATERS, np.array(RATERS, np.float64)], ids=["None", "NaN"])
@pytest.mark.parametrize(
    ("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_the_published_example(ratings, level, alpha):
    assert agreement.krippendorff_alpha(ratings, level) == pytest.approx(alpha, abs=5e-4)


def test_two_raters_by_hand():
    # Values a, b; pairs aa, ab, bb, bb: o_ab = 1 of n = 8; e_ab = 3 * 5 / 7.
    raters = ["a", "a", "b", "b"], ["a", "b", "b", "b"]
    assert agreement.krippendorff_alpha(raters) == pytest.approx(1 - 1 / (3 * 5 / 7))


def by_pairs(units, distance):
    """The definition, as sums over pairs of ratings."""
    units = [[v for v in unit if v is not None] for unit in units]
    units = [unit for unit in units if len(unit) > 1]
    every = list(itertools.chain.from_iterable(units))
    within = sum(
        sum(distance(x, y) for x, y in itertools.permutations(u, 2)) / (len(u) - 1) for u in units
    )
    between = sum(distance(x, y) for x, y in itertools.permutations(every, 2)) / (len(every) - 1)
    return 1 - within / between


@pytest.mark.parametrize("seed", range(5))
def test_it_is_its_definition(seed):
    rng = np.random.default_rng(seed)
    units = [
        [None if rng.random() < 0.3 else int(rng.integers(0, 4)) for _ in range(3)]
        for _ in range(30)
    ]
    nominal = by_pairs(units, lambda x, y: float(x != y))
    raters = list(zip(*units, strict=True))
    assert agreement.krippendorff_alpha(raters) == pytest.approx(nominal)
    interval = by_pairs(units, lambda x, y: (x - y) ** 2)
    assert agreement.krippendorff_alpha(raters, "interval") == pytest.approx(interval)


def test_perfect_systematic_and_undefined():
    assert agreement.krippendorff_alpha([(0, 1), (0, 1)]) == 1
    assert agreement.krippendorff_alpha([(0, 1), (1, 0)]) < 0
    assert agreement.krippendorff_alpha([(1, 1), (1, 1)]) is None
    assert agreement.krippendorff_alpha([(1, None), (None, 0)]) is None
    assert agreement.krippendorff_alpha([]) is None
    assert agreement.krippendorff_alpha([[], []]) is None
    assert agreement.krippendorff_alpha([[np.nan] * 3, [1.0, 2.0, 1.0]]) is None


@pytest.mark.parametrize(
    "ratings",
    [[1, 2, 3], np.zeros(4), np.zeros((2, 3, 2)), [[1, 2], [1]], [[1, 2], []], ["ab", "cd"], 3],
    ids=["numbers", "1-D", "3-D", "ragged", "one empty", "texts", "a number"],
)
def test_ratings_that_are_no_table_are_told(ratings):
    with pytest.raises(ValueError, match="ratings are raters x units: one row a rater"):
        agreement.krippendorff_alpha(ratings)


def test_an_order_may_be_given():
    raters = [("low", "high", "mid", "mid"), ("high", "high", "low", "mid")]
    numbers = [[{"low": 0, "mid": 1, "high": 2}[v] for v in rater] for rater in raters]
    named = agreement.krippendorff_alpha(raters, "ordinal", ["low", "mid", "high"])
    assert named == agreement.krippendorff_alpha(numbers, "ordinal")
    with pytest.raises(ValueError, match=r"\['high', 'mid'\] are not in order"):
        agreement.krippendorff_alpha(raters, "ordinal", ["low"])
    with pytest.raises(ValueError, match="level='ratio' is unknown"):
        agreement.krippendorff_alpha(raters, "ratio")
