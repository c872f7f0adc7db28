"""How much there is to train on and to judge, counted or estimated, for `plan.py`.

Counts come from the artefacts that are there, or from the data; where the tokenizer or the triage
is missing they are estimates, and say so. Nothing is asked, and no network is touched.
"""

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trace_jax import (
    generations,
    judges,
    methods,
    policy,
    records,
    remote,
    sources,
    synth,
    triage,
    validation,
)
from trace_jax.errors import InputError
from trace_jax.sources import files
from trace_jax.stages import context

_CHARACTERS_A_TOKEN = 4.0  # of English under the tokenizers of these models
_SAMPLE = 2000  # records whose tokens are counted; the rest is taken to be like them


@dataclasses.dataclass(frozen=True)
class Work:
    """What there is to train on.

    Attributes:
      records: how many there are; by_action: None before triage, when thirds are assumed.
      assumed: why data.pairs had to stand for their number; "" where they were counted.
      conflict, retain: row positions of (a sample of) the examples.
      scale: examples for every one in the sample.
      prompt: mean characters of a prompt. punished: prompts of PUNISH records, None before triage.
      estimated: the tokens are counted without the tokenizer, or the actions assumed.
    """

    records: int
    by_action: dict[str, int] | None
    assumed: str
    conflict: list[int]
    retain: list[int]
    scale: float
    prompt: int
    punished: int | None
    estimated: bool


def check(run: context.Context) -> None:
    """Loads both policies, and makes the judges that need no service: for a plan no key is needed.

    Raises:
      InputError: what is wrong with them, or data.path can only be a file, and is not here.
    """
    data, judge = run.config.data, run.config.judge
    for rules in (run.old_policy, run.new_policy):
        if not _asks_gemini(run):
            judges.make(judge.name, rules, judge.to_dict(), asking=run.config.asking.to_dict())
    if not _assumed(run) or data.source not in validation.FROM_FILE or not data.path:
        return
    if not remote.is_remote(data.path) and not _is_on_hub(data.path):
        raise InputError(
            f"data.path={data.path}: no such file; give one, or a data set of the hub as "
            "organisation/name (a plan without data.path assumes data.pairs records)"
        )


def _is_on_hub(path: str) -> bool:
    """Whether what is not here may be a data set of the hub, by its name."""
    return files.exists(path) and not path.lower().removesuffix(".gz").endswith(files.SUFFIXES)


