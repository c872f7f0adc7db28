"""Stage impact: the gold batch, g_J, a score for every conflict and the weights made of them.

The gold batch is drawn once and used as two halves, A and B. By linearity the score along g_J is
the mean of the scores along the halves' gradients, and how far the halves agree tells how reliable
it is (Spearman-Brown, for the whole batch).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trace_jax import (
    batches,
    encoding,
    fit,
    impact,
    logprobs,
    methods,
    metrics,
    records,
    sharding,
    train,
)
from trace_jax.evaluate import statistics
from trace_jax.stages import context


def run(run: context.Context) -> dict:
    """Writes gold.json, impact.jsonl and impact_summary.json."""
    method = run.scored_method
    examples = methods.examples(
        method or "trace",
        run.triaged,
        corrections=run.corrections,
        weights=None,
        alpha_kl=0.0,
        punish=run.config.train.punish,
        with_masses=False,  # the score of a loss does not depend on how often it counts
    )
    if method is None:
        return _uniform(run, examples)
    dropped: list[str] = []
    examples, encoded = batches.encode_examples(run.encoder, examples, on_drop=run.on_drop(dropped))
    gold, warnings = impact.draw_gold(
        run.fitting, run.corrections, size=run.config.impact.gold_size, seed=run.config.seed
    )
    _write_gold(run, gold)
    scores_nG = _scores(run, examples, encoded, gold)
    return _write(run, examples, scores_nG, {e.record_id for e in gold}, len(gold), warnings)


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


def _scores(run: context.Context, examples, encoded, gold) -> np.ndarray:
    """Scores of `examples` along the gradients of both gold halves, [n, 2]."""
    settings = run.settings("train")
    graphdef, params, frozen = nnx.split(
        fit.adapted(run.ref, settings), fit.trainable(settings), ...
    )
    row_length = run.config.data.row_length or fit.longest_row(encoded)
    halves = [gold[::2], gold[1::2]]
    gradients = [
        _gold_gradient(run, half, graphdef, params, frozen, row_length) for half in halves if half
    ]
    path = run.config.impact.path
    if path == "jvp":
        return _by_response(run, examples, gradients, graphdef, params, frozen)
    by_loss = impact.loss_derivatives if path == "jvp_losses" else impact.per_example_gradient_dots
    one_a_row = path == "vmap_grad"
    scores = [
        _by_example(run, examples, encoded, g, graphdef, params, frozen, by_loss, one_a_row)
        for g in gradients
    ]
    return np.stack(scores, axis=-1)


def _gold_gradient(
    run: context.Context, half, graphdef, params, frozen, row_length: int
) -> nnx.State:
    config = run.config.impact
    encoded = [run.encoder.encode(e.prompt, [e.y0, e.y1], e.record_id) for e in half]
    row_length = max(row_length, fit.longest_row(encoded))
    ref = logprobs.of_texts(run.ref, encoded, row_length=row_length, micro_rows=config.micro_rows)
    plan = batches.PackPlan(
        [e.row_length for e in encoded],
        per_step=len(half),
        total_steps=1,
        seed=run.config.seed,
        row_length=row_length,
        micro_rows=config.micro_rows * sharding.shards_in_context(),
    )
    step = batches.Step(conflict=batches.StepSource(plan, encoded, half, ref)[0], retain=None)
    options = _options(run, n_conflict=len(half))
    hyper = run.settings("train").hyper()._replace(beta=jnp.float32(config.gold_beta))
    return impact.objective_gradient(
        params, frozen, sharding.place_rows(step), hyper, graphdef=graphdef, options=options
    )


def _options(run: context.Context, n_conflict: int) -> train.Options:
    return dataclasses.replace(
        run.settings("train").options(), preference="logistic", n_conflict=n_conflict
    )


def _by_response(run: context.Context, examples, gradients, graphdef, params, frozen) -> np.ndarray:
    """Path jvp: one derivative per unique (prompt, response), then the closed form."""
    keys, encoded = _unique_responses(run, examples)
    tangents = jax.tree.map(lambda *g: jnp.stack(g), *gradients)
    config, settings = run.config, run.settings("train")

    def compute(rows: batches.Rows, n_responses: int):
        return impact.response_derivatives(
            params, frozen, tangents, rows, graphdef=graphdef, n_responses=n_responses
        )

    with run.progress(len(encoded), "impact scores") as bar:
        d_n2G = logprobs.map_packed(
            compute,
            encoded,
            row_length=config.data.row_length or fit.longest_row(encoded),
            micro_rows=config.impact.micro_rows,
            progress=bar.advance,
        )
    d = {key: d_n2G[i, b] for i, of_row in enumerate(keys) for b, key in enumerate(of_row)}
    n_tokens = {
        key: len(encoded[i].branches[b]) - encoded[i].skip[b]
        for i, of_row in enumerate(keys)
        for b, key in enumerate(of_row)
    }

    def scored(e: methods.Example) -> np.ndarray:
        k0 = _key(e.prompt, e.y0)
        k1 = k0 if e.y1 is None else _key(e.prompt, e.y1)
        return impact.score(
            e,
            d[k0],
            d[k1],
            options=settings.options(),
            beta=settings.beta,
            tau=settings.tau,
            lengths=(n_tokens[k0], n_tokens[k1]),
        )

    return np.stack([scored(e) for e in examples])


def _unique_responses(
    run: context.Context, examples
) -> tuple[list[list[str]], list[encoding.Encoded]]:
    """Every (prompt, response) once, two of a prompt to a row: their keys and tokens."""
    by_prompt: dict[str, dict[str, tuple]] = {}
    for e in examples:
        responses = by_prompt.setdefault(records.content_id(e.prompt), {})
        for y in (e.y0, e.y1):
            if y is not None:
                responses[_key(e.prompt, y)] = (e.prompt, y, e.record_id)
    keys, encoded = [], []
    for responses in by_prompt.values():
        items = list(responses.items())
        for pair in (items[i : i + 2] for i in range(0, len(items), 2)):
            keys.append([key for key, _ in pair])
            prompt, _, name = pair[0][1]
            encoded.append(run.encoder.encode(prompt, [y for _, (_, y, _) in pair], name))
    return keys, encoded


def _key(prompt: records.Text, response: records.Text) -> str:
    return records.content_id(prompt, response)


def _by_example(
    run, examples, encoded, gradient, graphdef, params, frozen, by_loss, one_a_row: bool
) -> np.ndarray:
    """Paths jvp_losses and vmap_grad: derivatives of the per-example losses themselves."""
    config, settings = run.config, run.settings("train")
    row_length = fit.longest_row(encoded)
    ref = logprobs.of_texts(
        run.ref, encoded, row_length=row_length, micro_rows=config.impact.micro_rows
    )
    if one_a_row:
        rows = [[i] for i in range(len(encoded))]
        micro_rows = config.impact.micro_rows * sharding.shards_in_context()
        layout = batches.Layout(micro_rows, row_length, 1, 1)
        groups = [rows[i : i + layout.n_rows] for i in range(0, len(rows), layout.n_rows)]
    else:
        layout, groups = logprobs.packed_groups(
            encoded, row_length=row_length, micro_rows=config.impact.micro_rows
        )
    out = np.zeros(len(encoded))
    with run.progress(len(encoded), "impact scores") as bar:
        for group in groups:
            batch = sharding.place_rows(batches.make_batch(group, layout, encoded, examples, ref))
            values = by_loss(
                params,
                frozen,
                gradient,
                batch,
                settings.hyper(),
                graphdef=graphdef,
                options=settings.options(),
            )
            flat = np.asarray(values).reshape(layout.n_rows, layout.slots)
            for r, members in enumerate(group):
                out[members] = flat[r, : len(members)]
            bar.advance(sum(len(members) for members in group))
    return out


def _write(
    run, examples, scores_nG: np.ndarray, gold_ids: set[str], gold_size: int, warnings: list[str]
) -> dict:
    config = run.config.impact
    scores = scores_nG.mean(axis=1)
    is_gold = np.array([e.record_id in gold_ids for e in examples])
    actions = np.array([e.action for e in examples])
    weights = np.zeros(len(examples))
    weights[~is_gold] = impact.weights(scores[~is_gold], normalisation=config.normalisation)
    per_action = {}
    for action in sorted(set(actions)):
        scored = (actions == action) & ~is_gold
        if not scored.any():
            continue
        weights[(actions == action) & is_gold] = weights[scored].mean()
        per_action[action] = _action_figures(scores_nG[scored], weights[scored])
        if per_action[action]["clamped_share"] > config.clamp_warning:
            warnings.append(
                f"{per_action[action]['clamped_share']:.0%} of the {action} scores are negative "
                "and clamped to weight 0; that action hardly trains (corrections, a larger "
                "gold_size or impact.weights=uniform change that)"
            )
    rows = [
        {
            "id": e.record_id,
            "action": e.action,
            "score": float(s),
            "weight": float(w),
            "gold": bool(g),
        }
        for e, s, w, g in zip(examples, scores, weights, is_gold, strict=True)
    ]
    halves = scores_nG[~is_gold]
    summary = {
        "n_scored": int((~is_gold).sum()),
        "gold_size": gold_size,
        "normalisation": config.normalisation,
        "path": config.path,
        "per_action": per_action,
        "effective_sample_size": statistics.effective_sample_size(weights[~is_gold]),
        "stability": {
            "spearman": statistics.spearman(halves[:, 0], halves[:, -1]),
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


def _action_figures(scores_nG: np.ndarray, weights: np.ndarray) -> dict:
    scores = scores_nG.mean(axis=1)
    half = statistics.spearman(scores_nG[:, 0], scores_nG[:, -1])
    return {
        "n": len(scores),
        "clamped_share": float((scores <= 0).mean()),
        "mean_score": float(scores.mean()),
        "mean_weight": float(weights.mean()),
        "stability": half,
        "reliability": 2 * half / (1 + half) if half > -1 else float("nan"),
    }
