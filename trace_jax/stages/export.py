"""Stage export: the re-aligned model in Hugging Face layout."""

from trace_jax import metrics, models
from trace_jax.stages import context


def run(run: context.Context) -> dict:
    """Writes model/: config, weights (adapters merged), tokenizer; transformers loads it."""
    target = run.workdir.path / "model"
    models.save(run.trained, target)
    run.tokenizer.save_pretrained(target)
    metrics.say(f"  {target}")
    return {}
