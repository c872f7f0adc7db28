"""Stage export: the re-aligned model in Hugging Face layout, and its adapter for PEFT."""

import importlib.metadata
from pathlib import Path

import trace_jax
from trace_jax import fit, metrics, model_folder, models, records, workdir
from trace_jax.models import model_card
from trace_jax.stages import closing, context

_HYPER_PARAMETERS = (
    "method", "punish", "total_steps", "examples_per_step", "learning_rate", "beta", "alpha_kl",
    "adapters",
)  # fmt: skip


def run(run: context.Context) -> dict:
    """Writes model/: weights (adapters merged), tokenizer, README.md; under LoRA adapter/ as well.

    transformers loads model/; PEFT loads adapter/, which names M_ref as its base, or, where that is
    an adapter itself, the model behind it, whose adapter is part of what is written.
    """
    target = run.workdir.path / "model"
    models.save(run.trained, target, tokenizer=run.tokenizer, card=_card(run))
    metrics.say(f"  {target}")
    if run.config.train.adapters == "lora":
        settings, checkpoints = run.settings("train"), run.file("train", "checkpoints")
        adapted = fit.restore(run.ref, settings, checkpoints, merge=False)
        base, revision, under = _base(run)
        target = run.workdir.path / "adapter"
        models.save_adapter(adapted, target, base=base, revision=revision, under=under)
        metrics.say(f"  {run.workdir.path / 'adapter'} (base: {base})")
    return {}


def _base(run: context.Context) -> tuple[str, str | None, list[Path]]:
    """Name and revision of the model that M_ref is or is adapted from; the adapters in between."""
    *under, folder = model_folder.chain(run.ref_directory)
    if under:
        return *model_folder.named(under[-1]), under
    given = run.config.model.path
    is_given = not run.has_ref and model_folder.is_hub_name(given)
    return given if is_given else str(folder), None, under


def _card(run: context.Context) -> str:
    config = run.config
    records_file = run.file("prepare", "records.jsonl")
    actions = run.workdir.finished("triage")["summary"]["actions"]
    found = []
    if run.workdir.finished("evaluate"):
        found = closing.figures(records.read_json(run.file("evaluate", "eval.json")))
    names = ("jax", "flax", "optax", "transformers")
    return model_card.text(
        base=str(config.model.path or "trained from scratch"),
        made={key: config.train[key] for key in _HYPER_PARAMETERS} | {"seed": config.seed},
        policies={
            f"{which} ({name})": policy.hash
            for which, name, policy in (
                ("old", config.policy.old, run.old_policy),
                ("new", config.policy.new, run.new_policy),
            )
        },
        data={"records": workdir.hash_path(records_file), "judge": config.judge.name} | actions,
        metrics=found,
        versions={"trace_jax": trace_jax.__version__}
        | {name: importlib.metadata.version(name) for name in names},
    )
