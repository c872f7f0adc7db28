"""One self-contained page about a run: what changed, what each pair got, what came of it, its cost.

`collect` reads the artefacts of a workdir into a context, `write` renders a context. Prompts and
responses are untrusted: the template escapes everything but the charts, and the page loads nothing
and runs no script.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from trace_jax import (
    charts,
    comparison_tables,
    generations,
    metrics,
    policy,
    reasons,
    records,
    shortlist,
)
from trace_jax import workdir as workdirs

CONFLICTS = ("INVERT", "PUNISH")
MODELS = {"base": "base model", "ref": "M_ref (old policy)", "trained": "re-aligned model"}
SAMPLES_SHOWN = 12
DOUBTFUL_SHOWN = 6
INFLUENTIAL_SHOWN = 5  # of the most and of the least influential records
_RATES = ("compliance_guarded", "compliance", "compliance_greedy")
_EVALUATION_TABLES = (
    ("Guarded compliance by action", "compliance_guarded", "by_action"),
    ("Share of responses that meet each clause", "compliance", "by_clause"),
)
_TRAINING_CHARTS = (
    ("Loss and its parts", ("loss/total", "loss/preference", "loss/npo", "loss/nll")),
    ("log p of y0 and y1 in preference pairs, nats", ("train/logp_0", "train/logp_1")),
    ("The same against M_ref (log-ratio)", ("train/logratio_0", "train/logratio_1")),
    ("KL to M_ref on RETAIN, nats a token", ("train/kl",)),
    ("Share of pairs with the wanted order", ("train/pairs_won",)),
    ("Gradient norm", ("train/grad_norm",)),
)

Row = dict[str, Any]


def write(path: Path, context: Mapping[str, Any], template: str = "report.html.j2") -> None:
    """Renders the context (see `collect`; of another template: its own) into one HTML file."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trace_jax"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "figure": _figure,
        "duration": metrics.duration,
        "plain": _plain,
        "pretty": _pretty,
    }
    page = environment.get_template(template).render(context, models=MODELS)
    # Models may write lone surrogates, which are no UTF-8.
    Path(path).write_bytes(page.encode("utf-8", errors="replace"))


def collect(workdir: Path) -> dict[str, Any]:
    """The context of a workdir. A section without its artefacts is None and left out of the page.

    Keys:
      title: str. config, versions: the JSON files, {} where missing.
      policy: {"old", "new", "clauses": [{"id", "change", "before", "after"}]}; change is unchanged,
      added, removed or changed.
      triage: {"n", "n_conflicts", "actions": [{"action", "n", "share"}], "clauses": rows of
        coverage.json, "examples": `reasons.examples`, "overridden", "corrupted", "doubtful": rows
        of the short list}.
      impact: impact_summary.json with "charts": [chart].
      training: [chart]; a chart is {"title", "names", "svg"}.
      evaluation: {"rows": [{"model", "rates": [rate], "perplexity", "accuracy": rate}], "tables":
        [{"title", "columns", "rows"}], "guard"}; a rate is {"rate", "low", "high", "n"} or None.
      comparison: of methods over this workdir, where there was one: {"columns": [head], "rows":
        [{"name", "cells"}], "statements": rows of `comparison_tables.statements`, "gap", "caveat":
        lines or None, "split", "seeds"}; a cell is a rate, a text or None.
      generations: rows of `generations.history`, where the run has a parent.
      samples: [{"prompt", "cells": [{"model", "response", "compliant", "guarded", "violated"}]}].
      stages: [{"stage", "seconds", "summary": [(name, value)]}]. total_seconds: float.
    """
    workdir = Path(workdir)
    config = _read_json(workdir / "config.json") or {}
    changes = _policy(config)
    stages = _stages(workdir)
    return {
        "title": f"{changes['old']} → {changes['new']}" if changes else "TRACE run",
        "config": config,
        "versions": _read_json(workdir / "versions.json") or {},
        "policy": changes,
        "triage": _triage(workdir, config),
        "impact": _impact(workdir),
        "training": _training(workdir),
        "evaluation": _evaluation(_read_json(workdir / "eval.json")),
        "samples": _samples(_read_jsonl(workdir / "samples.jsonl")),
        "comparison": _comparison(_read_json(workdir / "comparison.json")),
        "generations": _generations(workdir),
        "stages": stages,
        "total_seconds": sum(stage["seconds"] for stage in stages),
    }


