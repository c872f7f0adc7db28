"""Comparisons by hand: tests over seeds and prompts, the gap, statements, win rates, tables."""

import copy

import numpy as np
import pytest

from trace_jax import comparison, comparison_tables
from trace_jax.errors import InputError
from trace_jax.evaluate import paired, statistics


def bits(share: float, seeds: int = 3, prompts: int = 200, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng([seed, int(1000 * share)])
    return [(rng.random((prompts, 2)) < share).astype(float) for _ in range(seeds)]


def test_a_difference_of_nothing_is_no_difference():
    a = bits(0.4)
    found = paired.compare(a, a)
    assert (found.difference, found.p) == (0, 1)
    assert found.n == 200 and found.seeds == 3 and found.cohens_h == 0


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(("rate_a", "rate_b"), [(1, 0), (1, 1), (0, 1)])
def test_where_nothing_varies_the_interval_is_newcombes(rate_a, rate_b, seeds):
    """As `statistics.paired_difference` of the same prompts has it: never of no width."""
    a_PS, b_PS = np.full((3, 2), rate_a), np.full((3, 2), rate_b)
    found = paired.compare([a_PS] * seeds, [b_PS] * seeds)
    expected = statistics.paired_difference(a_PS, b_PS)
    assert (found.difference, found.low, found.high) == pytest.approx(
        (expected.difference, expected.low, expected.high)
    )
    # Wilson's of 3 of 3 begins at 3 / (3 + z^2): 1 - 0 has 1 - sqrt(2) z^2 / (3 + z^2) = 0.206
    # below it, and reaches 0 at z^2 = 3 / (sqrt(2) - 1), whose p is 0.0071.
    assert found.p == pytest.approx(1.0 if rate_a == rate_b else 0.00712, abs=1e-5)
    if (rate_a, rate_b) == (1, 0):
        assert (found.low, found.high) == (pytest.approx(0.206, abs=5e-4), 1)


@pytest.mark.parametrize("n", [1, 2, 3, 20, 200])
@pytest.mark.parametrize("margin", [-0.1, 0.0, 0.05, 0.3])
def test_where_nothing_varies_p_agrees_with_the_interval(n, margin):
    for rate_a, rate_b in ((1, 0), (1, 1), (0, 0)):
        outcomes = [[np.full((n, 1), float(rate))] * 2 for rate in (rate_a, rate_b)]
        found = paired.compare(*outcomes, margin=margin)
        assert found.low < found.high
        assert (found.p < 0.05) == (not found.low <= margin <= found.high)
        assert 2 / 10_001 <= found.p <= 1


def test_what_varies_is_as_it_was():
    """Of the resamples alone, also where they hardly differ: one prompt of 40."""
    a, b = [np.zeros((40, 1))] * 2, [np.zeros((40, 1))] * 2
    a[1] = np.eye(40)[:, :1]
    found = paired.compare(a, b)
    assert (found.difference, found.p) == (0.0125, pytest.approx(8604 / 10_001, abs=1e-12))
    assert (found.low, found.high) == pytest.approx((-0.00517766952966, 0.05517766952966))


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


def rows(guarded: float, seed: int, flips: float = 0.05) -> list[dict]:
    """60 prompts x 2 samples and a greedy one; the first `guarded` of the prompts comply."""
    rng = np.random.default_rng(seed)
    made = []
    for p in range(60):
        for s in range(2):
            ok = bool(p < 60 * guarded) ^ bool(rng.random() < flips)
            made.append(_row(p, s, ok, "sample"))
        made.append(_row(p, 0, p < 60 * guarded, "greedy"))
    return made


def _row(p: int, s: int, ok: bool, mode: str) -> dict:
    return {
        "id": f"p{p}", "prompt": f"prompt {p}", "response": "yes" if ok else "no", "sample": s,
        "mode": mode, "guarded": ok, "compliant": ok, "retained": True, "retained_guarded": True,
        "old_compliant": not ok, "degenerate": False,
    }  # fmt: skip


def _wreck(of_seeds: list[list[dict]]) -> list[list[dict]]:
    """As they say yes and nothing else."""
    wrecked = {"response": "yes", "compliant": True, "degenerate": True, "guarded": False,
               "retained_guarded": False}  # fmt: skip
    return [[row | wrecked for row in rows] for rows in of_seeds]


class Judge:
    """Prefers "yes"."""

    def compare(self, pairs):
        order = {("yes", "no"): "a", ("no", "yes"): "b"}
        return [order.get((a, b), "tie") for _, a, b in pairs]


WON = "win_rate_vs_u2a"
MODES = ("sample", "sample", "greedy")
SHARES = {"trace": 0.7, "u2a": 0.1, "npo": 0.3, "dpo_gold": 0.9, "trace_no_kl": 0.7}
PERPLEXITY = {"trace": 2.0, "u2a": 9.0, "npo": 8.0, "dpo_gold": 2.1, "trace_no_kl": 3.0}


@pytest.fixture(scope="module")
def found() -> dict:
    runs = {name: [rows(share, seed) for seed in range(3)] for name, share in SHARES.items()}
    perplexity = {n: [p * (1 + 0.01 * s) for s in range(3)] for n, p in PERPLEXITY.items()}
    perplexity["trace_no_kl"][0] += 0.01
    chosen = {"trace": [[1] * 60] * 3, "trace_no_kl": [[1] * 30 + [0] * 30] * 3}
    runs["wreck"], perplexity["wreck"] = _wreck(runs["u2a"]), [1e4] * 3
    never = [_row(p, s, False, m) for p in range(60) for s, m in enumerate(MODES)]
    before = {"base": [rows(0.3, 9)], "ref": [never]}
    made = comparison.summary(runs, perplexity, chosen, ref=before["ref"][0])
    made |= {m: comparison.figures(of) | {"perplexity": 1.5} for m, of in before.items()}
    for name, rate in comparison.win_rates(Judge(), before | runs).items():
        (made if name in before else made["methods"])[name]["win_rate_vs_u2a"] = rate
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
    assert {r["answer"] for r in made["statements"]} == {"cannot tell"}


@pytest.mark.parametrize(
    ("low", "high", "margin", "p", "answer"),
    [
        (0.1, 0.3, 0.0, 0.01, "yes"),
        (0.1, 0.3, 0.0, 0.06, "cannot tell"),
        (-0.3, -0.1, 0.0, 0.01, "no"),
        (-0.3, -0.1, 0.0, 0.06, "cannot tell"),  # the correction holds for both answers
        (-0.1, 0.1, 0.0, 0.01, "cannot tell"),
        (0.01, 0.05, 0.1, 0.01, "no"),
        (0.01, 0.05, 0.1, 0.06, "cannot tell"),
        (0.2, 0.3, 0.1, 0.06, "cannot tell"),
        (None, None, 0.0, 0.01, "cannot tell"),
    ],
)
def test_both_answers_need_the_corrected_p(low, high, margin, p, answer):
    row = {"low": low, "high": high, "margin": margin, "p_holm": p}
    assert comparison._answer(row) == answer


def test_p_is_of_the_margin():
    a, b = bits(0.55), bits(0.4, seed=1)
    assert paired.compare(a, b).p < 0.01 < paired.compare(a, b, margin=0.15).p
    assert paired.compare(a, b, margin=0.4).p < 0.01


def test_dpo_gold_at_equal_beta():
    """At its own beta far above trace, at trace's not."""
    shares = {"trace": 0.7, "dpo_gold": 0.9, "dpo_gold@beta": 0.4, "trace@beta": 0.5}
    runs = {name: [rows(share, s) for s in range(3)] for name, share in shares.items()}
    made = comparison.summary(runs, {name: [2.0] for name in runs})
    answers = {(r["claim"], r["a"], r["b"]): r["answer"] for r in made["statements"]}
    assert answers == {
        ("dpo_gold above trace", "dpo_gold", "trace"): "yes",
        ("dpo_gold above trace at equal beta, trace's", "dpo_gold@beta", "trace"): "no",
        ("dpo_gold above trace at equal beta, dpo_gold's", "dpo_gold", "trace@beta"): "yes",
    }


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
    for model in ("base", "ref"):  # one run of theirs meets every seed of u2a
        assert found[model]["win_rate_vs_u2a"]["n"] == 60 * 2 * 3
    base = found["base"]["win_rate_vs_u2a"]["rate"]
    assert base == pytest.approx(0.6, abs=0.03) and found["ref"]["win_rate_vs_u2a"]["rate"] < 0.5


def test_a_wreck_wins_unguarded_alone(found):
    """It says yes, which the judge likes, in degenerate text, which the guard does not."""
    won = found["methods"]["wreck"]["win_rate_vs_u2a"]
    assert won["rate"] > 0.9 and won["guarded"]["rate"] == 0 and won["guarded"]["ties"] == 0
    assert found["methods"]["wreck"]["retained"]["rate"] == 1
    assert found["methods"]["wreck"]["retained_guarded"]["rate"] == 0
    trace = found["methods"]["trace"]["win_rate_vs_u2a"]
    assert trace["guarded"]["rate"] == trace["rate"] and trace["ties"] == trace["guarded"]["ties"]


def test_the_gap_of_the_first_method(found):
    gap = found["gap_closed"]
    assert gap["method"] == "trace" and gap["rate"] == pytest.approx(0.75, abs=0.06)
    assert gap["low"] < gap["rate"] < gap["high"] and "caveat" not in gap


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ((0.7, 0.0, 0.9, 0.0), ("% guarded: a share of the way up from", "not above M_ref")),
        ((0.7, 0.3, 0.9, 0.3), ("u2a is not above M_ref (",)),
        ((0.9, 0.3, 0.6, 0.1), ("more than 100 %: trace is above dpo_gold",)),
        ((0.4, 0.3, 0.1, 0.3), ("u2a is not above M_ref",)),
    ],
)
def test_caveats_of_a_gap(shares, said):
    names = ("trace", "u2a", "dpo_gold")
    *of_methods, of_ref = shares
    runs = {n: [rows(x, s, 0.02) for s in (0, 1)] for n, x in zip(names, of_methods, strict=True)}
    made = comparison.summary(runs, {n: [2.0] for n in names}, ref=rows(of_ref, 9, 0.02))
    caveat = made["gap_closed"]["caveat"]
    assert all(part in caveat for part in said) and len(caveat.split("; ")) == len(said)
    text = comparison_tables.markdown(made | {"seeds": [0, 1, 2], "split": "test"})
    assert f" Caveat: {caveat}." in text
    assert ("there is no gap" in text) == (shares[2] < shares[1])


