"""Stage impact: the gold batch, g_J, a score for every conflict and the weights made of them.

The gold batch is drawn once. How reliable its scores are is told by its two halves, A and B: some
conflicts are scored along A's gradient as well, which by linearity gives B's scores too, and how
far the two agree tells the rest (Spearman-Brown, for the whole batch).
"""

from collections.abc import Sequence

import numpy as np

from trace_jax import batches, impact, methods, metrics, records
from trace_jax.errors import InputError
from trace_jax.evaluate import statistics
from trace_jax.stages import context, scoring


def run(run: context.Context) -> dict:
    """Writes gold.json, impact.jsonl and impact_summary.json."""
    method = run.scored_method
    if method is None:
        return _uniform(run, _conflicts(run, "trace"))
    examples, encoded, gold, warnings = objective(run)
    _write_gold(run, gold)
    scores = scoring.scores(run, examples, encoded, gold)
    is_gold = np.isin([e.record_id for e in examples], [e.record_id for e in gold])
    weights = weigh(run, examples, scores.along_J, is_gold)
    return _write(run, examples, scores, weights, is_gold, len(gold), warnings)


def _conflicts(run: context.Context, method: str) -> list[methods.Example]:
    """The method's examples of conflicts with unit weight.

    Masses do not count: a loss has one score, however often it counts.
    """
    found = run.examples(method, None, with_masses=False)
    return [e for e in found if not e.kl and (e.action != "RETAIN" or method == "trace_no_triage")]


def objective(run: context.Context):
    """(conflict examples of unit weight, their tokens, the gold pairs of J, warnings)."""
    config, dropped = run.config, []
    examples, encoded = batches.encode_examples(
        run.encoder, _conflicts(run, run.scored_method), on_drop=run.on_drop(dropped)
    )
    if not examples:
        raise InputError(_nothing(run, len(dropped)))
    gold, warnings = impact.draw_gold(
        run.fitting,
        run.corrections,
        size=config.impact.gold_size,
        seed=config.seed,
        draw=config.impact.gold_draw,
    )
    return examples, encoded, gold, warnings


def _nothing(run: context.Context, dropped: int) -> str:
    found = run.workdir.finished("triage")["summary"]["actions"]
    counts = ", ".join(f"{name} {n}" for name, n in found.items())
    why = f"; {dropped} are too long for data.max_length" if dropped else ""
    return (
        f"{run.config.train.method} has no conflict to train on (triage: {counts}{why}): the data "
        "agrees with policy.new, or the judge misses what violates it; look at triage.jsonl"
    )


def weigh(
    run: context.Context, examples, scores: np.ndarray, is_gold: np.ndarray, omega=None
) -> np.ndarray:
    """Weights of examples; omega: those of u2a's last round, None in its first."""
    config = run.config.impact
    if run.scored_method == "u2a":
        if omega is None:
            omega = impact.top(scores, ~is_gold, run.config.u2a.top)
        return impact.exponentiated(scores, omega, run.config.u2a.eta)
    return impact.weigh(
        scores,
        np.array([e.action for e in examples]),
        is_gold,
        normalisation=config.normalisation,
        within=config.within,
        clamp=config.clamp,
        strength=config.strength,
        shuffle_seed=run.config.seed if config.weights == "shuffled" else None,
    )


def _write_gold(run: context.Context, gold: Sequence[methods.Example]) -> None:
    rows = [
        {"id": e.record_id, "action": e.action, "half": "AB"[i % 2]} for i, e in enumerate(gold)
    ]
    records.write_json(run.workdir.path / "gold.json", {"seed": run.config.seed, "pairs": rows})


def _uniform(run: context.Context, examples: Sequence[methods.Example]) -> dict:
    """w = 1 for every conflict; nothing is scored."""
    rows = [
        {"id": e.record_id, "action": e.action, "score": None, "weight": 1.0, "gold": False}
        for e in examples
    ]
    records.write_json(run.workdir.path / "gold.json", {"seed": run.config.seed, "pairs": []})
    records.write_json(
        run.workdir.path / "impact_summary.json", {"normalisation": "uniform", "n_scored": 0}
    )
    records.write_jsonl(run.workdir.path / "impact.jsonl", rows)
    return {"scored": 0}


def _write(
    run,
    examples,
    scores: scoring.Scores,
    weights: np.ndarray,
    is_gold: np.ndarray,
    gold_size: int,
    warnings: list[str],
) -> dict:
    config = run.config.impact
    actions = np.array([e.action for e in examples])
    per_action = {}
    for action in sorted(set(actions)):
        scored = (actions == action) & ~is_gold
        if not scored.any():
            continue
        per_action[action] = _action_figures(scores, weights, scored)
        share = per_action[action]["clamped_share"]
        if config.clamp and run.scored_method != "u2a" and share > config.clamp_warning:
            warnings.append(
                f"{share:.0%} of the {action} scores are negative and count as 0, which leaves a "
                f"weight of {1 - config.strength:g} (impact.strength); corrections, a larger "
                "gold_size or impact.weights=uniform change that"
            )
    rows = [
        {
            "id": e.record_id,
            "action": e.action,
            "score": float(s),
            "weight": float(w),
            "gold": bool(g),
        }
        for e, s, w, g in zip(examples, scores.along_J, weights, is_gold, strict=True)
    ]
    summary = {
        "n_scored": int((~is_gold).sum()),
        "gold_size": gold_size,
        "normalisation": config.normalisation,
        "path": config.path,
        "curvature": {"kind": config.curvature, "solved": scores.solved},
        "per_action": per_action,
        "effective_sample_size": statistics.effective_sample_size(weights[~is_gold]),
        "stability": {
            "spearman": scores.stability(~is_gold),
            "n_examples": int((~is_gold)[scores.checked].sum()),
            "gold_sizes": [-(-gold_size // 2), gold_size // 2],
        },
        "warnings": warnings,
    }
    for warning in warnings:
        metrics.say(f"  warning: {warning}")
    for action, figures in per_action.items():
        metrics.say(
            f"  {action}: {figures['n']} scored, {figures['clamped_share']:.0%} clamped, "
            f"mean weight {figures['mean_weight']:.2f}, "
            f"rank correlation of the two gold halves {figures['stability']:.2f}"
        )
    metrics.say(
        f"  effective sample size {summary['effective_sample_size']:.0f} of {summary['n_scored']}"
    )
    records.write_json(run.workdir.path / "impact_summary.json", summary)
    records.write_jsonl(run.workdir.path / "impact.jsonl", rows)
    return {
        "scored": summary["n_scored"],
        "effective_sample_size": round(summary["effective_sample_size"], 1),
    }


def _action_figures(scores: scoring.Scores, weights: np.ndarray, of: np.ndarray) -> dict:
    along_J, half = scores.along_J[of], scores.stability(of)
    return {
        "n": len(along_J),
        "clamped_share": float((along_J <= 0).mean()),
        "mean_score": float(along_J.mean()),
        "mean_weight": float(weights[of].mean()),
        "stability": half,
        "reliability": 2 * half / (1 + half) if half > -1 else float("nan"),
    }
