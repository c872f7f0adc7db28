"""What a comparison found: figures of every method over its seeds, tests, win rates, the gap.

A run is {seed: rows}; rows are those of samples.jsonl (see `evaluate/compliance.py`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from trace_jax import judges, records
from trace_jax.errors import InputError
from trace_jax.evaluate import choices, compliance, paired, statistics, winrate

Runs = list[list[dict]]  # rows of each seed
Chosen = Sequence[Sequence[int]]  # answers of each seed to `choices.questions`

# Name in the JSON -> (what a row says, of which mode).
FIGURES = {
    "compliance_guarded": ("guarded", "sample"),
    "compliance": ("compliant", "sample"),
    "compliance_greedy": ("compliant", "greedy"),
    "retained": ("retained", "sample"),
    "retained_guarded": ("retained_guarded", "sample"),
    "compliance_old": ("old_compliant", "sample"),
}
TESTED = ("compliance_guarded", "compliance")
LOWER, UPPER = "u2a", "dpo_gold"  # the gap of arXiv 2511.02623, which TRACE closes by 81.8 %


@dataclasses.dataclass(frozen=True)
class Statement:
    """A claim of the paper: figure(a) - figure(b) is above `margin`.

    figure: one of FIGURES, "choice_accuracy", or "perplexity" (log ratio; above 0 is worse).
    """

    claim: str
    a: str
    b: str
    margin: float = 0.0
    figure: str = ""  # empty: guarded and raw compliance, each


STATEMENTS = (
    Statement("trace above u2a", "trace", "u2a"),
    Statement("trace above npo", "trace", "npo"),
    Statement("dpo_gold above trace", "dpo_gold", "trace"),
    Statement("dpo_gold above trace at equal beta, trace's", "dpo_gold@beta", "trace"),
    Statement("dpo_gold above trace at equal beta, dpo_gold's", "dpo_gold", "trace@beta"),
    Statement("naive_oracle_dpo more than 10 points below trace", "trace", "naive_oracle_dpo", 0.1),
    Statement("no triage loses compliance", "trace", "trace_no_triage"),
    Statement("no impact weights loses compliance", "trace_full_weights", "trace_no_impact"),
    Statement(
        "no impact weights loses utility",
        "trace_no_impact",
        "trace_full_weights",
        figure="perplexity",
    ),
    Statement(
        "impact weights above the same, dealt at random", "trace_full_weights", "trace_shuffled"
    ),
    Statement("no KL loses utility", "trace_no_kl", "trace", figure="perplexity"),
    Statement(
        "no impact weights loses utility",
        "trace_full_weights",
        "trace_no_impact",
        figure="choice_accuracy",
    ),
    Statement("no KL loses utility", "trace", "trace_no_kl", figure="choice_accuracy"),
)


def rows_of(path: Path, model: str, split: str, unchanged: Sequence[str]) -> list[dict]:
    """Rows of one model and split, with "retained": every unchanged clause is complied with.

    "retained_guarded": and the text is not degenerate, since one that says nothing breaks nothing.
    """
    found = []
    for _, row in records.read_jsonl(path):
        if row["model"] == model and row["split"] == split:
            kept = all(row["clauses"][c] == "compliant" for c in unchanged)
            guarded = kept and not row["degenerate"]
            found.append(row | {"retained": kept, "retained_guarded": guarded})
    return found


def summary(
    runs: Mapping[str, Runs],
    perplexity: Mapping[str, Sequence[float]],
    chosen: Mapping[str, Chosen] | None = None,
    *,
    ref: Sequence[dict] = (),
) -> dict[str, Any]:
    """{"methods", "methods_order", "tests", "statements", "gap_closed"}, without win rates.

    As in comparison.json, whose keys are sorted: methods_order is the order in which they came.
    The first method is tested against every other. chosen: answers to `choices.questions` of each
    seed, of the methods that have them. ref: M_ref's rows, for what may be said of the gap.
    """
    _check_prompts(runs)
    chosen = chosen or {}
    first, *others = runs
    tests = [_test(figure, first, b, runs) for figure in TESTED for b in others]
    for figure in TESTED:
        of_figure = [t for t in tests if t["figure"] == figure]
        for test, p in zip(of_figure, paired.holm([t["p"] for t in of_figure]), strict=True):
            test["p_holm"] = p
    methods = {name: figures(of) | _spread(perplexity[name]) for name, of in runs.items()}
    for name, of in chosen.items():
        methods[name]["choice_accuracy"] = choices.rate_over_seeds(of)
    statements = _statements(runs, perplexity, chosen)
    found: dict[str, Any] = {"methods": methods, "methods_order": list(runs)}
    found |= {"tests": tests, "statements": statements}
    if {first, LOWER, UPPER} <= runs.keys() and first not in (LOWER, UPPER):
        found["gap_closed"] = _gap(first, runs, ref)
    return found


def win_rates(judge: judges.Comparer, runs: Mapping[str, Runs]) -> dict[str, dict[str, Any]]:
    """Method -> its win rate against LOWER, which has to be one of them; see `winrate.summary`.

    A model that is not trained (base, M_ref) has one run, and meets every seed of LOWER.
    """
    against = runs[LOWER]
    found = {}
    for name, of in runs.items():
        if name != LOWER:
            pairs = _pairs(of * len(against) if len(of) == 1 else of, against)
            told = winrate.summary(pairs, winrate.outcomes(judge, pairs))
            guarded = told.pop("guarded")
            found[name] = {"rate": told.pop("win_rate")} | told
            found[name]["guarded"] = {"rate": guarded.pop("win_rate")} | guarded
    return found


def figures(of_seeds: Runs) -> dict[str, Any]:
    """Rates over seeds; `seeds` are the rates of each."""
    out = {}
    for name in FIGURES:
        of = outcomes(of_seeds, name)
        found = statistics.rate_over_seeds(of)
        out[name] = dataclasses.asdict(found) | {"seeds": [float(o.mean()) for o in of]}
    return out


def outcomes(of_seeds: Runs, figure: str) -> list[np.ndarray]:
    """[prompts, samples] 0/1 of each seed."""
    key, mode = FIGURES[figure]
    return [compliance.outcomes([r for r in rows if r["mode"] == mode], key) for rows in of_seeds]


def check_policy(evaluated: Mapping[str, Sequence[Mapping[str, Any]]], wanted: str) -> None:
    """Raises InputError where a method's eval.json is of another new policy than `wanted`, a hash.

    evaluated: eval.json of each seed; those of earlier versions do not say, and pass.
    """
    for name, of_seeds in evaluated.items():
        other = {e["policy"]["new"] for e in of_seeds if "policy" in e} - {wanted}
        if other:
            raise InputError(
                f"{name} was evaluated under another new policy ({other.pop()[:12]}, the others "
                f"under {wanted[:12]}); compare runs of one policy, or evaluate it again"
            )


def _check_prompts(runs: Mapping[str, Runs]) -> None:
    known = None
    for name, of_seeds in runs.items():
        for rows in of_seeds:
            ids = list(dict.fromkeys(r["id"] for r in rows))
            known = known or ids
            if ids != known or not ids:
                raise InputError(
                    f"{name} was evaluated on other prompts than the methods before it; compare "
                    "runs over one prepared workdir, with one policy and one held-out set"
                )


def _test(figure: str, a: str, b: str, runs: Mapping[str, Runs]) -> dict[str, Any]:
    found = paired.compare(outcomes(runs[a], figure), outcomes(runs[b], figure))
    return {"a": a, "b": b, "figure": figure} | dataclasses.asdict(found)


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"perplexity": float(np.mean(values)), "perplexity_seeds": [float(v) for v in values]}


def _pairs(a: Runs, b: Runs) -> list[winrate.Pair]:
    found = []
    for seed, (rows_a, rows_b) in enumerate(zip(a, b, strict=True)):
        theirs = {(r["id"], r["sample"]): r for r in rows_b if r["mode"] == "sample"}
        for x in rows_a:
            y = theirs.get((x["id"], x["sample"])) if x["mode"] == "sample" else None
            if y is not None:
                degenerate = x["degenerate"], y["degenerate"]
                texts = x["prompt"], x["response"], y["response"]
                found.append(winrate.Pair(*texts, seed=seed, degenerate=degenerate))
    return found


def _gap(method: str, runs: Mapping[str, Runs], ref: Sequence[dict]) -> dict[str, Any]:
    """Of guarded compliance, with raw compliance beside it, and a word where it says little."""
    found: dict[str, Any] = {"method": method, "lower": LOWER, "upper": UPPER, "paper": 0.818}
    closed = {
        figure: paired.gap_closed(*(outcomes(runs[m], figure) for m in (method, LOWER, UPPER)))
        for figure in TESTED
    }
    found |= closed["compliance_guarded"] | {"raw": closed["compliance"]}
    if caveats := _caveats(found, runs, ref):
        found["caveat"] = "; ".join(caveats)
    return found


def _caveats(gap: Mapping[str, Any], runs: Mapping[str, Runs], ref: Sequence[dict]) -> list[str]:
    lower, found = outcomes(runs[LOWER], "compliance_guarded"), []
    floor = float(np.mean([o.mean() for o in lower]))
    if floor < 0.05:
        found.append(
            f"{LOWER} is at {floor:.1%} guarded: a share of the way up from nothing says little"
        )
    if ref:
        over = paired.compare(lower, outcomes([list(ref)] * len(lower), "compliance_guarded"))
        if over.low <= 0:
            points = [f"{100 * x:+.1f}" for x in (over.difference, over.low, over.high)]
            found.append(
                f"{LOWER} is not above M_ref ({points[0]} points guarded [{points[1]}, "
                f"{points[2]}]): the way up begins at a model that has learnt nothing"
            )
    if gap["rate"] is not None and gap["rate"] > 1:
        found.append(
            f"more than 100 %: {gap['method']} is above {UPPER}, which is then no upper bound"
        )
    return found


def _statements(
    runs: Mapping[str, Runs],
    perplexity: Mapping[str, Sequence[float]],
    chosen: Mapping[str, Chosen],
) -> list[dict[str, Any]]:
    def test_of(s: Statement, figure: str) -> dict[str, Any]:
        if figure == "perplexity":
            return _log_ratio(perplexity[s.a], perplexity[s.b])
        if figure == "choice_accuracy":
            a, b = choices.outcomes(chosen[s.a]), choices.outcomes(chosen[s.b])
        else:
            a, b = outcomes(runs[s.a], figure), outcomes(runs[s.b], figure)
        return dataclasses.asdict(paired.compare(a, b, margin=s.margin))

    found = []
    for s in STATEMENTS:
        if not {s.a, s.b} <= (chosen if s.figure == "choice_accuracy" else runs).keys():
            continue
        for figure in (s.figure,) if s.figure else TESTED:
            test = test_of(s, figure)
            row = {"claim": s.claim, "figure": figure, "a": s.a, "b": s.b, "margin": s.margin}
            found.append(row | {k: test[k] for k in ("difference", "low", "high", "p")})
    for row, p in zip(found, paired.holm([r["p"] for r in found]), strict=True):
        row["p_holm"] = p
        row["answer"] = _answer(row)
    return found


def _answer(row: Mapping[str, Any]) -> str:
    """yes or no where interval and corrected p both say so, which side is the claim's; or not."""
    if row["low"] is None or row["p_holm"] >= 0.05:
        return "cannot tell"
    if row["low"] > row["margin"]:
        return "yes"
    return "no" if row["high"] < row["margin"] else "cannot tell"


def _log_ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, float | None]:
    """log(a / b) over paired seeds, Student's interval; from one seed nothing can be told."""
    d = np.log(np.asarray(a, np.float64)) - np.log(np.asarray(b, np.float64))
    mean = float(d.mean())
    if len(d) < 2 or np.ptp(d) < 1e-12:
        return {"difference": mean, "low": None, "high": None, "p": 1.0}
    error = float(d.std(ddof=1) / np.sqrt(len(d)))
    half = float(special.stdtrit(len(d) - 1, 0.975)) * error
    p = float(2 * special.stdtr(len(d) - 1, -abs(mean) / error))
    return {"difference": mean, "low": mean - half, "high": mean + half, "p": p}