def _policy(config: Row) -> Row | None:
    if "policy" not in config:
        return None
    old, new = policy.load(config["policy"]["old"]), policy.load(config["policy"]["new"])
    before = {clause.id: clause.requirement for clause in old.clauses}
    after = {clause.id: clause.requirement for clause in new.clauses}
    changes = dataclasses.asdict(policy.diff(old, new))
    clauses = [
        {"id": i, "change": change, "before": before.get(i), "after": after.get(i)}
        for change in ("added", "changed", "removed", "unchanged")
        for i in changes[change]
    ]
    return {"old": old.name, "new": new.name, "clauses": clauses}


def _triage(workdir: Path, config: Row) -> Row | None:
    rows = _read_jsonl(workdir / "triage.jsonl")
    if not rows:
        return None
    actions = Counter(row["action"] for row in rows)
    counted = [
        {"action": action, "n": actions[action], "share": actions[action] / len(rows)}
        for action in records.ACTIONS
    ]
    doubtful = [row for row in shortlist.of_workdir(workdir, DOUBTFUL_SHOWN) if row["value"] > 0]
    return {
        "n": len(rows),
        "n_conflicts": sum(actions[action] for action in CONFLICTS),
        "actions": counted,
        "clauses": _read_json(workdir / "coverage.json") or [],
        "examples": _examples(workdir, config, rows),
        "overridden": sum("override" in row for row in rows),
        "corrupted": sum("noise" in row for row in rows),
        "doubtful": doubtful,
    }


def _examples(workdir: Path, config: Row, rows: Sequence[Row]) -> list[Row]:
    if "policy" not in config:
        return []
    kept = workdirs.store(workdir, config)
    return reasons.examples(rows, policy.load(config["policy"]["new"]), kept)


def _impact(workdir: Path) -> Row | None:
    summary, rows = (
        _read_json(workdir / "impact_summary.json"),
        _read_jsonl(workdir / "impact.jsonl"),
    )
    if summary is None:
        return None
    scored = [row for row in rows or () if row["score"] is not None and not row["gold"]]
    weighted = [row for row in scored if row["weight"] > 0]
    charts_found = [
        _histogram("Impact scores", "score", scored),
        _histogram("Weights in the loss", "weight", weighted),
    ]
    triaged = {row["id"]: row for row in _read_jsonl(workdir / "triage.jsonl") or ()}
    ranked = sorted(scored, key=lambda row: -row["score"])
    ends = {"most": ranked[:INFLUENTIAL_SHOWN], "least": ranked[::-1][:INFLUENTIAL_SHOWN]}
    if len(ranked) < 2 * INFLUENTIAL_SHOWN:
        ends = {}
    return summary | {
        "charts": [chart for chart in charts_found if chart["names"]],
        "influential": {
            name: [row | reasons.told(triaged[row["id"]]) for row in of if row["id"] in triaged]
            for name, of in ends.items()
        },
    }


def _histogram(title: str, key: str, rows: Sequence[Row]) -> Row:
    groups = {a: [row[key] for row in rows if row["action"] == a] for a in CONFLICTS}
    groups = {action: values for action, values in groups.items() if values}
    svg = charts.histogram(groups, f"{title}, records per value")
    return {"title": title, "names": list(groups), "svg": svg}


def _training(workdir: Path) -> list[Row] | None:
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return None
    rows = metrics.read_metrics(path)
    found = []
    pauses = _read_jsonl(workdir / "pauses.jsonl") or ()
    evaluations = [row for row in pauses if row["kind"] == "evaluation"]
    if evaluations:
        names = ("compliance_guarded", "compliance", "kept")
        series = {n: [(row["step"], row[n]) for row in evaluations] for n in names}
        svg = charts.line_chart(series, "Validation prompts by step")
        found.append({"title": "Validation prompts", "names": list(names), "svg": svg})
    for title, names in _TRAINING_CHARTS:
        series = {name: [(row["step"], row[name]) for row in rows if name in row] for name in names}
        series = {name: points for name, points in series.items() if any(y for _, y in points)}
        if series:
            svg = charts.line_chart(series, f"{title} by step")
            found.append({"title": title, "names": list(series), "svg": svg})
    return found or None


