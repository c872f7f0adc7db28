"""Comparisons by hand: tests over seeds and prompts, the gap, statements, win rates, tables."""

import numpy as np
import pytest

from trace_jax import comparison, comparison_tables
from trace_jax.errors import InputError
from trace_jax.evaluate import paired


def bits(share: float, seeds: int = 3, prompts: int = 200, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng([seed, int(1000 * share)])
    return [(rng.random((prompts, 2)) < share).astype(float) for _ in range(seeds)]


def test_a_difference_of_nothing_is_no_difference():
    a = bits(0.4)
    found = paired.compare(a, a)
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert found.n == 200 and found.seeds == 3 and found.cohens_h == 0


def test_intervals_hold_and_p_agrees_with_them():
    found = paired.compare(bits(0.7), bits(0.4))
    assert found.low < found.difference < found.high and found.low > 0
    assert found.p == pytest.approx(2 / 10_001)
    near = paired.compare(bits(0.41), bits(0.4, seed=1))
    assert near.low < 0 < near.high and near.p > 0.05
    assert paired.compare(bits(0.4), bits(0.7)).difference == -found.difference


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Seeds differ with sd 0.05 around 0.5; ten of them and 100 prompts; nominal 95 %."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(60):
        rates = np.clip(rng.normal(0.5, 0.05, (2, 10)), 0, 1)
        a, b = ([(rng.random((100, 2)) < r).astype(float) for r in of] for of in rates)
        found = paired.compare(a, b)
        inside += found.low <= 0 <= found.high
    assert inside >= 53  # 95 % of 60 is 57; fewer than 53 has probability 2 %


def test_cohens_h_by_hand():
    assert paired.cohens_h(1, 0) == pytest.approx(np.pi)
    assert paired.cohens_h(0.5, 0.25) == pytest.approx(np.pi / 2 - np.pi / 3)


def test_holm_by_hand():
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([0.5, 0.9]) == [1.0, 1.0]
    assert paired.holm([]) == []


def test_the_gap_closed_by_hand():
    lower, method, upper = ([np.array([[0.0]] * (10 - n) + [[1.0]] * n)] * 2 for n in (1, 5, 9))
    found = paired.gap_closed(method, lower, upper)
    assert found["rate"] == pytest.approx(0.5) and found["low"] < 0.5 < found["high"]
    assert paired.gap_closed(method, upper, lower)["rate"] is None
    assert paired.gap_closed(upper, lower, upper)["rate"] == 1


def rows(guarded: float, seed: int) -> list[dict]:
    """60 prompts x 2 samples and a greedy one; the first `guarded` of the prompts comply."""
    rng = np.random.default_rng(seed)
    made = []
    for p in range(60):
        for s in range(2):
            ok = bool(p < 60 * guarded) ^ bool(rng.random() < 0.05)
            made.append(_row(p, s, ok, "sample"))
        made.append(_row(p, 0, p < 60 * guarded, "greedy"))
    return made


def _row(p: int, s: int, ok: bool, mode: str) -> dict:
    return {
        "id": f"p{p}", "prompt": f"prompt {p}", "response": "yes" if ok else "no", "sample": s,
        "mode": mode, "guarded": ok, "compliant": ok, "retained": True, "old_compliant": not ok,
    }  # fmt: skip


class Judge:
    """Prefers "yes"."""

    def compare(self, pairs):
        order = {("yes", "no"): "a", ("no", "yes"): "b"}
        return [order.get((a, b), "tie") for _, a, b in pairs]


SHARES = {"trace": 0.7, "u2a": 0.1, "npo": 0.3, "dpo_gold": 0.9, "trace_no_kl": 0.7}
PERPLEXITY = {"trace": 2.0, "u2a": 9.0, "npo": 8.0, "dpo_gold": 2.1, "trace_no_kl": 3.0}


@pytest.fixture(scope="module")
def found() -> dict:
    runs = {name: [rows(share, seed) for seed in range(3)] for name, share in SHARES.items()}
    perplexity = {n: [p * (1 + 0.01 * s) for s in range(3)] for n, p in PERPLEXITY.items()}
    perplexity["trace_no_kl"][0] += 0.01
    chosen = {"trace": [[1] * 60] * 3, "trace_no_kl": [[1] * 30 + [0] * 30] * 3}
    made = comparison.summary(runs, perplexity, Judge(), chosen)
    return made | {"seeds": [0, 1, 2], "split": "test"}


def test_statements_are_answered(found):
    answers = {(r["claim"], r["figure"]): r["answer"] for r in found["statements"]}
    assert answers["trace above u2a", "compliance_guarded"] == "yes"
    assert answers["dpo_gold above trace", "compliance"] == "yes"
    assert answers["no KL loses utility", "perplexity"] == "yes"
    assert answers["no KL loses utility", "choice_accuracy"] == "yes"
    assert ("no triage loses compliance", "compliance") not in answers


def test_a_claim_that_is_the_other_way_round_is_answered_no():
    runs = {"trace": [rows(0.9, s) for s in range(3)], "dpo_gold": [rows(0.2, s) for s in range(3)]}
    made = comparison.summary(runs, {"trace": [2.0], "dpo_gold": [2.0]})
    assert {r["answer"] for r in made["statements"]} == {"no"}
    same = {name: runs["trace"] for name in runs}
    made = comparison.summary(same, {"trace": [2.0], "dpo_gold": [2.0]})
    assert {r["answer"] for r in made["statements"]} <= {"no", "cannot tell"}


def test_one_seed_tells_nothing_of_perplexity():
    runs = {name: [rows(0.5, 0)] for name in ("trace", "trace_no_kl")}
    made = comparison.summary(runs, {"trace": [2.0], "trace_no_kl": [4.0]})
    (row,) = [r for r in made["statements"] if r["figure"] == "perplexity"]
    assert row["answer"] == "cannot tell" and row["low"] is None
    assert "+0.69 | cannot tell" in comparison_tables.markdown(
        made | {"seeds": [0], "split": "test"}
    )


def test_win_rates_are_against_u2a(found):
    methods = found["methods"]
    assert "win_rate_vs_u2a" not in methods["u2a"]
    assert methods["trace"]["win_rate_vs_u2a"]["rate"] == pytest.approx(0.5 + 0.5 * 0.6, abs=0.06)
    assert methods["trace"]["win_rate_vs_u2a"]["position_consistency"] == 1


def test_the_gap_of_the_first_method(found):
    gap = found["gap_closed"]
    assert gap["method"] == "trace" and gap["rate"] == pytest.approx(0.75, abs=0.06)
    assert gap["low"] < gap["rate"] < gap["high"] and "caveat" not in gap


def test_tests_are_corrected_within_a_figure(found):
    for figure in comparison.TESTED:
        of = [t for t in found["tests"] if t["figure"] == figure]
        assert [t["b"] for t in of] == ["u2a", "npo", "dpo_gold", "trace_no_kl"]
        assert [t["p_holm"] for t in of] == paired.holm([t["p"] for t in of])


def test_tables_have_a_line_a_method(found):
    text, tex = comparison_tables.markdown(found), comparison_tables.latex(found)
    for name in SHARES:
        assert f"| {name} | " in text and name.replace("_", r"\_") + " & " in tex
    assert "win rate against u2a" in text and "Share of the gap from u2a to dpo_gold" in text
    assert tex.count(r"\\") == len(SHARES) + 1


def test_other_prompts_are_refused():
    other = [r | {"id": "x" + r["id"]} for r in rows(0.5, 0)]
    with pytest.raises(InputError, match="b was evaluated on other prompts"):
        comparison.summary({"a": [rows(0.5, 0)], "b": [other]}, {"a": [1.0], "b": [1.0]})
