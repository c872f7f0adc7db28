import numpy as np
import pytest
from scipy import stats

from trace_jax.evaluate import statistics


def test_wilson_matches_scipy_and_the_textbook():
    assert statistics.wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    for successes, n in ((0, 20), (20, 20), (3, 7), (123, 400)):
        expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert statistics.wilson(successes, n) == pytest.approx(tuple(expected), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_what_is_no_rate(successes, n):
    with pytest.raises(ValueError, match="not a rate"):
        statistics.wilson(successes, n)


def test_rate_bootstraps_prompts():
    # Per-prompt rates 0, 1/2, 1, 1: of the 4^4 equally likely resamples 95 % have a mean in 1/4..1.
    result = statistics.rate(np.array([[0, 0], [0, 1], [1, 1], [1, 1]]))
    assert (result.rate, result.n) == (0.625, 4)
    assert (result.low, result.high) == (0.25, 1.0)


def test_samples_of_one_prompt_are_not_independent():
    column_P1 = np.arange(100)[:, None] % 2
    copied = statistics.rate(np.repeat(column_P1, 8, axis=1))
    single = statistics.rate(column_P1)
    assert copied.high - copied.low == pytest.approx(single.high - single.low, rel=0.06)


def test_rate_is_wilson_where_there_is_nothing_to_draw():
    for outcomes_PS in (np.ones((9, 4)), np.zeros((9, 4)), np.tile([0, 1], (9, 1))):
        result = statistics.rate(outcomes_PS)
        assert (result.low, result.high) == statistics.wilson(result.rate * 9, 9)
    one_sample = statistics.rate(np.array([[0], [1], [1]]))
    assert (one_sample.low, one_sample.high) == statistics.wilson(2, 3)


def test_rate_is_deterministic():
    outcomes_PS = np.random.default_rng(3).random((50, 4)) < 0.4
    assert statistics.rate(outcomes_PS) == statistics.rate(outcomes_PS.copy())


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(11)
    runs, hits = 400, 0
    for _ in range(runs):
        rate_P1 = rng.beta(1, 2, size=(80, 1))  # prompts differ: true rate 1/3
        result = statistics.rate(rng.random((80, 4)) < rate_P1)
        hits += result.low <= 1 / 3 <= result.high
    assert 0.92 <= hits / runs <= 0.98


def test_paired_intervals_cover_the_truth_and_use_the_pairing():
    rng = np.random.default_rng(12)
    runs, hits = 300, 0
    for _ in range(runs):
        rate_P1 = 0.6 * rng.random((80, 1))
        a_PS = rng.random((80, 4)) < rate_P1 + 0.2
        b_PS = rng.random((80, 2)) < rate_P1
        result = statistics.paired_difference(a_PS, b_PS)
        hits += result.low <= 0.2 <= result.high
    assert 0.92 <= hits / runs <= 0.98
    shifted_PS = np.repeat(rng.random((200, 1)) < 0.5, 4, axis=1)
    noisy_PS = shifted_PS.copy()
    noisy_PS[:4] = ~noisy_PS[:4]
    paired = statistics.paired_difference(shifted_PS, noisy_PS)
    assert (
        paired.high - paired.low
        < 0.1
        < statistics.rate(shifted_PS).high - statistics.rate(shifted_PS).low
    )


def test_paired_difference_golden():
    # Differences per prompt 1, 0, 0, -1/2; the extremes of 4 draws bound the interval.
    a_PS, b_PS = (
        np.array([[1, 1], [0, 1], [0, 0], [0, 1]]),
        np.array([[0, 0], [1, 0], [0, 0], [1, 1]]),
    )
    result = statistics.paired_difference(a_PS, b_PS)
    assert result.difference == 0.125
    assert (result.low, result.high) == (-0.375, 0.75)
    swapped = statistics.paired_difference(b_PS, a_PS)
    assert swapped.difference == -0.125


def test_paired_difference_without_variation_is_newcombes():
    # Both rates 1 with n = 10: Wilson's low is 0.7224672, so the difference is 0 +- 0.2775328.
    result = statistics.paired_difference(np.ones((10, 2)), np.ones((10, 3)))
    assert (result.low, result.high) == pytest.approx((-0.2775328, 0.2775328), abs=1e-6)


def test_newcombes_p_is_that_of_its_interval():
    assert statistics.newcombe_p(0.5, 0.5, 10) == pytest.approx(1)
    for a, b, n in ((0.9, 0.5, 20), (0.2, 0.35, 60)):
        low, high = statistics.newcombe(a, b, n)
        for margin in (low, high):
            assert statistics.newcombe_p(a, b, n, margin=margin) == pytest.approx(0.05)
    assert statistics.newcombe_p(1, 0, 10**6) < 1e-15
    assert statistics.newcombe_p(1, 0, 10**6, least=1e-3) == pytest.approx(1e-3)


def test_rate_over_seeds_holds_both_sources_of_chance():
    rng = np.random.default_rng(5)
    alike = [rng.random((200, 4)) < 0.5 for _ in range(3)]
    apart = [rng.random((200, 4)) < p for p in (0.2, 0.5, 0.8)]
    narrow, wide = statistics.rate_over_seeds(alike), statistics.rate_over_seeds(apart)
    assert narrow.rate == pytest.approx(np.mean(alike))
    assert narrow.n == 200
    assert wide.low < 0.3 < 0.7 < wide.high
    assert narrow.high - narrow.low < 0.1
    # Prompts alone: seeds that agree exactly leave the interval of one seed.
    one = statistics.rate(apart[1])
    same = statistics.rate_over_seeds([apart[1]] * 3)
    assert (same.low, same.high) == pytest.approx((one.low, one.high), abs=0.01)
    assert statistics.rate_over_seeds([apart[1]]) == one


def test_rate_over_seeds_covers_the_truth():
    rng = np.random.default_rng(6)
    runs, hits = 60, 0
    for _ in range(runs):
        prompt_P1 = rng.normal(size=(80, 1))
        seeds = [
            rng.random((80, 4)) < 1 / (1 + np.exp(-prompt_P1 - 0.2 * rng.normal()))
            for _ in range(4)
        ]
        result = statistics.rate_over_seeds(seeds)
        hits += result.low <= 0.5 <= result.high
    assert hits / runs >= 0.9


def test_rate_over_seeds_in_chunks_is_the_same_statistic(monkeypatch):
    seeds = [np.random.default_rng(k).random((60, 2)) < 0.3 for k in range(3)]
    whole = statistics.rate_over_seeds(seeds)
    monkeypatch.setattr(statistics, "_CHUNK_ELEMENTS", 60 * 999)
    parts = statistics.rate_over_seeds(seeds)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=0.01)


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        (np.zeros((0, 3)), "not empty"),
        (np.zeros(3), "prompts x samples"),
        (np.array([[0.0, np.nan]]), "undecided"),
        (np.array([[0.0, 0.5]]), "0 or 1"),
    ],
)
def test_malformed_outcomes(outcomes, message):
    with pytest.raises(ValueError, match=message):
        statistics.rate(outcomes)


