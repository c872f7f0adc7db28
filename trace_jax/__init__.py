"""TRACE: triage and re-align a language model when its policy changes (arXiv 2511.02623)."""

import importlib

__version__ = "0.1.0"

_SUBMODULES = frozenset({
    "batches", "checkpoints", "compare", "config", "errors", "evaluate", "fit", "impact", "judges",
    "launch", "losses", "methods", "metrics", "models", "policy", "records", "report", "sampling",
    "sources", "synth", "train", "triage",
})  # fmt: skip


def __getattr__(name: str):
    """Loads submodules on first use: `import trace_jax` takes milliseconds, without jax."""
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
