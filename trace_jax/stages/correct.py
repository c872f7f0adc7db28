"""Stage correct: y_c for PUNISH records, proposed by a writer, kept when the judge agrees."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from trace_jax import judges, metrics, predicates, processes, records, respond, writers
from trace_jax.evaluate import guard
from trace_jax.stages import context

Candidate = tuple[str, records.Text, str]  # prompt id, prompt, proposal

_FOUND = "corrections_found.jsonl"  # an interrupted search goes on from here
_PROPOSALS = "corrections_proposals.jsonl"  # what a paid writer wrote; --redo asks for the rest


@dataclasses.dataclass(frozen=True)
class _Annotated(respond.Prompt):
    """A prompt with the data set's annotations of it, which clauses may ask for."""

    labels: Mapping[str, Any]


def run(run: context.Context) -> dict:
    """Writes corrections.jsonl: {"id", "response" or null, "tries"} per PUNISH record.

    Rejection sampling per prompt: rounds of proposals, of which one that is compliant (and, by
    correct.guard, not degenerate) stays: the first, or the one that the judge is surest of.
    """
    path = run.workdir.path / "corrections.jsonl"
    punished = [t.record for t in run.triaged if t.action == "PUNISH"]
    if run.config.correct.source == "none" or not punished:
        records.write_jsonl(path, [])
        return {"corrected": 0, "of": len(punished)}
    writer = _writer(run)
    by_prompt = {records.content_id(r.prompt): r.prompt for r in punished}
    labels = _labels(run, by_prompt)
    prompts = [_Annotated(i, x, labels[i]) for i, x in by_prompt.items()]
    found, tries, failed, unjudged = _search(run, writer, prompts)
    rows = []
    for record in punished:
        key = records.content_id(record.prompt)
        rows.append({"id": record.id, "response": found.get(key), "tries": tries[key]})
    records.write_jsonl(path, rows)
    lost, open_ = (sum(of[i] > 0 for i in of.keys() - found.keys()) for of in (failed, unjudged))
    _tell_failed("proposals", sum(failed.values()), lost)
    _tell_failed("verdicts on proposals", sum(unjudged.values()), open_)
    return _told(writer, rows, len(found), sum(tries.values())) | {
        "failed_proposals": sum(failed.values()),
        "failed_prompts": lost,
        "judge_errors": open_,
    }


def _labels(run: context.Context, prompts: Collection[str]) -> dict[str, dict[str, Any]]:
    """Prompt id -> annotations of the prompt, of all records on it; triage.jsonl has none."""
    found: dict[str, dict[str, Any]] = {name: {} for name in prompts}
    for _, row in records.read_jsonl(run.file("prepare", "records.jsonl")):
        record = records.PreferenceRecord.from_json(row)
        key = records.content_id(record.prompt)
        if key in found:
            found[key] |= record.labels_of("prompt")
    return found


def _tell_failed(what: str, n: int, prompts: int) -> None:
    """prompts: those without a correction that they were for."""
    if n:
        metrics.say(
            f"  warning: {n} {what} failed after every try, and {prompts} prompts that they were "
            "for have no correction"
            + ("; run again with --redo to ask for them again" if prompts else "")
        )


def _told(writer: writers.Writer, rows: Sequence[dict], n_found: int, n_tries: int) -> dict:
    corrected = sum(row["response"] is not None for row in rows)
    price = processes.from_first(writer.price)
    cost = f", {price:.4f} US dollars" if price else ""
    kept = f"one of {n_tries / max(1, n_found):.1f} proposals kept{cost}"
    metrics.say(
        f"  {writer.name} wrote corrections for {corrected} of {len(rows)} PUNISH records ({kept})"
        "; dual NPO for the others"
    )
    return {
        "corrected": corrected,
        "of": len(rows),
        "writer": writer.name,
        "proposals": n_tries,
        "kept": n_found,
        "price": price,
    }


