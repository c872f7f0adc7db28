"""The stages of a run in order: each reads artefacts, writes its own; done ones are skipped."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence

from trace_jax import config as config_lib
from trace_jax import heartbeat, metrics, processes, workdir
from trace_jax.errors import InputError
from trace_jax.stages import context


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
      keys: prefixes of the config keys that change what it computes.
      upstream: stages whose outputs it reads.
      outputs: names in the workdir that it writes.
      on_host: it need not compute on devices, so jax is not imported for it by itself.
      partial: what an interrupted run leaves beside them (deleted by --redo as well).
      spent: what is deleted once it is done; while something failed, what --redo spares stays.

    Its function is `run` of the module of its name here: takes a Context, returns a small summary.
    """

    name: str
    keys: tuple[str, ...]
    upstream: tuple[str, ...]
    outputs: tuple[str, ...]
    partial: tuple[str, ...] = ()
    spent: tuple[str, ...] = ()
    on_host: bool = False

    @property
    def artefacts(self) -> tuple[str, ...]:
        return self.outputs + self.partial


STAGES = (
    Stage("prepare", ("seed", "parent", "model", "data", "policy.old"), (),
          ("base.json", "base", "records.jsonl", "prompts.jsonl"),
          ("base_tokenizer", "base_checkpoints", "openings.jsonl", "continuations.jsonl"),
          on_host=True),
    Stage("align", ("seed", "align", "data.max_length", "data.append_stop"), ("prepare",),
          ("ref",), ("ref_checkpoints",)),
    Stage("triage", ("policy.new", "judge", "triage"), ("prepare",),
          ("triage.jsonl", "coverage.json"), on_host=True),
    Stage("baseline", ("seed", "policy", "judge", "evaluate"), ("prepare", "align"),
          ("baseline.jsonl", "guard.json", "perplexity.json"), (".responses",), (".responses",)),
    Stage("correct", ("seed", "correct", "policy.new", "judge"),
          ("prepare", "align", "triage", "baseline"), ("corrections.jsonl",),
          ("corrections_found.jsonl",), ("corrections_found.jsonl", "corrections_proposals.jsonl")),
    Stage("impact", ("seed", "impact", "u2a", "train.punish", "train.beta", "train.preference",
                     "train.tau", "train.npo_scale", "train.length_normalised", "train.adapters",
                     "train.lora", "train.alpha_nll", "train.data_share", "train.data_seed"),
          ("prepare", "align", "triage", "correct"),
          ("gold.json", "impact.jsonl", "impact_summary.json")),
    Stage("train", ("seed", "train", "u2a"), ("prepare", "align", "triage", "correct", "impact"),
          ("checkpoints", "metrics.jsonl", "pauses.jsonl")),
    Stage("evaluate", ("seed", "policy", "judge", "evaluate"),
          ("prepare", "align", "baseline", "train"), ("samples.jsonl", "eval.json"),
          (".responses",), (".responses",)),
    Stage("export", (), ("prepare", "align", "triage", "train"), ("model", "adapter")),
    Stage("report", (), ("prepare", "align", "triage", "baseline", "correct", "impact", "train",
                         "evaluate", "export"), ("report.html",), on_host=True),
)  # fmt: skip
NAMES = tuple(stage.name for stage in STAGES)
# Last parts of keys that change memory and time, and results by their rounding alone: what is done
# stays done, and what was begun goes on, whatever they are.
_COST_ALONE = frozenset((
    "micro_rows", "batch_rows", "layer_rows", "head_chunk", "remat", "attention_block",
    "save_every", "keep", "skip_steps",
))  # fmt: skip


def chosen(names: str | None) -> tuple[Stage, ...]:
    """Stages named in "a,b" in their own order; all for None."""
    if not names:
        return STAGES
    wanted = [n.strip() for n in names.split(",") if n.strip()]
    unknown = [n for n in wanted if n not in NAMES]
    if unknown:
        raise InputError(f"unknown stage {unknown[0]!r}; choose from {', '.join(NAMES)}")
    return tuple(stage for stage in STAGES if stage.name in wanted)


def inputs(stage: Stage, run: context.Context) -> dict[str, object]:
    """Everything that decides what the stage writes: config values, hashes of what it reads."""
    found = {
        key: value
        for key, value in run.flat_config.items()
        if any(key == prefix or key.startswith(prefix + ".") for prefix in stage.keys)
        and not _is_cost(key)
    }
    found |= run.content_hashes(stage.name)
    for name in stage.upstream:
        mark = run.workdir.finished(name)
        if mark is None:
            raise InputError(
                f"{run.workdir.path}: stage {stage.name} needs stage {name}, which has not "
                f"finished; run it first (--stages={name})"
            )
        _check_untouched(name, run)
        found |= {f"{name}/{output}": digest for output, digest in mark["outputs"].items()}
    return found


