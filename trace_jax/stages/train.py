"""Stage train: the chosen method's examples, minimised from M_ref."""

from trace_jax import fit, methods, metrics, records
from trace_jax.stages import context


def run(run: context.Context) -> dict:
    """Writes checkpoints/ and metrics.jsonl; goes on from the newest checkpoint."""
    config = run.config.train
    rows = (row for _, row in records.read_jsonl(run.file("impact", "impact.jsonl")))
    examples = methods.examples(
        config.method,
        run.triaged,
        corrections=run.corrections,
        weights={(row["id"], row["action"]): row["weight"] for row in rows},
        alpha_kl=config.alpha_kl,
        punish=config.punish,
    )
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
    )
    run.trained = fitted.module
    if dropped:
        metrics.say(f"  {len(dropped)} examples too long, dropped: {', '.join(dropped[:10])}")
    return {
        "examples": len(examples),
        "dropped": len(dropped),
        "truncated_prompts": run.encoder.truncated_prompts,
        "truncated_responses": run.encoder.truncated_responses,
        "real_token_share": round(fitted.real_token_share, 4),
    }
