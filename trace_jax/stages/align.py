"""Stage align: M_ref, the base model after DPO on the records as they are."""

from trace_jax import fit, methods, metrics, models, processes, records
from trace_jax.stages import context


def run(run: context.Context) -> dict:
    """Writes `ref/` in Hugging Face layout; without align.enabled it only says who M_ref is."""
    target = run.workdir.path / "ref"
    if not run.config.align.enabled:
        if processes.is_first():
            target.mkdir(exist_ok=True)
            text = f"M_ref is the model at {run.ref_directory} (align.enabled=False).\n"
            (target / "README.md").write_text(text)
        return {"aligned": False}
    found = [
        records.PreferenceRecord.from_json(row)
        for _, row in records.read_jsonl(run.file("prepare", "records.jsonl"))
    ]
    examples = [methods.Example(r.id, "", r.prompt, r.chosen, r.rejected, pref=1.0) for r in found]
    dropped: list[str] = []
    fitted = fit.fit(
        run.base,
        examples,
        run.settings("align"),
        encoder=run.encoder,
        directory=run.workdir.path / "ref_checkpoints",
        metrics_path=run.workdir.path / "ref_checkpoints" / "metrics.jsonl",
        on_drop=run.on_drop(dropped),
        progress=run.progress,
    )
    if dropped:
        metrics.say(f"  {len(dropped)} records too long, dropped: {', '.join(dropped[:10])}")
    models.save(fitted.module, target, tokenizer=run.tokenizer)
    return {
        "aligned": True,
        "dropped": len(dropped),
        "truncated_prompts": run.encoder.truncated_prompts,
        "truncated_responses": run.encoder.truncated_responses,
        "control_texts": run.encoder.control_texts,
        "real_token_share": round(fitted.real_token_share, 4),
    }
