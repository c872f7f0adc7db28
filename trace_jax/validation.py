"""The checks of a config, before anything is spent."""

import math
from pathlib import Path

import ml_collections

from trace_jax import judges, methods, model_folder, remote
from trace_jax.errors import InputError
from trace_jax.sources import files, forms

FROM_FILE = ("file", "jsonl")  # two names of one source
SOURCES = (*FROM_FILE, "synth", "self_sampled", "parent")
ADAPTERS = ("none", "lora")
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


_COUNTS = (
    "data.max_length", "impact.gold_size", "impact.micro_rows", "correct.tries",
    "correct.samples_per_round", "evaluate.samples", "evaluate.batch_rows", "evaluate.micro_rows",
    "asking.micro_rows",
)  # fmt: skip


def validate(config: ml_collections.ConfigDict, *, planning: bool = False) -> None:
    """Checks values before any device or network is touched; raises InputError.

    planning: data and model need not be here yet.
    """
    try:
        _validate(config, planning=planning)
    except OSError as error:  # of a name that can be none
        name = str(error.filename)[:60]
        raise InputError(f"{name}...: {error.strerror}; check the paths of the config") from error


def _validate(config: ml_collections.ConfigDict, *, planning: bool) -> None:
    _one_of("data.source", config.data.source, SOURCES)
    _one_of("data.form", config.data.form, forms.NAMES)
    _one_of("data.hold_out", config.data.hold_out, ("all", "used"))
    _one_of("data.malformed", config.data.malformed, ("error", "drop"))
    forms.columns_of(config.data.columns)
    _one_of("data.too_long", config.data.too_long, ("error", "drop", "cut"))
    _one_of("model.dtype", config.model.dtype, ("float32", "bfloat16"))
    _one_of("model.scratch.family", config.model.scratch.family, ("llama", "qwen2", "gemma2"))
    _one_of("model.remat", config.model.remat, ("layer", "dots", "none"))
    if config.model.attention_block < -1:
        raise InputError(
            f"model.attention_block={config.model.attention_block} is a number of queries; "
            "0: whole rows; -1: as the platform wants it"
        )
    _validate_mesh(config.mesh)
    _one_of("train.method", config.train.method, methods.METHODS)
    _one_of("train.punish", config.train.punish, ("correction", "dual_npo"))
    for key in ("train.layer_rows", "model.head_chunk", "data.row_length"):
        if _section(config, key) < 0:
            raise InputError(f"{key}={_section(config, key)} must be at least 0")
    _one_of("train.alpha_scale", config.train.alpha_scale, ("one", "per_conflict"))
    if not config.evaluate.splits:
        raise InputError("evaluate.splits is empty; use test, validation or test,validation")
    for split in config.evaluate.splits:
        _one_of("evaluate.splits", split, ("test", "validation"))
    _validate_pauses(config)
    _validate_u2a(config.u2a)
    _one_of("correct.source", config.correct.source, ("self", "local", "gemini", "none"))
    _one_of("correct.pick", config.correct.pick, ("first", "best"))
    _one_of("correct.local_dtype", config.correct.local_dtype, ("float32", "bfloat16"))
    if config.correct.source == "local" and not config.correct.local_model:
        raise InputError("correct.source='local' needs --config.correct.local_model=DIRECTORY")
    _one_of("correct.writer", config.correct.writer, ("base", "ref"))
    _one_of("impact.weights", config.impact.weights, ("impact", "uniform", "shuffled"))
    _one_of("impact.gold_draw", config.impact.gold_draw, ("thirds", "proportional"))
    _one_of("impact.within", config.impact.within, ("all", "action"))
    if not 0 <= config.impact.strength <= 1:
        raise InputError(f"impact.strength={config.impact.strength} is a share, 0 to 1")
    if config.impact.reliability_examples < 0:
        raise InputError(
            f"impact.reliability_examples={config.impact.reliability_examples} is a number of "
            "conflicts; 0: all"
        )
    _one_of("impact.curvature", config.impact.curvature, ("identity", "fisher_diag", "cg"))
    for key in ("damping", "curvature_examples", "cg_iterations", "cg_tolerance"):
        _positive(f"impact.{key}", config.impact[key])
    _one_of("impact.path", config.impact.path, ("jvp", "jvp_losses", "vmap_grad"))
    _one_of("impact.normalisation", config.impact.normalisation, ("mean_one", "sum_to_one"))
    _one_of("judge.name", config.judge.name, judges.NAMES)
    _validate_triage(config.triage)
    for name in ("align", "train", "model.scratch.training"):
        _validate_training(name, _section(config, name))
    for key in _COUNTS:
        _positive(key, _section(config, key))
    for key in ("evaluate.temperature", "correct.temperature", "train.alpha_kl", "train.alpha_nll"):
        if not 0 <= _section(config, key) < math.inf:
            raise InputError(f"{key}={_section(config, key)} must be at least 0")
    _validate_rows(config.data)
    for key in ("correct.max_new_tokens", "evaluate.max_new_tokens"):
        if not 0 < _section(config, key) < config.data.max_length - 1:
            raise InputError(
                f"{key}={_section(config, key)} leaves no room for a prompt in data.max_length="
                f"{config.data.max_length}; lower the one or raise the other"
            )
    _validate_files(config.data)
    if planning:
        return
    if config.data.source in FROM_FILE and not config.data.path:
        raise InputError(
            "data.source='file' needs --config.data.path=FILE with prompt, chosen, rejected on "
            "each line (JSONL, CSV, Parquet), or a data set; see docs/data.md"
        )
    if config.data.source in FROM_FILE and not files.exists(config.data.path):
        raise InputError(f"data.path={config.data.path}: no such file")
    _validate_model(config)


