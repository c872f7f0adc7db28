"""Generate, judge and score a model's responses: shared by baseline and evaluate."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trace_jax import judges, metrics, records, respond, triage, workdir
from trace_jax.evaluate import choices, compliance
from trace_jax.stages import context

PARTIAL = ".responses"  # rows already made by a stage that was interrupted


def rows_of(run: context.Context, module, model: str, split: str) -> list[dict]:
    """Judged rows of `module`: samples at temperature and a greedy one, every prompt of a split.

    Each part is kept as it is made, so an interrupted stage does not make it again.
    """
    rows = []
    for mode in ("sample", "greedy"):
        kept = partial(run) / f"{model}-{split}-{mode}.jsonl"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            prompts = [p for p in run.prompts if p["split"] == split]
            texts = kept.with_suffix(".texts.json")  # the judge may fail; what was made stays
            if not texts.exists():
                records.write_json(texts, _answers(run, module, model, prompts, mode))
            made = _judged(run, model, prompts, mode, records.read_json(texts))
            records.write_jsonl(kept, made)
            workdir.remove(texts)
        rows += [row for _, row in records.read_jsonl(kept)]
    return rows


def partial(run: context.Context) -> Path:
    """Where `rows_of` keeps parts."""
    return run.workdir.path / PARTIAL


def make_rows(
    run: context.Context, module, model: str, prompts: Sequence[dict], mode: str
) -> list[dict]:
    """Judged rows of `module` on prompts, in one mode."""
    return _judged(run, model, prompts, mode, _answers(run, module, model, prompts, mode))


def _answers(
    run: context.Context, module, model: str, prompts: Sequence[dict], mode: str
) -> list[list[str]]:
    config = run.config.evaluate
    samples, temperature = (config.samples, config.temperature) if mode == "sample" else (1, 0.0)
    with run.progress(len(prompts) * samples, f"{model}: {mode}") as bar:
        return respond.respond(
            module,
            [respond.Prompt(p["id"], p["prompt"]) for p in prompts],
            run.encoder,
            seed=run.config.seed,
            samples=samples,
            max_new_tokens=config.max_new_tokens,
            temperature=temperature,
            stop_ids=run.stop_ids,
            batch_rows=config.batch_rows,
            progress=bar.advance,
        )


def _judged(
    run: context.Context, model: str, prompts: Sequence[dict], mode: str, answers: list[list[str]]
) -> list[dict]:
    return compliance.judged_rows(
        prompts,
        answers,
        model=model,
        mode=mode,
        judge=run.judge,
        old_judge=run.old_judge,
        mean_logprobs=base_logprobs(run, prompts, answers),
    )


def told_undecided(rows: Sequence[dict]) -> dict[str, int]:
    """`compliance.undecided`, with a warning where a judge failed: it counts as not compliant."""
    found = compliance.undecided(rows)
    if found["judge_errors"]:
        metrics.say(
            f"  warning: {found['judge_errors']} verdicts are missing after every try and count as "
            "not compliant; run again with --redo to ask them again"
        )
    return found


def base_logprobs(
    run: context.Context, prompts: list[dict], responses: list[list[str]]
) -> np.ndarray:
    """Mean log-prob per token under the base model, flat."""
    pairs = [
        (p["prompt"], r) for p, of_prompt in zip(prompts, responses, strict=True) for r in of_prompt
    ]
    return likelihood(run, run.base, pairs, "likelihood under the base model")


def likelihood(
    run: context.Context, module, pairs: list[tuple[records.Text, str]], description: str
) -> np.ndarray:
    """Mean log-prob per token of (prompt, response) pairs under `module`."""
    config = run.config.evaluate
    row_length = run.config.data.row_length
    with run.progress(len(pairs), description) as bar:
        return respond.mean_logprobs(
            module,
            pairs,
            run.encoder,
            micro_rows=config.micro_rows,
            row_length=row_length,
            progress=bar.advance,
        )


def perplexity(run: context.Context, module, base_rows: list[dict], name: str) -> float:
    """exp(-mean log-prob per token) of the base model's own samples, each counting alike."""
    pairs = [
        (r["prompt"], r["response"])
        for r in base_rows
        if r["mode"] == "sample" and r["response"].strip()
    ]
    return float(
        np.exp(-np.mean(likelihood(run, module, pairs, f"{name}: perplexity of base text")))
    )


def chosen(run: context.Context, module, base_rows: list[dict], name: str) -> list[int]:
    """Of each of `choices.questions`: was it answered rightly? [] where there are none."""
    asked = choices.questions(base_rows)
    pairs = [(q.prompt, response) for q in asked for response in q.responses]
    if not pairs:
        return []
    values = likelihood(run, module, pairs, f"{name}: choices of continuations")
    return choices.right(values.reshape(-1, choices.CHOICES))


def actions(run: context.Context, base_rows: list[dict]) -> dict[str, str]:
    """Prompt id -> triage's action on the first pair of base samples that the old policy orders."""
    sampled = [row for row in base_rows if row["mode"] == "sample"]
    labels = {p["id"]: p.get("labels", {}) for p in run.prompts}
    verdicts = run.old_judge.judge(
        [judges.Item(r["prompt"], r["response"], labels[r["id"]]) for r in sampled]
    )
    by_prompt: dict[str, list[tuple[dict, judges.Verdict]]] = {}
    for row, verdict in zip(sampled, verdicts, strict=True):
        by_prompt.setdefault(row["id"], []).append((row, verdict))
    decided, found = {"compliant": True, "violating": False}, {}
    for prompt_id, of_prompt in by_prompt.items():
        for (a, old_a), (b, old_b) in itertools.combinations(of_prompt, 2):
            preferred = judges.order(old_a, old_b)
            if preferred:
                better, worse = (a, b) if preferred > 0 else (b, a)
                statuses = (decided.get(row["status"]) for row in (better, worse))
                found[prompt_id] = triage.action(*statuses)
                break
    return found
