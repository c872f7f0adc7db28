"""The closing table of a run: what happened, what came of it, how long it took, where it is."""

from trace_jax import metrics, records, stages
from trace_jax.stages import context

FIGURES = ("compliance_guarded", "compliance", "compliance_greedy")


def show(run: context.Context) -> None:
    """Prints the tables on stdout, from the artefacts that are there."""
    if run.workdir.finished("triage") and run.workdir.finished("impact"):
        metrics.table("Triage and weights", _actions(run))
    if run.workdir.finished("evaluate"):
        found = records.read_json(run.file("evaluate", "eval.json"))
        metrics.table(
            f"Compliance with the new policy, held-out prompts ({found['split']}), 95 % intervals",
            figures(found),
        )
    done = [(s.name, run.workdir.finished(s.name)) for s in stages.STAGES]
    metrics.table("Stages", [_stage(name, mark) for name, mark in done if mark])
    for stage, name, what in (("report", "report.html", "report"), ("export", "model", "model")):
        if run.workdir.finished(stage):
            metrics.show(f"{what}: {run.file(stage, name)}")


def _actions(run: context.Context) -> list[dict]:
    summary = records.read_json(run.file("impact", "impact_summary.json"))
    counts = run.workdir.finished("triage")["summary"]["actions"]
    rows = []
    for action, n in counts.items():
        weighed = summary.get("per_action", {}).get(action, {})
        rows.append(
            {
                "action": action,
                "records": n,
                "scored": weighed.get("n", "-"),
                "clamped": _percent(weighed.get("clamped_share")),
                "mean weight": _number(weighed.get("mean_weight")),
                "stability": _number(weighed.get("stability")),
            }
        )
    return rows


def figures(found: dict) -> list[dict]:
    """Rows of an eval.json as people read them: percent with intervals."""
    models = [("base", found.get("base")), ("M_ref", found.get("ref")), ("re-aligned", found)]
    return [
        {"model": name}
        | {key: _interval(row[key]) for key in FIGURES}
        | {"perplexity": f"{row['perplexity']:.2f}"}
        for name, row in models
        if row
    ]


def _interval(rate: dict) -> str:
    return f"{100 * rate['rate']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _stage(name: str, mark: dict) -> dict:
    what = ", ".join(f"{k}={v}" for k, v in mark["summary"].items() if not isinstance(v, dict))
    return {
        "stage": name,
        "seconds": f"{mark['seconds']:.1f}",
        "what": what,
        "artefacts": ", ".join(name for name, digest in mark["outputs"].items() if digest),
    }