def _evaluation(result: Row | None) -> Row | None:
    if result is None:
        return None
    by_model = {"base": result.get("base"), "ref": result.get("ref"), "trained": result}
    by_model = {model: found for model, found in by_model.items() if found}
    rows = [
        {
            "model": model,
            "rates": [found.get(key) for key in _RATES],
            "perplexity": found.get("perplexity"),
            "accuracy": found.get("choice_accuracy"),
        }
        for model, found in by_model.items()
    ]
    tables = []
    for title, figure, key in _EVALUATION_TABLES:
        parts = {model: found[figure].get(key) or {} for model, found in by_model.items()}
        names = list(dict.fromkeys(name for part in parts.values() for name in part))
        if names:
            cells = [{"name": n, "rates": [part.get(n) for part in parts.values()]} for n in names]
            tables.append({"title": title, "columns": list(parts), "rows": cells})
    failed = sum(of.get("undecided", {}).get("judge_errors", 0) for of in by_model.values())
    return {"rows": rows, "tables": tables, "guard": result.get("guard"), "judge_errors": failed}


def _comparison(found: Row | None) -> Row | None:
    if found is None:
        return None
    columns = comparison_tables.columns(found)
    names = [name for name, _ in comparison_tables.rows(found)]
    return {
        "columns": list(columns),
        "rows": [
            {"name": name, "cells": [of[i] for of in columns.values()]}
            for i, name in enumerate(names)
        ],
        "statements": comparison_tables.statements(found),
        "gap": comparison_tables.gap(found),
        "caveat": found.get("gap_closed", {}).get("caveat"),
        "split": found["split"],
        "seeds": found["seeds"],
    }


def _generations(workdir: Path) -> list[Row] | None:
    found = generations.history(workdir)
    return found if len(found) > 1 else None


def _samples(rows: Sequence[Row] | None) -> list[Row] | None:
    """The first prompts of the first split, each with every model's first sample: not chosen."""
    by_prompt: dict[str, list[Row]] = {}
    for row in rows or ():
        is_first = row["mode"] == "sample" and row["sample"] == 0
        if is_first and row["split"] == rows[0]["split"]:
            by_prompt.setdefault(row["id"], []).append(row)
    found = []
    for group in list(by_prompt.values())[:SAMPLES_SHOWN]:
        cells = sorted((_cell(row) for row in group), key=lambda c: list(MODELS).index(c["model"]))
        found.append({"prompt": group[0]["prompt"], "cells": cells})
    return found or None


def _cell(row: Row) -> Row:
    cell = {key: row[key] for key in ("model", "response", "compliant", "guarded")}
    violated = [clause for clause, status in row["clauses"].items() if status == "violating"]
    return cell | {"violated": violated}


def _stages(workdir: Path) -> list[Row]:
    marks = [_read_json(path) for path in (workdir / ".stages").glob("*.json")]
    done = [mark for mark in marks if "seconds" in mark]
    order = (
        "prepare",
        "align",
        "triage",
        "baseline",
        "correct",
        "impact",
        "train",
        "evaluate",
        "export",
    )
    done.sort(key=lambda mark: order.index(mark["stage"]) if mark["stage"] in order else len(order))
    return [
        {"stage": m["stage"], "seconds": m["seconds"], "summary": _flat(m.get("summary") or {})}
        for m in done
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found


def _read_json(path: Path) -> Row | None:
    return records.read_json(path) if path.exists() else None


def _read_jsonl(path: Path) -> list[Row] | None:
    return [row for _, row in records.read_jsonl(path)] if path.exists() else None


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _figure(value: float | None, digits: str) -> str:
    """A number in a format such as ".2f", a dash where it is not defined."""
    return "–" if value is None or math.isnan(value) else format(value, digits)


def _pretty(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False)


def _plain(text: str | Sequence[Mapping[str, str]]) -> str:
    """A prompt or response as text; chat messages as "role: content" lines."""
    if isinstance(text, str):
        return text
    return "\n".join(f"{message['role']}: {message['content']}" for message in text)
