"""What a report says was run, and what its judge has cost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_jax import methods, stages, status
from trace_jax.report import files

Settings = Mapping[str, Any]  # a config as `files.flat` has it


def header(settings: Settings, n_pairs: int | None, steps: str | None) -> list[tuple[str, str]]:
    """(name, value) of what was run; empty without a config.

    n_pairs: that triage saw. steps: of the training, in words.
    """
    named = {
        "method": _method(settings),
        "base model": _model(settings),
        "data": _data(settings, n_pairs),
        "judge": _judge(settings),
        "policies": _policies(settings),
        "on top of": settings.get("parent"),
        "seed": settings.get("seed"),
        "steps": steps or settings.get("train.total_steps"),
    }
    return [(name, str(value)) for name, value in named.items() if value not in (None, "")]


def _method(settings: Settings) -> str | None:
    """The method, or the preset whose settings it has, with the adapters it trains."""
    method = settings.get("train.method")
    if method is None:
        return None
    presets = {
        name: len(of)
        for name, of in methods.PRESETS.items()
        if all(key in settings and settings[key] == value for key, value in of.items())
    }
    name = max(presets, key=presets.get) if presets else method
    return f"{name} (LoRA)" if settings.get("train.adapters") == "lora" else name


def _model(settings: Settings) -> str | None:
    path = settings.get("model.path")
    if path != "":
        return path
    family, layers, width = (
        settings.get(f"model.scratch.{key}") for key in ("family", "layers", "hidden_size")
    )
    return f"{family} of {layers} layers and width {width}, trained here from scratch"


def _data(settings: Settings, n_pairs: int | None) -> str | None:
    source = settings.get("data.source")
    if source is None:
        return None
    names = {"file": settings.get("data.path"), "synth": "SynthValueBench (synth)",
             "self_sampled": "the base model's own samples (self_sampled)"}  # fmt: skip
    return names.get(source, source) + ("" if n_pairs is None else f", {n_pairs} pairs")


def _judge(settings: Settings) -> str | None:
    name = settings.get("judge.name")
    if name in ("gemini", "local"):
        return f"{name}, {settings.get(f'judge.{name}.model')}"
    if name == "ensemble":
        return f"ensemble of {', '.join(settings.get('judge.ensemble.members') or ())}"
    return name


def _policies(settings: Settings) -> str | None:
    if "policy.old" not in settings:
        return None
    return f"{settings['policy.old']} → {settings['policy.new']}"


def judge_cost(workdir: Path, settings: Settings) -> dict[str, Any] | None:
    """{"calls", "input_tokens", "output_tokens", "price_usd", "shared"} of the judgement store.

    All 0 of a judge that asks nobody, None where nothing is known. shared: other runs may use the
    store.
    """
    if not (workdir / "config.json").exists():
        return None
    found = status.judge(workdir)
    if found is None and settings.get("judge.name") in ("rules", "labels"):
        found = dict.fromkeys(("calls", "input_tokens", "output_tokens", "price_usd"), 0)
    return found and found | {"shared": bool(settings.get("asking.store"))}


def stages_done(workdir: Path) -> list[dict[str, Any]]:
    """{"stage", "seconds", "summary": [(name, value)]} of the finished stages, in their order."""
    marks = [files.read_json(path) for path in (workdir / ".stages").glob("*.json")]
    done = [mark for mark in marks if "seconds" in mark]
    order = {name: i for i, name in enumerate(stages.NAMES)}
    done.sort(key=lambda mark: order.get(mark["stage"], len(order)))
    return [
        {
            "stage": mark["stage"],
            "seconds": mark["seconds"],
            "summary": list(files.flat(mark.get("summary") or {}).items()),
        }
        for mark in done
    ]