def _writer(run: context.Context) -> writers.Writer:
    config = run.config.correct
    if config.source == "gemini":
        return _gemini(run)
    from trace_jax.writers import sampled

    sampling = {
        "seed": run.config.seed + 1,  # other samples than the records' own continuations
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "batch_rows": run.config.evaluate.batch_rows,
    }
    if config.source == "self":
        module = run.base if config.writer == "base" else run.ref
        return sampled.SampledWriter(
            config.writer, module, run.encoder, stop_ids=run.stop_ids, **sampling
        )
    from trace_jax import encoding

    module, tokenizer = run.load_other(config.local_model, config.local_dtype)
    stop_ids = tuple(module.config.eos_token_ids) or (tokenizer.eos_token_id,)
    encoder = encoding.Encoder(tokenizer, max_length=1 << 30, end_id=None)  # never cut
    return sampled.SampledWriter(
        config.local_model,
        module,
        encoder,
        stop_ids=stop_ids,
        as_asked=_instructed(run, tokenizer) if config.instruct else None,
        **sampling,
    )


def _instructed(run: context.Context, tokenizer):
    from trace_jax.writers import instruction

    made = instruction.chat if tokenizer.chat_template else instruction.plain
    return lambda prompt: made(run.new_policy, prompt)


def _gemini(run: context.Context) -> writers.Writer:
    from trace_jax.judges import gemini_job, store
    from trace_jax.writers import gemini

    config = run.config.correct
    settings = gemini_job.Settings(
        model=config.gemini_model,
        temperature=config.temperature,
        max_output_tokens=config.max_new_tokens,
        thinking_tokens=config.gemini_thinking_tokens,
        clauses_per_call=0,
    )
    return gemini.GeminiWriter(
        run.new_policy,
        settings,
        gemini_job.Asking.of(run.config.asking.to_dict()),
        store.Store(run.store_path if processes.is_first() else ":memory:"),
        run.workdir.path / _PROPOSALS,
    )


def _search(
    run: context.Context, writer: writers.Writer, prompts: list[respond.Prompt]
) -> tuple[dict[str, str], dict[str, int], dict[str, int], dict[str, int]]:
    """Prompt id -> the proposal that stays, how many there were, how many of them failed, and how
    many the judge failed on."""
    config = run.config.correct
    tries = dict.fromkeys((p.id for p in prompts), 0)
    failed, unjudged = dict(tries), dict(tries)
    kept = run.workdir.path / _FOUND
    with (
        records.JsonlAppender(kept) as out,
        run.progress(len(prompts), f"corrections written by {writer.name}", len(out.ids)) as bar,
    ):
        rows = [row for _, row in records.read_jsonl(kept)]
        found = {row["id"]: row["response"] for row in rows}
        tries |= {row["id"]: row["tries"] for row in rows}
        while still := [p for p in prompts if p.id not in found and tries[p.id] < config.tries]:
            first, n = tries[still[0].id], config.samples_per_round
            n = min(n, config.tries - first)
            samples = writer.write(still, first=first, n=n)
            accepted = _accepted(run, still, samples, unjudged)
            found |= accepted
            for p, of_prompt in zip(still, samples, strict=True):
                tries[p.id] += n
                failed[p.id] += of_prompt.count(None)
            out.append({"id": i, "response": y, "tries": tries[i]} for i, y in accepted.items())
            bar.advance(len(accepted))
    return found, tries, failed, unjudged


def _accepted(
    run: context.Context,
    prompts: list[respond.Prompt],
    samples: list[list[str | None]],
    unjudged: dict[str, int],
) -> dict[str, str]:
    """Prompt id -> the proposal of this round that stays.

    unjudged: prompt id -> proposals on which the judge failed; counted on.
    """
    items = [
        (p.id, p.prompt, s)
        for p, of_prompt in zip(prompts, samples, strict=True)
        for s in of_prompt
        if s and s.strip()
    ]
    labels = {p.id: p.labels for p in prompts if isinstance(p, _Annotated)}
    verdicts = run.triage_judge.judge(
        [judges.Item(prompt, s, labels.get(i, predicates.NO_LABELS)) for i, prompt, s in items]
    )
    for verdict, (prompt_id, *_) in zip(verdicts, items, strict=True):
        unjudged[prompt_id] += verdict.status == "error"
    complying = [(v.p_compliant, x) for x, v in zip(items, verdicts, strict=True) if v.compliant]
    if run.config.correct.pick == "best":  # stable: of equals the first
        complying.sort(key=lambda pair: -pair[0])
    compliant = [item for _, item in complying]
    if run.config.correct.guard and compliant:
        compliant = _plausible(run, compliant)
    kept: dict[str, str] = {}
    for prompt_id, _, sample in compliant:
        kept.setdefault(prompt_id, sample)
    return kept


def _plausible(run: context.Context, items: list[Candidate]) -> list[Candidate]:
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
