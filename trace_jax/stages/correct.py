"""Stage correct: y_c for PUNISH records, written by the model, kept when the judge agrees."""

from trace_jax import judges, metrics, records, respond, workdir
from trace_jax.evaluate import guard
from trace_jax.stages import context


def run(run: context.Context) -> dict:
    """Writes corrections.jsonl: {"id", "response" or null, "tries"} per PUNISH record.

    Rejection sampling per prompt: rounds of samples, the first that is compliant (and, by
    correct.guard, not degenerate) stays.
    """
    path = run.workdir.path / "corrections.jsonl"
    punished = [t.record for t in run.triaged if t.action == "PUNISH"]
    if run.config.correct.source == "none" or not punished:
        records.write_jsonl(path, [])
        return {"corrected": 0, "of": len(punished)}
    by_prompt = {records.content_id(r.prompt): r.prompt for r in punished}
    found, tries = _search(run, [respond.Prompt(i, text) for i, text in by_prompt.items()])
    rows = []
    for record in punished:
        key = records.content_id(record.prompt)
        rows.append({"id": record.id, "response": found.get(key), "tries": tries[key]})
    records.write_jsonl(path, rows)
    workdir.remove(run.workdir.path / "corrections_found.jsonl")
    corrected = sum(row["response"] is not None for row in rows)
    metrics.say(
        f"  corrections for {corrected} of {len(rows)} PUNISH records; dual NPO for the others"
    )
    return {"corrected": corrected, "of": len(rows)}


def _search(
    run: context.Context, prompts: list[respond.Prompt]
) -> tuple[dict[str, str], dict[str, int]]:
    config = run.config.correct
    writer = run.base if config.writer == "base" else run.ref
    tries = dict.fromkeys((p.id for p in prompts), 0)
    kept = run.workdir.path / "corrections_found.jsonl"  # an interrupted search goes on from here
    with (
        records.JsonlAppender(kept) as out,
        run.progress(len(prompts), f"corrections written by {config.writer}", len(out.ids)) as bar,
    ):
        rows = [row for _, row in records.read_jsonl(kept)]
        found = {row["id"]: row["response"] for row in rows}
        tries |= {row["id"]: row["tries"] for row in rows}
        while still := [p for p in prompts if p.id not in found and tries[p.id] < config.tries]:
            samples = respond.respond(
                writer,
                still,
                run.encoder,
                seed=run.config.seed + 1,  # other samples than the records' own continuations
                samples=config.samples_per_round,
                first_sample=tries[still[0].id],
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                stop_ids=run.stop_ids,
                batch_rows=run.config.evaluate.batch_rows,
            )
            accepted = _first_accepted(run, still, samples)
            found |= accepted
            for p in still:
                tries[p.id] += config.samples_per_round
            out.append({"id": i, "response": y, "tries": tries[i]} for i, y in accepted.items())
            bar.advance(len(accepted))
    return found, tries


def _first_accepted(
    run: context.Context, prompts: list[respond.Prompt], samples: list[list[str]]
) -> dict[str, str]:
    items = [
        (p.id, p.prompt, s)
        for p, of_prompt in zip(prompts, samples, strict=True)
        for s in of_prompt
    ]
    labels = {
        records.content_id(t.record.prompt): t.record.labels_of("prompt") for t in run.triaged
    }
    verdicts = run.judge.judge([judges.Item(prompt, s, labels[i]) for i, prompt, s in items])
    compliant = [item for item, v in zip(items, verdicts, strict=True) if v.compliant]
    if run.config.correct.guard and compliant:
        compliant = _plausible(run, compliant)
    first: dict[str, str] = {}
    for prompt_id, _, sample in compliant:
        first.setdefault(prompt_id, sample)
    return first


def _plausible(run: context.Context, items: list[tuple]) -> list[tuple]:
    """Those that pass the degeneracy guard under the base model."""
    thresholds = guard.Guard.from_json(records.read_json(run.file("baseline", "guard.json")))
    config = run.config
    row_length = max(config.data.row_length, 64 * -(-config.data.max_length // 64))
    logp = respond.mean_logprobs(
        run.base,
        [(prompt, s) for _, prompt, s in items],
        run.encoder,
        micro_rows=config.evaluate.micro_rows,
        row_length=row_length,
    )
    return [
        item for item, value in zip(items, logp, strict=True) if thresholds.passes(item[2], value)
    ]