def of(run: context.Context) -> Work:
    """What the method trains on, of the records that are there."""
    triaged, by_action = _triaged(run)
    sample = triaged[:: max(1, -(-len(triaged) // _SAMPLE))]
    examples = methods.examples(
        run.config.train.method,
        sample,
        corrections=_corrections(run, sample),
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
        assumed=_assumed(run),
        conflict=[min(n, limit) for n, kl in zip(lengths, kinds, strict=True) if not kl],
        retain=[min(n, limit) for n, kl in zip(lengths, kinds, strict=True) if kl],
        scale=len(triaged) / len(sample),
        prompt=sum(len(_text(t.record.prompt)) for t in sample) // len(sample),
        punished=None if by_action is None else _punished(triaged),
        estimated=not exact or by_action is None,
    )


def _punished(triaged: Sequence[records.TriagedRecord]) -> int:
    return len({records.content_id(t.record.prompt) for t in triaged if t.action == "PUNISH"})


def _triaged(run: context.Context) -> tuple[list[records.TriagedRecord], dict[str, int] | None]:
    """The triaged records; before triage, the records with actions in equal shares."""
    path = run.file("triage", "triage.jsonl")
    if path.exists() and run.workdir.finished("triage"):
        found = triage.read(path)
        return found, dict(triage.summary(found).actions)
    statuses = {
        "INVERT": ("violating", "compliant"),
        "PUNISH": ("violating", "violating"),
        "RETAIN": ("compliant", "violating"),
    }
    assumed = [
        (action, *(records.Verdict(status, None, {}) for status in of))
        for action, of in statuses.items()
    ]
    found = []
    for i, record in enumerate(_records(run)):
        action, chosen, rejected = assumed[i % 3]
        found.append(records.TriagedRecord(record, chosen, rejected, action))
    return found, None


def _corrections(
    run: context.Context, sample: Sequence[records.TriagedRecord]
) -> dict[str, records.Text]:
    """Those that were made; before that every PUNISH record has one, as long as its response."""
    if run.workdir.finished("correct"):
        return run.corrections
    if run.config.correct.source == "none":
        return {}
    return {t.record.id: t.record.rejected for t in sample if t.action == "PUNISH"}


def _records(run: context.Context) -> list[records.PreferenceRecord]:
    """Those of the workdir, else of the data, else as many of the usual length as there may be."""
    data, path = run.config.data, run.file("prepare", "records.jsonl")
    if path.exists():
        return [records.PreferenceRecord.from_json(row) for _, row in records.read_jsonl(path)]
    if data.source in validation.FROM_FILE and data.path and files.is_here(data.path):
        return sources.read_records(data.path, sources.Reading.of(data, run.config.seed))[0]
    if data.source == "parent":
        return list({r.id: r for r in generations.relabelled(Path(run.config.parent))}.values())
    if data.source == "synth":
        rows = synth.pairs(run.config.seed, data.pairs)
        texts = [(p["prompt"], p["chosen"], p["rejected"]) for p in rows]
    else:
        texts = _assumed_texts(run)
    return [records.PreferenceRecord(str(i), *text, None) for i, text in enumerate(texts)]


def _assumed(run: context.Context) -> str:
    """Why `_records` had to assume them, "" where it had not."""
    data = run.config.data
    if run.file("prepare", "records.jsonl").exists() or data.source in ("parent", "synth"):
        return ""
    if data.source == "self_sampled":
        return "the model has not written them"
    if data.path and files.is_here(data.path):
        return ""
    return "data.path was not read" if data.path else "data.path is not given"


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
    if _asks_gemini(run):
        return _asking_gemini(run, items)
    unique = {records.content_id(item.prompt, item.response) for item in items}
    return {"calls": len(unique), "tokens": 0, "price": 0.0}


def _asks_gemini(run: context.Context) -> bool:
    judge = run.config.judge
    members = judge.ensemble.members if judge.name == "ensemble" else (judge.name,)
    return "gemini" in members


def _asking_gemini(run: context.Context, items: Sequence[judges.Item]) -> dict[str, Any]:
    from trace_jax.judges import gemini, reading, store, template

    settings = _settings(run)
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
    written = sum(settings.reply_tokens(len(q.clauses)) for q in questions)
    return _priced(run, settings.model, len(questions), characters, written)


def _settings(run: context.Context) -> Any:
    from trace_jax.judges import gemini_job

    return gemini_job.Settings(**run.config.judge.gemini.to_dict())


def _priced(
    run: context.Context,
    model: str,
    calls: int,
    characters: int,
    written: int,
    *,
    batch: bool = True,
) -> dict[str, Any]:
    """characters, written: of all calls, and tokens of all replies. batch: they may go as one."""
    from trace_jax.judges import gemini_job

    asking = gemini_job.Asking.of(run.config.asking.to_dict())
    gemini_job.check_prices(model, asking)
    given = int(characters / _CHARACTERS_A_TOKEN)
    discount = asking.batch_discount if asking.batch and batch else 1.0
    price = discount * asking.price(given, 0, written)
    return {"calls": calls, "tokens": given + written, "price": price}


def judging_later(run: context.Context, work: Work) -> dict[str, dict[str, Any]]:
    """What the other stages that are open ask, at most: repeated answers and the store not known.

    Returns:
      "judge, STAGE" or "writer, STAGE" -> as `judging`; what depends on the triage is None before
      it, and "each" has what every prompt of a PUNISH record may take.
    """
    config, correct = run.config, run.config.correct
    prompts = _held_out(run)
    both = run.new_policy, run.old_policy
    answers = sum(prompts.values()) * (config.evaluate.samples + 1)  # samples and a greedy one
    train, every = config.train, config.train.evaluate_every
    looks = len(range(every, train.total_steps, every)) + train.keep_best if every else 0
    looked_at = min(train.evaluate_prompts, prompts.get("validation", 0)) * config.evaluate.samples
    sampled = config.data.openings * config.data.continuations
    asked = {
        "prepare": (sampled * (config.data.source == "self_sampled"), (run.old_policy,)),
        "baseline": (answers * (1 + run.has_ref), both),
        "train": (looks * looked_at, both),
        "evaluate": (answers, both),
    }
    length = config.evaluate.max_new_tokens
    found = {
        f"judge, {stage}": _most(run, n, policies, work.prompt, length)
        for stage, (n, policies) in asked.items()
        if n and not run.workdir.finished(stage)
    }
    if correct.source == "none" or work.punished == 0 or run.workdir.finished("correct"):
        return found
    length = correct.max_new_tokens
    a_prompt = {"judge, correct": _most(run, correct.tries, both[:1], work.prompt, length)}
    if correct.source == "gemini":
        a_prompt["writer, correct"] = _writing(run, correct.tries, work.prompt)
    for who, asked in a_prompt.items():
        if work.punished is None:
            found[who] = dict.fromkeys(asked) | {"each": asked}
        else:
            found[who] = {name: work.punished * n for name, n in asked.items()}
    return found


def _held_out(run: context.Context) -> dict[str, int]:
    """Split that is evaluated -> held-out prompts: those there, or as many as there may be."""
    path, data = run.file("prepare", "prompts.jsonl"), run.config.data
    if path.exists():
        found = collections.Counter(row["split"] for _, row in records.read_jsonl(path))
    else:
        found = {"validation": data.validation_prompts, "test": data.test_prompts}
    return {split: found[split] for split in run.config.evaluate.splits}


def _most(
    run: context.Context,
    items: int,
    rules: Sequence[policy.Policy],
    prompt: int,
    response: int,
) -> dict[str, Any]:
    """For so many answers under each policy; prompt in characters, response in tokens."""
    if not _asks_gemini(run):
        return {"calls": items * len(rules), "tokens": 0, "price": 0.0}
    from trace_jax.judges import template

    material = template.material("x" * prompt, "x" * int(_CHARACTERS_A_TOKEN * response))
    settings = _settings(run)
    calls = characters = written = 0
    for clauses in (of.clauses for of in rules):
        size = settings.clauses_per_call or len(clauses)
        parts = [clauses[i : i + size] for i in range(0, len(clauses), size)]
        calls += len(parts)
        characters += sum(len(template.instruction(part)) + len(material) for part in parts)
        written += sum(settings.reply_tokens(len(part)) for part in parts)
    return _priced(run, settings.model, *(items * n for n in (calls, characters, written)))


def _writing(run: context.Context, proposals: int, prompt: int) -> dict[str, Any]:
    """Of corrections that Gemini writes."""
    from trace_jax.writers import gemini, instruction

    config = run.config.correct
    one = len(instruction.system(run.new_policy)) + len(instruction.material("x" * prompt))
    reply = gemini.longest(config.max_new_tokens, config.gemini_thinking_tokens)
    model = config.gemini_model
    return _priced(run, model, *(proposals * n for n in (1, one, reply)), batch=False)


class _Unasked(NamedTuple):
    """A reader by name alone, for counting what it would be asked."""

    identity: Any
    clauses_per_call: int
    collective: bool = False