def run(
    run: context.Context,
    selected: Sequence[Stage],
    *,
    redo: bool,
    on_start: Callable[[], None] = lambda: None,
) -> None:
    """Runs the selected stages in order. A finished stage with the same inputs is skipped.

    on_start: called once, before the first stage that is not skipped.
    """
    fresh = True
    for stage in selected:
        processes.wait(f"before {stage.name}")  # so that all see the same files
        wanted = inputs(stage, run)
        what = _what_to_do(stage, run, wanted, redo=redo)
        processes.wait(f"decided on {stage.name}")
        if what == "redo":
            run.workdir.forget(stage.name, stage.artefacts)
        if what == "skip":
            metrics.say(f"[{stage.name}] done before, skipped")
            if run.workdir.started(stage.name) is not None:
                _close(stage, run)
            continue
        if fresh:
            on_start()
            fresh = False
        run.workdir.start(stage.name, wanted)
        metrics.say(f"[{stage.name}]")
        clock = workdir.Clock()
        with heartbeat.doing(f"stage {stage.name}"):
            summary = _compute(stage, run)
        run.workdir.finish(stage.name, wanted, stage.outputs, clock.seconds, summary)
        _close(stage, run)
        run.intact.add(stage.name)


def _compute(stage: Stage, run: context.Context) -> dict:
    run.release_models()
    if stage.on_host:
        return _function(stage.name)(run)
    with run.devices():
        return _function(stage.name)(run)


def _what_to_do(stage: Stage, run: context.Context, wanted: dict, *, redo: bool) -> str:
    """ "skip" it, "run" it, anew or from where it stopped, or "redo" it after deleting its traces.

    Raises:
      InputError: it was made from other inputs, or its artefacts were edited, and redo is off.
    """
    finished, started = run.workdir.finished(stage.name), run.workdir.started(stage.name)
    for mark in (finished, started):
        if mark is not None:
            then = {key: value for key, value in config_lib.BEFORE.items() if key in wanted}
            told = {key: value for key, value in mark["inputs"].items() if not _is_cost(key)}
            mark["inputs"] = then | told
    if finished is not None:
        if redo and (finished["inputs"] != wanted or run.workdir.touched(stage.name)):
            return "redo"
        if redo and _failed(finished["summary"]):
            return "redo"  # what judge or writer could not answer is asked again
        if redo and run.config.asking.reask_abstentions and finished["summary"].get("abstentions"):
            return "redo"
        if finished["inputs"] != wanted:
            raise _changed(stage, run, finished["inputs"], wanted)
        _check_untouched(stage.name, run)
        return "skip"
    if started is None or started["inputs"] == wanted:
        return "run"
    left = any((run.workdir.path / name).exists() for name in stage.artefacts)
    if left and not redo:
        raise _changed(stage, run, started["inputs"], wanted, "begun with")
    return "redo"  # also where nothing is left here: the bucket may have its checkpoints


def _failed(summary: Mapping[str, object]) -> bool:
    """Whether judge or writer gave no answer to something."""
    return any(summary.get(key) for key in ("judge_errors", "failed_prompts"))


def _close(stage: Stage, run: context.Context) -> None:
    """Deletes what the finished stage needs no longer."""
    failed = _failed(run.workdir.finished(stage.name)["summary"])
    spent = [name for name in stage.spent if name in stage.partial or not failed]
    run.workdir.close(stage.name, spent)


def _is_cost(key: str) -> bool:
    return key.rpartition(".")[2] in _COST_ALONE


def _changed(
    stage: Stage, run: context.Context, old: dict, new: dict, how: str = "made from"
) -> InputError:
    return InputError(
        f"{run.workdir.path}: stage {stage.name} was {how} other inputs "
        f"({workdir.difference(old, new)}); use another --workdir, or --redo to do this stage and "
        "what depends on it again"
    )


def _check_untouched(name: str, run: context.Context) -> None:
    """Raises InputError where an artefact of a finished stage is not as the stage left it."""
    if name in run.intact:
        return
    path = run.workdir.touched(name)
    if path is not None:
        what = "was edited" if path.exists() else "is gone"
        raise InputError(
            f"{path} {what} since stage {name} wrote it; put it back, or do stage {name} and what "
            f"depends on it again with --redo (with --stages, name {name} too)"
        )
    run.intact.add(name)


def _function(name: str) -> Callable[[context.Context], dict]:
    """The stage's function; its module (and jax) loads only when the stage runs."""
    return importlib.import_module(f"trace_jax.stages.{name}").run
