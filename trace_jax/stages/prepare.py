"""Stage prepare: the base model, the preference records and the held-out prompts."""

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trace_jax import config as config_lib
from trace_jax import (
    generations,
    metrics,
    processes,
    records,
    respond,
    scratch,
    self_sampled,
    sources,
    synth,
    workdir,
)
from trace_jax.errors import InputError
from trace_jax.stages import context


def run(run: context.Context) -> dict:
    """Writes base.json, records.jsonl, prompts.jsonl; trains `base/` where model.path is empty."""
    if run.config.model.path:
        run.check_base()
    found, prompts = _SOURCES[run.config.data.source](run)
    _check(found, prompts, run)
    if run.config.data.as_chat:
        found = [dataclasses.replace(r, prompt=_chat(r.prompt)) for r in found]
        prompts = [row | {"prompt": _chat(row["prompt"])} for row in prompts]
    _check_one_kind(found, prompts)
    if run.config.model.path:
        found, prompts = _taken_by_template(run, found, prompts)
        _check(found, prompts, run)
    else:
        with run.devices():
            _train_from_scratch(run, found)
    _tell_cut(run, prompts)
    records.write_json(run.workdir.path / "base.json", run.base_identity())
    records.write_jsonl(run.workdir.path / "prompts.jsonl", prompts)
    records.write_jsonl(run.workdir.path / "records.jsonl", [r.to_json() for r in found])
    by_split = {s: sum(p["split"] == s for p in prompts) for s in ("validation", "test")}
    metrics.say(f"  {len(found)} records; held-out prompts: {by_split}")
    return {"records": len(found), **by_split}