def test_tests_are_corrected_within_a_figure(found):
    for figure in comparison.TESTED:
        of = [t for t in found["tests"] if t["figure"] == figure]
        assert [t["b"] for t in of] == ["u2a", "npo", "dpo_gold", "trace_no_kl", "wreck"]
        assert [t["p_holm"] for t in of] == paired.holm([t["p"] for t in of])


def test_tables_have_a_line_a_method(found):
    text, tex = comparison_tables.markdown(found), comparison_tables.latex(found)
    for name in SHARES:
        assert f"| {name} | " in text and name.replace("_", r"\_") + " & " in tex
    assert "win rate against u2a" in text and "Share of the gap from u2a to dpo_gold" in text
    assert tex.count(r"\\") == 1 + len(("base", "M_ref", *SHARES, "wreck"))
    for head in ("unchanged, guarded", "win rate against u2a", "ties", "win rate, guarded"):
        assert f"| {head} |" in text and f"& {head} " in tex
    assert "| wreck | 0.0 [" in text and r"u2a & $" in tex and " & -- & -- " in tex


def test_results_of_earlier_versions_have_their_tables(found):
    """Without guarded figures; ties were counted already."""
    old = copy.deepcopy(found)
    for row in (old["base"], old["ref"], *old["methods"].values()):
        del row["retained_guarded"]
        for key in ("ties", "guarded"):
            row.get(WON, {}).pop(key, None)
    text = comparison_tables.markdown(old)
    assert "guarded |" in text and "unchanged, guarded" not in text
    assert "win rate, guarded" not in text + comparison_tables.latex(old)
    ties = [
        next(line for line in table.splitlines() if line.startswith("| trace ")).split("|")[column]
        for table, column in ((text, -2), (comparison_tables.markdown(found), -3))
    ]
    assert ties[0] == ties[1] == f" {100 * found['methods']['trace'][WON]['ties']:.0f} "


def test_another_policy_is_refused():
    one, other, old = {"policy": {"new": "aa"}}, {"policy": {"new": "bb"}}, {}
    comparison.check_policy({"a": [one, one], "b": [old]}, "aa")
    with pytest.raises(InputError, match=r"b was evaluated under another new policy \(bb"):
        comparison.check_policy({"a": [one, one], "b": [one, other]}, "aa")


def test_other_prompts_are_refused():
    other = [r | {"id": "x" + r["id"]} for r in rows(0.5, 0)]
    with pytest.raises(InputError, match="b was evaluated on other prompts"):
        comparison.summary({"a": [rows(0.5, 0)], "b": [other]}, {"a": [1.0], "b": [1.0]})


def test_labels_of_the_plot_stand_apart_and_inside():
    rates = [10.0, 50.0, 50.1, 50.2, 79.9, 80.0]
    places = comparison_tables._apart(rates, lines=35)
    gaps = [b - a for a, b in zip(places, places[1:], strict=False)]
    assert min(gaps) >= 1.999 and places[0] == 10.0 and max(places) == 80.0
    assert max(abs(p - r) for p, r in zip(places, rates, strict=True)) < 4.1
    assert comparison_tables._apart([5.0], lines=20) == [5.0]