def _validate_files(c: ml_collections.ConfigDict) -> None:
    """A parent decides data.path itself, and its own prompts are asked."""
    if c.source in (*FROM_FILE, "parent"):
        return
    for key in ("path", "prompts_path"):
        if c[key]:
            raise InputError(
                f"data.{key} is given, but data.source={c.source!r} reads none: add "
                "--config.data.source=file"
            )


def _validate_rows(c: ml_collections.ConfigDict) -> None:
    """A pair takes its prompt once and both responses, each of up to max_length with the prompt."""
    if c.row_length and c.row_length < 2 * c.max_length - 2:
        raise InputError(
            f"data.row_length={c.row_length} has no room for a pair of data.max_length="
            f"{c.max_length} a side; give --config.data.row_length={2 * c.max_length}, or 0: as "
            "steps cost least"
        )


def _validate_pauses(config: ml_collections.ConfigDict) -> None:
    c = config.train
    for key in ("refresh_every", "evaluate_every"):
        if c[key] < 0:
            raise InputError(f"train.{key}={c[key]} is a number of steps; 0 is never")
    if not 0 <= c.stop_below <= 1:
        raise InputError(f"train.stop_below={c.stop_below} is a share of M_ref's, 0 to 1")
    for key in ("stop_below", "keep_best"):
        if c[key] and not c.evaluate_every:
            raise InputError(f"train.{key} needs evaluations: set train.evaluate_every=N steps")
    _positive("train.perplexity_limit", c.perplexity_limit)
    if c.patience < 0:
        raise InputError(f"train.patience={c.patience} is a number of evaluations; 0 is never")
    if c.evaluate_every and "validation" not in config.evaluate.splits:
        raise InputError(
            "train.evaluate_every asks validation prompts; give "
            "--config.evaluate.splits=test,validation"
        )
    _positive("train.evaluate_prompts", c.evaluate_prompts)
    if not 0 < c.data_share <= 1:
        raise InputError(f"train.data_share={c.data_share} is a share, above 0 and up to 1")


def _validate_u2a(c: ml_collections.ConfigDict) -> None:
    _one_of("u2a.inner", c.inner, methods.INNER)
    for key in ("top", "rounds", "alpha_kl"):
        _positive(f"u2a.{key}", c[key])


