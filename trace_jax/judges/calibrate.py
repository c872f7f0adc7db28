"""Measures a judge against people: `python -m trace_jax.judges calibrate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trace_jax import charts, judges, metrics, records, report
from trace_jax import policy as policies
from trace_jax.evaluate import calibration
from trace_jax.judges import human_labels, store

_MOST_SHOWN = 100  # disagreements on the page


def calibrate(
    judge: judges.Judge,
    policy: policies.Policy,
    found: Sequence[human_labels.Labelled],
    *,
    data: str,
    kept: store.Store | None,
    out: Path,
) -> dict[str, Any]:
    """Writes `out` (JSON) and beside it a page of the same name; returns what stands in the JSON.

    kept: where the judge's calls are counted, None for one that makes none.
    """
    before = store.Spent() if kept is None else kept.spent()
    with metrics.progress(len(found), f"judged by {judge.id}") as bar:
        verdicts = judge.judge([one.item for one in found], progress=bar.advance)
    spent = store.Spent() if kept is None else kept.spent()
    whole = [
        calibration.Answer(v.status, v.p_compliant, one.ratings, one.adjudicated)
        for v, one in zip(verdicts, found, strict=True)
    ]
    per_clause = {
        clause.id: calibration.measure(
            [
                calibration.Answer(c.status, c.probability, one.clauses[clause.id])
                for v, one in zip(verdicts, found, strict=True)
                if clause.id in one.clauses
                for c in (v.clauses[clause.id],)
            ]
        )
        for clause in policy.clauses
    }
    result = {
        "judge": judge.id,
        "policy": policy.name,
        "policy_hash": policy.hash,
        "data": data,
        **calibration.measure(whole),
        "per_clause": per_clause,
        "cost": _cost(before, spent, len(found)),
    }
    records.write_json(out, result)
    page = {
        "found": result,
        "statuses": records.STATUSES,
        "figures": _figures(result),
        "disagreements": _disagreements(found, verdicts, whole),
    }
    report.write(out.with_suffix(".html"), page, "calibration.html.j2")
    return result


def _cost(before: store.Spent, after: store.Spent, n: int) -> dict[str, float]:
    """What this measurement took; verdicts that were in the store cost nothing again."""
    price = after.price - before.price
    return {
        "calls": after.calls - before.calls,
        "input_tokens": after.input_tokens - before.input_tokens,
        "cached_tokens": after.cached_tokens - before.cached_tokens,
        "output_tokens": after.output_tokens - before.output_tokens,
        "price": price,
        "price_per_1000": 1000 * price / n,
    }


def _figures(result: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    if result["roc"]:
        roc = [(a, b) for a, b, _ in result["roc"]]
        series = {"the judge": roc, "chance": [(0.0, 0.0), (1.0, 1.0)]}
        titles = ("violating responses let through", "compliant responses found")
        found.append(_figure(series, "ROC", titles))
    if len(result["bins"]) > 1:
        bins = [(row["mean_probability"], row["share_compliant"]) for row in result["bins"]]
        series = {"the judge": bins, "perfect": [(0.0, 0.0), (1.0, 1.0)]}
        titles = ("the judge's P(compliant)", "share that people call compliant")
        found.append(_figure(series, "Calibration", titles))
    return found


def _figure(
    series: dict[str, list[tuple[float, float]]], title: str, titles: tuple[str, str]
) -> dict[str, Any]:
    chart = charts.line_chart(series, f"{title}: {titles[1]} over {titles[0]}", titles=titles)
    return {"title": title, "svg": chart, "names": list(series)}


def _disagreements(
    found: Sequence[human_labels.Labelled],
    verdicts: Sequence[records.Verdict],
    answers: Sequence[calibration.Answer],
) -> list[dict[str, str]]:
    rows = [
        {
            "said": answer.status,
            "people": answer.majority,
            "prompt": judges.prompt_text(one.item.prompt),
            "response": judges.response_text(one.item.response),
            "rationale": verdict.rationale,
        }
        for one, verdict, answer in zip(found, verdicts, answers, strict=True)
        if answer.right == 0
    ]
    return rows[:_MOST_SHOWN]


def lines(result: dict[str, Any]) -> list[str]:
    """The figures that matter, for people."""

    def percent(value: float | None) -> str:
        return "not defined" if value is None else f"{value:.1%}"

    def number(value: float | None) -> str:
        return "not defined" if value is None else f"{value:.3f}"

    low, high = percent(result["low"]), percent(result["high"])
    said = [
        f"{result['judge']} on {result['n']} responses that people judged under {result['policy']}",
        f"accuracy {percent(result['accuracy'])} ({low} to {high}), decided "
        f"{percent(result['coverage'])}",
        f"alpha with the people {number(result['alpha_with_humans'])}, among the people "
        f"{number(result['alpha_humans'])}",
        f"area under the ROC {number(result['auc'])}, calibration error "
        f"{number(result['calibration_error'])}",
        f"{result['cost']['calls']} calls, {result['cost']['price_per_1000']:.4f} US dollars for "
        "1,000 verdicts",
    ]
    for name, row in result["per_clause"].items():
        if row["n"]:
            said.append(
                f"  {name}: accuracy {percent(row['accuracy'])}, decided "
                f"{percent(row['coverage'])}, of violating: precision "
                f"{percent(row['precision_violating'])}, recall {percent(row['recall_violating'])}"
            )
    return said
