"""Stage train: the chosen method's examples, minimised from M_ref."""

import hashlib
import json

from trace_jax import feed, fit, metrics, records
from trace_jax.stages import context, pauses


def run(run: context.Context) -> dict:
    """Writes checkpoints/, metrics.jsonl and pauses.jsonl; goes on from the newest checkpoint."""
    method = run.config.train.method
    rows = (row for _, row in records.read_jsonl(run.file("impact", "impact.jsonl")))
    weights = {(row["id"], row["action"]): row["weight"] for row in rows}
    weighed_again = bool(run.config.train.refresh_every and run.scored_method != "u2a")
    examples = run.examples(method, weights, with_zeros=weighed_again)
    dropped: list[str] = []
    fitted = fit.fit(
        run.ref,
        examples,
        run.settings("train"),
        encoder=run.encoder,
        directory=run.workdir.path / "checkpoints",
        metrics_path=run.workdir.path / "metrics.jsonl",
        on_drop=run.on_drop(dropped),
        progress=run.progress,
        pauses=pauses.Pauses(run),
        kept_reference=_shared_reference(run),
    )
    run.trained = fitted.module
    if dropped:
        metrics.say(f"  {len(dropped)} examples too long, dropped: {', '.join(dropped[:10])}")
    ended = {} if fitted.stopped_at is None else {"stopped_at": fitted.stopped_at}
    if run.config.train.keep_best:
        ended["kept_step"] = fitted.kept_step
        metrics.say(f"  kept: step {fitted.kept_step} of {run.config.train.total_steps}")
    return ended | {
        "examples": len(examples),
        "dropped": len(dropped),
        "truncated_prompts": run.encoder.truncated_prompts,
        "truncated_responses": run.encoder.truncated_responses,
        "control_texts": run.encoder.control_texts,
        "real_token_share": round(fitted.real_token_share, 4),
    }


def _shared_reference(run: context.Context) -> feed.Kept | None:
    """Where runs of a comparison share log-probs under their M_ref; None where none is shared."""
    shared = run.workdir.of("align")
    if shared is run.workdir:
        return None
    made = json.dumps([shared.finished(stage) for stage in ("prepare", "align")], sort_keys=True)
    return feed.Kept(
        shared.path / "compare" / ".reference", hashlib.sha256(made.encode()).hexdigest()
    )