def _validate_model(config: ml_collections.ConfigDict) -> None:
    ref = config.model.ref_path
    if ref and not remote.is_remote(ref) and not model_folder.holds_model(Path(ref)):
        raise InputError(
            f"model.ref_path={ref}: no config.json there; give a directory in Hugging Face "
            "layout or of a PEFT adapter"
        )
    if ref and config.align.enabled:
        raise InputError("model.ref_path gives M_ref, so set --config.align.enabled=False")
    if config.data.source == "parent" and not config.parent:
        raise InputError("data.source='parent' needs --config.parent=WORKDIR")
    path = config.model.path
    tokenizer = config.model.scratch.tokenizer
    from_records = config.data.source in FROM_FILE and tokenizer
    if config.data.source != "synth" and not path and not from_records:
        raise InputError(
            "model.path is empty; give --config.model.path=DIR, a model in Hugging Face layout (or "
            "model.scratch.tokenizer, to train a small one on the text of the records)"
        )
    if tokenizer and not path and not Path(tokenizer).exists():
        raise InputError(f"model.scratch.tokenizer={tokenizer}: no such file or folder")
    elsewhere = remote.is_remote(path) or model_folder.is_hub_name(path)
    if path and not elsewhere and not model_folder.holds_model(Path(path)):
        raise InputError(
            f"model.path={path}: no config.json there; give a directory in Hugging Face "
            "layout or of a PEFT adapter, or a model of the hub as organisation/name"
        )


def _validate_triage(c: ml_collections.ConfigDict) -> None:
    _one_of("triage.decide_by", c.decide_by, ("status", "probability"))
    if not 0 <= c.violating_below <= c.compliant_from <= 1:
        raise InputError(
            f"triage.violating_below={c.violating_below} and triage.compliant_from="
            f"{c.compliant_from} must lie in 0..1, the first not above the second"
        )
    if not 0 <= c.noise <= 1:
        raise InputError(f"triage.noise={c.noise} is a share of the records, 0 to 1")
    if not 0 <= c.error <= 0.25:
        raise InputError(f"triage.error={c.error} is a mean share of wrong verdicts, 0 to 0.25")
    if c.overrides and not Path(c.overrides).is_file():
        raise InputError(f"triage.overrides={c.overrides}: no such file")


def _validate_mesh(c: ml_collections.ConfigDict) -> None:
    if c.fsdp_limit < 0:
        raise InputError(f"mesh.fsdp_limit={c.fsdp_limit} must be at least 0")
    for axis in ("data", "fsdp", "tensor"):
        size = c[axis]
        if size != -1 and size < 1:
            raise InputError(f"mesh.{axis}={size} must be at least 1, or -1 for the devices left")
    if sum(size == -1 for _, size in c.items()) > 1:
        raise InputError("only one of mesh.data, mesh.fsdp and mesh.tensor may be -1")


def _validate_training(name: str, c: ml_collections.ConfigDict) -> None:
    _one_of(f"{name}.preference", c.preference, ("logistic", "squared"))
    _one_of(f"{name}.npo_scale", c.npo_scale, ("plain", "two_over_beta"))
    _one_of(f"{name}.adapters", c.adapters, ADAPTERS)
    _one_of(f"{name}.mu_dtype", c.mu_dtype, ("float32", "bfloat16"))
    for key in (
        "total_steps",
        "examples_per_step",
        "retain_per_step",
        "micro_rows",
        "save_every",
        "keep",
    ):
        _positive(f"{name}.{key}", c[key])
    for key in ("learning_rate", "beta", "tau", "clip_norm"):
        _positive(f"{name}.{key}", c[key])
    for key in ("b1", "b2"):
        if not 0 <= c[key] < 1:
            raise InputError(f"{name}.{key}={c[key]} must be at least 0 and below 1")
    for key in ("weight_decay", "drift", "warmup_steps"):
        if not c[key] >= 0:
            raise InputError(f"{name}.{key}={c[key]} must be at least 0")
    if c.adapters == "lora":
        _positive(f"{name}.lora.rank", c.lora.rank)
        targets = [target.strip() for target in c.lora.targets.split(",")]
        if targets != ["all"] and not set(targets) <= set(LORA_TARGETS):
            raise InputError(
                f'{name}.lora.targets={c.lora.targets!r}: give "all" or names out of '
                f"{','.join(LORA_TARGETS)} joined by commas (q is PEFT's q_proj)"
            )
    if c.warmup_steps >= c.total_steps:
        raise InputError(
            f"{name}.warmup_steps={c.warmup_steps} must be below {name}.total_steps={c.total_steps}"
        )


def _section(config: ml_collections.ConfigDict, name: str):
    for part in name.split("."):
        config = config[part]
    return config


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{key}={value!r} is unknown; use one of {', '.join(choices)}")


def _positive(key: str, value: float) -> None:
    if not value > 0:
        raise InputError(f"{key}={value} must be greater than 0")
