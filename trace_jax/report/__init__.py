"""One self-contained page about a run: what changed, what each pair got, what came of it, its cost.

`collect` reads the artefacts of a workdir into a context, `write` renders a context. Prompts and
responses are untrusted: the template escapes everything but the charts, and the page loads nothing
and runs no script.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from trace_jax import generations, metrics, policy
from trace_jax.report import comparison, files, impact, run, training, triage
from trace_jax.report.files import Row

MODELS = {"base": "base model", "ref": "M_ref (old policy)", "trained": "re-aligned model"}
SAMPLES_SHOWN = 12
_RATES = ("compliance_guarded", "compliance", "compliance_greedy")
_BY_ACTION = (
    "A held-out prompt's action is what triage gives the first pair of the base model's samples "
    "there that the old policy orders. That fixes what the base model does (on PUNISH neither of "
    "the two complies, on INVERT one), so it has no figure."
)
# Title, figure, its part, models that have none, what there is to know.
_EVALUATION_TABLES = (
    ("Guarded compliance by action", "compliance_guarded", "by_action", ("base",), _BY_ACTION),
    ("Share of responses that meet each clause", "compliance", "by_clause", (), ""),
)


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
      run: [(name, value)] of what was run.
      triage: {"n", "n_conflicts", "actions": [{"action", "n", "share"}], "clauses": rows of
        coverage.json, "examples": `reasons.examples`, of PUNISH with "correction", "corrections":
        what became of PUNISH pairs, "overridden", "corrupted", "doubtful": rows of the short list}.
      impact: impact_summary.json with "charts": [chart], "influential": {"most", "least": rows},
        "terms": [(name, one line)].
      training: {"charts": [chart], "kept": which step's model it is}; a chart is {"title", "names",
        "svg"}.
      evaluation: {"rows": [{"model", "rates": [rate], "perplexity", "accuracy": rate}], "tables":
        [{"title", "note", "columns", "rows"}], "guard"}; a rate is {"rate", "low", "high", "n"} or
        None.
      comparison: of methods over this workdir, where there was one: {"tables": [{"columns": [(head,
        whether of texts)], "rows": [{"name", "cells"}]}], "tests": [{"a", "b", "cells"}],
        "statements": [{"claim", "a", "b", "figure", "difference", "p", "answer"}], "gap", "caveat":
        lines or None, "split", "seeds"}; a cell is a rate, a text or None.
      generations: rows of `generations.history`, where the run has a parent.
      samples: [{"prompt", "cells": [{"model", "response", "compliant", "guarded", "violated"}]}].
      stages: [{"stage", "seconds", "summary": [(name, value)]}]. total_seconds: float.
      judge: {"calls", "input_tokens", "output_tokens", "price_usd", "shared"} of what was asked.
    """
    workdir = Path(workdir)
    config = files.read_json(workdir / "config.json") or {}
    settings, changes = files.flat(config), _policy(config)
    triaged, stages = triage.collect(workdir, config), run.stages_done(workdir)
    end = training.ended(workdir, settings)
    return {
        "title": f"{changes['old']} → {changes['new']}" if changes else "TRACE run",
        "config": config,
        "versions": files.read_json(workdir / "versions.json") or {},
        "run": run.header(settings, triaged and triaged["n"], end and end.words),
        "policy": changes,
        "triage": triaged,
        "impact": impact.collect(workdir, settings),
        "training": training.collect(workdir, settings),
        "evaluation": _evaluation(files.read_json(workdir / "eval.json")),
        "samples": _samples(files.read_jsonl(workdir / "samples.jsonl")),
        "comparison": comparison.collect(files.read_json(workdir / "comparison.json")),
        "generations": _generations(workdir),
        "stages": stages,
        "total_seconds": sum(stage["seconds"] for stage in stages),
        "judge": run.judge_cost(workdir, settings),
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
    for title, figure, key, without, note in _EVALUATION_TABLES:
        parts = {model: found[figure].get(key) or {} for model, found in by_model.items()}
        names = list(dict.fromkeys(name for part in parts.values() for name in part))
        if names:
            parts |= {model: {} for model in without if model in parts}
            cells = [{"name": n, "rates": [part.get(n) for part in parts.values()]} for n in names]
            tables.append({"title": title, "note": note, "columns": list(parts), "rows": cells})
    failed = sum(of.get("undecided", {}).get("judge_errors", 0) for of in by_model.values())
    return {"rows": rows, "tables": tables, "guard": result.get("guard"), "judge_errors": failed}


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