def test_prompts_have_to_match():
    with pytest.raises(ValueError, match="same prompts: 3 against 2"):
        statistics.paired_difference(np.ones((3, 1)), np.ones((2, 1)))
    with pytest.raises(ValueError, match=r"same prompts; they have \[2, 3\]"):
        statistics.rate_over_seeds([np.ones((3, 1)), np.ones((2, 1))])
    with pytest.raises(ValueError, match="at least one seed"):
        statistics.rate_over_seeds([])


def test_effective_sample_size():
    assert statistics.effective_sample_size(np.full(7, 0.3)) == pytest.approx(7)
    assert statistics.effective_sample_size(np.array([1.0, 0, 0])) == 1
    assert statistics.effective_sample_size(np.array([1.0, 2.0])) == pytest.approx(9 / 5)
    assert statistics.effective_sample_size(np.zeros(3)) == 0


def test_ranks_are_those_of_scipy():
    rng = np.random.default_rng(0)
    for n in (1, 2, 50):
        x = rng.integers(0, 10, n).astype(float)
        assert statistics.ranks(x).tolist() == stats.rankdata(x).tolist()
    y, z = rng.normal(size=(2, 40)).round(1)
    assert statistics.spearman(y, z) == pytest.approx(stats.spearmanr(y, z).statistic)


def test_spearman():
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: correlation sqrt(0.9).
    assert statistics.spearman([1, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(0.9**0.5)
    assert statistics.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert np.isnan(statistics.spearman([1, 1, 1], [1, 2, 3]))
    assert np.isnan(statistics.spearman([1], [2]))
    assert np.isnan(statistics.spearman([1, 2, np.nan], [1, 2, 3]))


@pytest.mark.parametrize("n", [1, 7, 399, 400, 401, 1000])
def test_an_interval_holds_its_rate_also_at_the_ends(n):
    for successes in (0, n):
        low, high = statistics.wilson(successes, n)
        assert 0 <= low <= successes / n <= high <= 1
    found = statistics.rate_over_seeds([np.zeros((n, 1)), np.zeros((n, 1))])
    assert found.low == found.rate == 0.0
