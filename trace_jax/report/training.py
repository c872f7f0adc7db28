"""How a run trained, drawn by step, and which step's model it ended with."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_jax import charts, metrics
from trace_jax.report import files
from trace_jax.report.files import Row

_VALIDATION = {"compliance_guarded": "guarded compliance", "compliance": "raw compliance",
               "kept": "unchanged clauses kept, guarded"}  # fmt: skip
_PERPLEXITY = {"perplexity": "model in training", "perplexity_ref": "M_ref"}
_RESPONSES = ("y0, preferred", "y1")
# Title, what the y axis shows, {key in metrics.jsonl: name in the legend}.
_CHARTS = (
    ("Loss and its parts", "loss", {"loss/total": "total", "loss/preference": "preference",
                                    "loss/npo": "NPO", "loss/nll": "NLL"}),
    ("log p of the responses in preference pairs", "nats",
     dict(zip(("train/logp_0", "train/logp_1"), _RESPONSES, strict=True))),
    ("The same against M_ref (log-ratio)", "nats",
     dict(zip(("train/logratio_0", "train/logratio_1"), _RESPONSES, strict=True))),
    ("KL to M_ref on RETAIN", "nats a token", {"train/kl": "KL"}),
    ("Pairs with the wanted order", "share of pairs", {"train/pairs_won": "won"}),
    ("Gradient norm", "norm", {"train/grad_norm": "norm"}),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Ended:
    """Steps: how many there were, of how many, and that whose model was kept (None: unknown)."""

    at: int
    total: int | None
    kept: int

    @property
    def words(self) -> str:
        """As in "60 of 150 (the model is of step 30)"."""
        of = f" of {self.total}" if self.total and self.total != self.at else ""
        return f"{self.at}{of}" + (
            f" (the model is of step {self.kept})" if self.kept != self.at else ""
        )


def ended(workdir: Path, settings: Mapping[str, Any]) -> Ended | None:
    """How the training ended; None where there was none."""
    path = workdir / "metrics.jsonl"
    rows = metrics.read_metrics(path) if path.exists() else ()
    if not rows:
        return None
    mark = files.read_json(workdir / ".stages" / "train.json") or {}
    told = mark.get("summary") or {}
    # Where a run ended with an earlier evaluation, see best.py, which imports jax.
    back = files.read_json(workdir / "checkpoints" / "stopped.json") or {}
    at = told.get("stopped_at") or back.get("stopped_at") or int(rows[-1]["step"])
    kept = told.get("kept_step") or back.get("step") or at
    return Ended(at, settings.get("train.total_steps"), kept)


def collect(workdir: Path, settings: Mapping[str, Any]) -> Row | None:
    """{"charts": [chart], "kept": which step's model it is and why, or None}."""
    end = ended(workdir, settings)
    pauses = files.read_jsonl(workdir / "pauses.jsonl") or ()
    evaluations = [row for row in pauses if row["kind"] == "evaluation"]
    if end is None:
        return None
    chosen = settings.get("train.keep_best") or end.kept != end.at
    mark = (end.kept, f"model: step {end.kept}") if chosen else None
    found = _validation(evaluations, settings, mark)
    rows = metrics.read_metrics(workdir / "metrics.jsonl")
    for title, unit, names in _CHARTS:
        found += _chart(title, unit, rows, names, mark=mark)
    kept = _kept(end, evaluations, settings) if chosen else None
    return {"charts": found, "kept": kept} if found else None


def _validation(
    rows: Sequence[Row], settings: Mapping[str, Any], mark: charts.Mark | None
) -> list[Row]:
    """Compliance and perplexity of the evaluations while training."""
    if not rows:
        return []
    on = f"{rows[0]['prompts']} validation prompts" if "prompts" in rows[0] else "validation"
    limit = _limit(rows, settings)
    drawn = (limit, f"limit {limit:.2f}") if limit else None
    found = _chart(f"Compliance, {on}", "share of samples", rows, _VALIDATION, mark=mark)
    title = "Perplexity of the base model's samples"
    return found + _chart(title, "perplexity", rows, _PERPLEXITY, mark=mark, limit=drawn)


def _limit(rows: Sequence[Row], settings: Mapping[str, Any]) -> float | None:
    """The highest perplexity of a model that train.keep_best takes."""
    factor = settings.get("train.perplexity_limit")
    if not settings.get("train.keep_best") or not factor or "perplexity_ref" not in rows[0]:
        return None
    return factor * rows[0]["perplexity_ref"]


def _chart(
    title: str, unit: str, rows: Sequence[Row], names: Mapping[str, str], **lines: Any
) -> list[Row]:
    """The chart, or none where nothing but zeros would be in it."""
    series = {
        name: [(row["step"], row[key]) for row in rows if key in row] for key, name in names.items()
    }
    series = {name: points for name, points in series.items() if any(y for _, y in points)}
    if not series:
        return []
    svg = charts.line_chart(series, f"{title}, by step", titles=("step", unit), **lines)
    return [{"title": title, "names": list(series), "svg": svg}]


def _kept(end: Ended, rows: Sequence[Row], settings: Mapping[str, Any]) -> str:
    """Which step's model the run ended with, why, and when it ended."""
    limit = _limit(rows, settings) if rows else None
    why = ""
    if limit:
        of = f"{limit:.2f} ({settings['train.perplexity_limit']:g} times M_ref's)"
        within = any(row["perplexity"] <= limit for row in rows)
        why = f"the least perplexity, since none of the evaluations is within the limit of {of}"
        if within:
            why = "the best guarded compliance among evaluations with a perplexity of at most " + of
        why = f": {why}"
    elif settings.get("train.stop_below"):
        why = (
            ", the evaluation before fewer than "
            f"{settings['train.stop_below']:g} of M_ref's share of samples kept what does not "
            "change"
        )
    of = f" of {end.total}" if end.total and end.total != end.at else ""
    return f"The model is that of step {end.kept}{why}; training ended at step {end.at}{of}."
