import json

import numpy as np
import pytest

from trace_jax.evaluate import guard

BASE = [f"the cat number {i} sat on mat {i} and slept well" for i in range(101)]
LOGPROBS = [np.full(5, -2.0 - i / 100) for i in range(101)]  # means -2.00 .. -3.00


def test_repetition_golden():
    assert guard.repetition("a b c d") == 0
    # 3-grams of "a b a b a b": aba bab aba bab, 2 distinct of 4.
    assert guard.repetition("A b, a B a b!") == 0.5
    assert guard.repetition("two words") == 0
    assert guard.repetition("") == 0


def test_words_keep_their_apostrophes_and_scripts():
    # don't / won't / can't are three words, so there is one 3-gram.
    assert guard.Guard(3, -9.0, 0.0).passes("don't won't can't", -1.0)
    assert guard.Guard(3, -9.0, 0.0).passes("это три слова", -1.0)


def test_fit_takes_the_stated_percentiles():
    responses = [*BASE[:100], "go on " * 20]
    fitted = guard.fit(responses, LOGPROBS, min_words=4)
    assert fitted.min_words == 4
    assert fitted.min_mean_logprob == pytest.approx(-2.95)
    repetition_N = sorted(guard.repetition(response) for response in responses)
    assert repetition_N[-1] > 0.9
    assert fitted.max_repetition == pytest.approx(repetition_N[99])  # the 99th percentile of 101


def test_fit_weighs_samples_and_not_tokens():
    rows = [np.array([-1.0] * 50), np.array([-3.0])]
    assert guard.fit(["a b c", "d e f"], rows).min_mean_logprob == pytest.approx(-2.9)


def test_most_base_samples_pass():
    fitted = guard.fit(BASE, LOGPROBS)
    passed = [fitted.passes(r, float(np.mean(p))) for r, p in zip(BASE, LOGPROBS, strict=True)]
    assert sum(passed) == 96  # of 101: the 5th percentile itself passes


def test_reasons():
    fitted = guard.Guard(min_words=3, min_mean_logprob=-3.0, max_repetition=0.2)
    assert fitted.reasons("a fine little story", -2.0) == ()
    assert fitted.reasons("a fine little story", -3.0) == ()
    assert fitted.reasons("", -2.0) == ("too_short",)
    assert fitted.reasons("?! ...", -2.0) == ("too_short",)
    assert fitted.reasons("a fine little story", -3.1) == ("unlikely",)
    assert fitted.reasons("a fine little story", float("nan")) == ("unlikely",)
    assert fitted.reasons("help me help me help me help me", -2.0) == ("repetitive",)
    assert fitted.reasons("help me help me help me help me", -9.0) == ("unlikely", "repetitive")


def test_reason_counts():
    fitted = guard.Guard(min_words=3, min_mean_logprob=-3.0, max_repetition=0.2)
    counts = fitted.reason_counts(["", "one two three", "go on go on go on"], [-1.0, -1.0, -4.0])
    assert counts == {"passed": 1, "too_short": 1, "unlikely": 1, "repetitive": 1}


def test_json_round_trip():
    fitted = guard.fit(BASE, LOGPROBS)
    stored = json.loads(json.dumps(fitted.to_json()))
    assert guard.Guard.from_json(stored) == fitted
    assert (stored["logprob_percentile"], stored["repetition_percentile"]) == (5.0, 99.0)


@pytest.mark.parametrize("rows", [[], [np.array([])], [np.array([np.nan])], [np.array([-np.inf])]])
def test_fit_refuses_samples_without_likelihoods(rows):
    with pytest.raises(ValueError, match="finite log-probs"):
        guard.fit(["a b c"] * len(rows), rows)


def test_fit_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="2 responses but 1 rows"):
        guard.fit(["a", "b"], [np.zeros(1)])
