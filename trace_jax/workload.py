"""How much there is to train on and to judge, counted or estimated, for `plan.py`.

Counts come from the artefacts that are there, or from the data; where the tokenizer or the triage
is missing they are estimates, and say so.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trace_jax import judges, methods, records, sources, synth, triage, validation
from trace_jax.errors import InputError
from trace_jax.sources import files
from trace_jax.stages import context

_CHARACTERS_A_TOKEN = 4.0  # of English under the tokenizers of these models
_REPLY_TOKENS = 150  # of a judge, about
_SAMPLE = 2000  # records whose tokens are counted; the rest is taken to be like them


@dataclasses.dataclass(frozen=True)
class Work:
    """What there is to train on.

    Attributes:
      records: how many there are; by_action: None before triage, when thirds are assumed.
      conflict, retain: row positions of (a sample of) the examples.
      scale: examples for every one in the sample.
      estimated: the tokens are counted without the tokenizer, or the actions assumed.
    """

    records: int
    by_action: dict[str, int] | None
    conflict: list[int]
    retain: list[int]
    scale: float
    estimated: bool


def of(run: context.Context) -> Work:
    """What the method trains on, of the records that are there."""
    triaged, by_action = _triaged(run)
    sample = triaged[:: max(1, -(-len(triaged) // _SAMPLE))]
    examples = methods.examples(
        run.config.train.method,
        sample,
        corrections={},
        weights=None,
        alpha_kl=run.config.train.alpha_kl,
        punish=run.config.train.punish,
        inner=run.config.u2a.inner,
        retain_pairs=run.config.train.retain_pairs,
    )
    if not examples:
        raise InputError("no records to plan for; see data.source")
    lengths, exact = _lengths(run, examples)
    limit = 2 * run.config.data.max_length
    kinds = [bool(e.kl) for e in examples]
    return Work(
        records=len(triaged),
        by_action=by_action,
        conflict=[min(n, limit) for n, kl in zip(lengths, kinds, strict=True) if not kl],
        retain=[min(n, limit) for n, kl in zip(lengths, kinds, strict=True) if kl],
        scale=len(triaged) / len(sample),
        estimated=not exact or by_action is None,
    )


def _triaged(run: context.Context) -> tuple[list[records.TriagedRecord], dict[str, int] | None]:
    """The triaged records; before triage, the records with actions in equal shares."""
    path = run.file("triage", "triage.jsonl")
    if path.exists() and run.workdir.finished("triage"):
        found = triage.read(path)
        return found, dict(triage.summary(found).actions)
    unknown = records.Verdict(status="abstain", probability=None, clauses={})
    actions = ("INVERT", "PUNISH", "RETAIN")
    return [
        records.TriagedRecord(record, unknown, unknown, actions[i % 3])
        for i, record in enumerate(_records(run))
    ], None


def _records(run: context.Context) -> list[records.PreferenceRecord]:
    """Those of the workdir, else of the data, else as many of the usual length as there may be."""
    data, path = run.config.data, run.file("prepare", "records.jsonl")
    if path.exists():
        return [records.PreferenceRecord.from_json(row) for _, row in records.read_jsonl(path)]
    if data.source in validation.FROM_FILE and data.path and files.is_here(data.path):
        return sources.read_records(data.path, sources.Reading.of(data, run.config.seed))[0]
    if data.source == "synth":
        rows = synth.pairs(run.config.seed, data.pairs)
        texts = [(p["prompt"], p["chosen"], p["rejected"]) for p in rows]
    else:
        texts = _assumed_texts(run)
    return [records.PreferenceRecord(str(i), *text, None) for i, text in enumerate(texts)]


def _assumed_texts(run: context.Context) -> list[tuple[str, str, str]]:
    """Where no data is here: as many pairs as there may be, of the length that is asked for."""
    config = run.config
    prompt, response = config.plan.prompt_tokens, config.plan.response_tokens
    if config.data.source == "self_sampled":
        prompt = sum(config.data.opening_tokens) / 2
        response = config.evaluate.max_new_tokens
    prompt, response = ("x" * int(_CHARACTERS_A_TOKEN * n) for n in (prompt, response))
    return [(f"{i}{prompt}", response, response + "y") for i in range(config.data.pairs)]


def _lengths(run: context.Context, examples: Sequence[methods.Example]) -> tuple[list[int], bool]:
    """Row positions of every example, and whether the tokenizer counted them."""
    path = run.config.model.path
    base = Path(path) if path else run.file("prepare", "base")
    if (base / "tokenizer.json").is_file():
        from trace_jax import batches

        dropped: list[str] = []
        _, encoded = batches.encode_examples(run.encoder, examples, on_drop=dropped.append)
        if not dropped:
            return [e.row_length for e in encoded], True
    texts = [[_text(e.prompt), _text(e.y0), _text(e.y1 or "")] for e in examples]
    return [int(sum(len(t) for t in three) / _CHARACTERS_A_TOKEN) + 2 for three in texts], False


def _text(text: records.Text) -> str:
    return text if isinstance(text, str) else "\n".join(m["content"] for m in text)


def judging(run: context.Context) -> dict[str, Any]:
    """Calls that triage still needs, each (prompt, response) once and without what the store knows.

    Returns:
      calls, tokens (from characters) and price in US dollars as `asking.price_*` has it; the judges
      that need no service make as many verdicts for nothing.
    """
    path = run.file("triage", "triage.jsonl")
    done = {row.get("id") for _, row in records.read_jsonl(path)} if path.exists() else set()
    items = [
        judges.Item(r.prompt, getattr(r, side), r.labels_of(side))
        for r in _records(run)
        if r.id not in done
        for side in ("chosen", "rejected")
    ]
    name = run.config.judge.name
    if name == "gemini" or (name == "ensemble" and "gemini" in run.config.judge.ensemble.members):
        return _asking_gemini(run, items)
    unique = {records.content_id(item.prompt, item.response) for item in items}
    return {"calls": len(unique), "tokens": 0, "price": 0.0}


def _asking_gemini(run: context.Context, items: Sequence[judges.Item]) -> dict[str, Any]:
    from trace_jax.judges import gemini, gemini_job, reading, store, template

    settings = gemini_job.Settings(**run.config.judge.gemini.to_dict())
    asking = gemini_job.Asking.of(run.config.asking.to_dict())
    path = run.store_path
    judge = reading.ReadingJudge(
        run.new_policy,
        _Unasked(gemini.identity(settings), settings.clauses_per_call),
        store.Store(path, read_only=True) if path.exists() else store.Store(":memory:"),
        reask_abstentions=run.config.asking.reask_abstentions,
    )
    questions = judge.questions(items)
    characters = sum(
        len(template.instruction(q.clauses)) + len(template.material(q.prompt, q.response))
        for q in questions
    )
    given, written = int(characters / _CHARACTERS_A_TOKEN), _REPLY_TOKENS * len(questions)
    discount = asking.batch_discount if asking.batch else 1.0
    price = discount * asking.price(given, 0, written)
    return {"calls": len(questions), "tokens": given + written, "price": price}


class _Unasked(NamedTuple):
    """A reader by name alone, for counting what it would be asked."""

    identity: Any
    clauses_per_call: int
    collective: bool = False