def _chat(prompt: records.Text) -> records.Text:
    """A plain prompt as what a user said."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _check(found: list, prompts: list[dict], run: context.Context) -> None:
    if not found:
        raise InputError("no preference records were found or made; see data.source")
    for split in run.config.evaluate.splits:
        if not any(p["split"] == split for p in prompts):
            raise InputError(
                f"the {split} split has no prompts; raise data.{split}_prompts or give "
                "data.prompts_path"
            )


def _check_one_kind(found: list, prompts: list[dict]) -> None:
    """A model that sees both chats and bare texts learns two formats."""
    kinds = {}
    for name, prompt in itertools.chain(
        ((r.id, r.prompt) for r in found), ((p["id"], p["prompt"]) for p in prompts)
    ):
        kinds.setdefault(isinstance(prompt, str), name)
    if len(kinds) > 1:
        raise InputError(
            f"some prompts are chats (record {kinds[False]}) and some are plain texts "
            f"({kinds[True]}); mend the data, or set data.as_chat=true to make all of them chats"
        )


def _taken_by_template(
    run: context.Context, found: list, prompts: list[dict]
) -> tuple[list, list[dict]]:
    """Records and prompts that the chat template takes: all, unless malformed ones are dropped."""
    if isinstance(found[0].prompt, str):
        return found, prompts
    drop = run.config.data.malformed == "drop" and getattr(run.tokenizer, "chat_template", None)

    def is_taken(prompt: records.Text, name: str) -> bool:
        try:
            run.encoder.prompt_text(prompt, name)
        except InputError:
            if not drop:
                raise
            return False
        return True

    taken = [r for r in found if is_taken(r.prompt, r.id)]
    held_out = [p for p in prompts if is_taken(p["prompt"], p["id"])]
    n = len(found) - len(taken) + len(prompts) - len(held_out)
    if n:
        metrics.say(f"  {n} chats left out: the model's chat template does not take them")
    return taken, held_out


def _tell_cut(run: context.Context, prompts: list[dict]) -> None:
    new = run.config.evaluate.max_new_tokens
    before = run.encoder.truncated_prompts
    for row in prompts:
        run.encoder.prompt_tokens(row["prompt"], row["id"], new_tokens=new)
    n = run.encoder.truncated_prompts - before
    if n:
        metrics.say(
            f"  {n} of {len(prompts)} held-out prompts lose their left ends: data.max_length="
            f"{run.config.data.max_length} less evaluate.max_new_tokens={new} leaves no more room"
        )


def _from_file(run: context.Context) -> tuple[list, list[dict]]:
    data = run.config.data
    if run.config.policy.new == config_lib.base_config().policy.new:
        metrics.say(
            f"  warning: policy.new={run.config.policy.new} is the default, a policy about made-up "
            "texts; for your data give --config.policy.old and --config.policy.new"
        )
    reading = sources.Reading.of(data, run.config.seed)
    found, counts = sources.read_records(data.path, reading)
    metrics.say(f"  {data.path}: {counts}")
    asked = _asked(data.prompts_path, reading) if data.prompts_path else []
    if data.as_chat:  # before prompts are compared: a text and a chat may be one
        found = _as_chats(found, "prompt", "chosen", "rejected")
        asked = _as_chats(asked, "prompt")
    rng = np.random.default_rng([run.config.seed, 0x5711])
    if data.prompts_path:
        held_out = [_held_out(p.id, p.prompt, p.labels) for p in asked]
        held_out = [held_out[i] for i in rng.permutation(len(held_out))]
    else:
        by_prompt = {records.content_id(r.prompt): r for r in found}
        ids = list(by_prompt)
        wanted = min(data.validation_prompts + data.test_prompts, len(ids) // 3)
        taken = [ids[i] for i in rng.permutation(len(ids))[:wanted]]
        held_out = [
            _held_out(i, by_prompt[i].prompt, by_prompt[i].labels_of("prompt")) for i in taken
        ]
    total = data.validation_prompts + data.test_prompts
    held_out = held_out[:total] if data.hold_out == "used" else held_out
    secret = {records.content_id(p["prompt"]) for p in held_out}
    kept = [r for r in found if records.content_id(r.prompt) not in secret]
    if len(kept) < len(found):
        metrics.say(f"  {len(found) - len(kept)} records left out: their prompts are held out")
    n_test = (
        data.test_prompts if len(held_out) >= total else len(held_out) * data.test_prompts // total
    )
    return kept, _with_splits(held_out[:total], n_test)


def _asked(path: str, reading: sources.Reading) -> list[sources.HeldOutPrompt]:
    found, malformed = sources.read_prompts(path, reading)
    left_out = f", {malformed} left out: malformed" if malformed else ""
    metrics.say(f"  {path}: {len(found)} prompts{left_out}")
    return found


def _as_chats(found: list, *parts: str) -> list:
    """Plain prompts as chats; of those that are then equal in these parts the first."""
    once = {}
    for one in found:
        one = dataclasses.replace(one, prompt=_chat(one.prompt))
        once.setdefault(records.content_id(*(getattr(one, part) for part in parts)), one)
    return list(once.values())


def _held_out(name: str, prompt: records.Text, labels: Mapping[str, Any]) -> dict[str, Any]:
    row = {"id": name, "prompt": prompt}
    return row | {"labels": dict(labels)} if labels else row


def _with_splits(held_out: list[dict], n_test: int) -> list[dict]:
    return [
        row | {"split": "test" if i < n_test else "validation"} for i, row in enumerate(held_out)
    ]


def _from_synth(run: context.Context) -> tuple[list, list[dict]]:
    config = run.config
    found = [
        records.PreferenceRecord(
            records.content_id(p["prompt"], p["chosen"], p["rejected"]),
            p["prompt"],
            p["chosen"],
            p["rejected"],
            p["labels"],
        )
        for p in synth.pairs(config.seed, config.data.pairs)
    ]
    unique = list({r.id: r for r in found}.values())
    prompts = []
    for split, n in (
        ("test", config.data.test_prompts),
        ("validation", config.data.validation_prompts),
    ):
        rows = synth.prompts(config.seed, split, n)
        prompts += [{"id": p["id"], "prompt": p["prompt"], "split": split} for p in rows]
    return unique, prompts


def _self_sampled(run: context.Context) -> tuple[list, list[dict]]:
    """Openings and continuations sampled from the base model, kept in files for a rerun."""
    config, data = run.config, run.config.data
    n_held_out = data.validation_prompts + data.test_prompts
    with run.devices():
        openings = _openings(run, n_held_out + data.openings)
        responses = _continuations(run, openings[n_held_out:])
    held_out = [{"id": p.id, "prompt": p.prompt} for p in openings[:n_held_out]]
    pairs = self_sampled.pairs(
        openings[n_held_out:], responses, run.old_judge, limit=data.pairs, seed=config.seed
    )
    return pairs, _with_splits(held_out, data.test_prompts)


def _openings(run: context.Context, n: int) -> list[respond.Prompt]:
    config, path = run.config, run.workdir.path / "openings.jsonl"
    if path.exists():
        return [respond.Prompt(**row) for _, row in records.read_jsonl(path)]
    with run.progress(None, "sample openings") as bar:
        openings = self_sampled.openings(
            run.base,
            run.encoder,
            n=n,
            seed=config.seed,
            tokens=tuple(config.data.opening_tokens),
            stop_ids=run.stop_ids,
            batch_rows=config.evaluate.batch_rows,
            progress=bar.advance,
        )
    records.write_jsonl(path, [dataclasses.asdict(p) for p in openings])
    return openings


def _continuations(run: context.Context, prompts: list) -> list[list[str]]:
    config, data = run.config, run.config.data
    path = run.workdir.path / "continuations.jsonl"
    if path.exists():
        return [row["responses"] for _, row in records.read_jsonl(path)]
    total = len(prompts) * data.continuations
    with run.progress(total, "sample continuations") as bar:
        responses = respond.respond(
            run.base,
            prompts,
            run.encoder,
            seed=config.seed,
            samples=data.continuations,
            max_new_tokens=config.evaluate.max_new_tokens,
            temperature=1.0,
            stop_ids=run.stop_ids,
            batch_rows=config.evaluate.batch_rows,
            progress=bar.advance,
        )
    rows = [{"id": p.id, "responses": r} for p, r in zip(prompts, responses, strict=True)]
    records.write_jsonl(path, rows)
    return responses


def _train_from_scratch(run: context.Context, found: list[records.PreferenceRecord]) -> None:
    """Trains a small decoder and saves it with its tokenizer as `base/`."""
    target = run.workdir.path / "base"
    if (target / "model.safetensors").exists():
        return
    from trace_jax import encoding, fit, models, sharding

    shape, seed = run.config.model.scratch, run.config.seed
    tokenizer = _scratch_tokenizer(run)
    config = models.scratch(
        shape.to_dict(),
        len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=(tokenizer.eos_token_id,),
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = encoding.Encoder(
        tokenizer,
        max_length=shape.context,
        end_id=tokenizer.eos_token_id,
        cut_responses=run.config.data.too_long == "cut",
    )
    dropped: list[str] = []
    fitted = fit.fit(
        sharding.place_module(run.as_configured(models.init(config, seed))),
        _documents(run, found, encoder),
        run.settings("model.scratch.training"),
        encoder=encoder,
        directory=run.workdir.path / "base_checkpoints",
        metrics_path=run.workdir.path / "base_checkpoints" / "metrics.jsonl",
        on_drop=run.on_drop(dropped),
        progress=run.progress,
    )
    metrics.say(f"  trained a model of {fit.n_parameters(fitted.module):,} parameters from scratch")
    models.save(fitted.module, target, tokenizer=tokenizer)
    workdir.remove(run.workdir.path / "base_tokenizer")


def _scratch_tokenizer(run: context.Context):
    from trace_jax import encoding

    building = run.workdir.path / "base_tokenizer"
    if processes.is_first():
        scratch.write_tokenizer(run.config.model.scratch.tokenizer, building)
    processes.wait("base tokenizer")
    return encoding.load_tokenizer(building)


def _documents(run: context.Context, found: list, encoder) -> list:
    """Texts to train on: whole documents, prompts as well as responses."""
    from trace_jax import methods

    if run.config.data.source == "synth":
        pairs = synth.corpus(run.config.seed, run.config.model.scratch.documents)
    else:
        pairs = [
            (encoder.prompt_text(x), y if isinstance(y, str) else y[-1]["content"])
            for x, y in scratch.texts(found)
        ]
    return [
        methods.Example(f"document-{i}", "", "", p + r, nll=1.0) for i, (p, r) in enumerate(pairs)
    ]


def _from_parent(run: context.Context) -> tuple[list, list[dict]]:
    parent = Path(run.config.parent)
    unique = {r.id: r for r in generations.relabelled(parent)}
    held_out = [row for _, row in records.read_jsonl(parent / "prompts.jsonl")]
    return list(unique.values()), held_out


_SOURCES = {
    "parent": _from_parent,
    "file": _from_file,
    "jsonl": _from_file,
    "synth": _from_synth,
    "self_sampled": _self_sampled,
}
