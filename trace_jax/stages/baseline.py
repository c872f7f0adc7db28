"""Stage baseline: the base model and M_ref on the held-out prompts, and the guard."""

from trace_jax import metrics, records
from trace_jax.evaluate import compliance
from trace_jax.stages import context, responses


def run(run: context.Context) -> dict:
    """Writes baseline.jsonl (rows of models "base" and "ref"), perplexity.json and guard.json.

    perplexity.json: split -> {"base", "ref": perplexity, "chosen": {"base", "ref": 0 or 1 of each
    of `choices.questions`}}.

    The guard is fitted on base samples of the first split that is evaluated; base samples are also
    the fixed text for perplexity and choices.
    """
    found = []
    for split in run.config.evaluate.splits:
        found += responses.rows_of(run, run.base, "base", split)
        if run.has_ref:
            found += responses.rows_of(run, run.ref, "ref", split)
    perplexities = {}
    for split in run.config.evaluate.splits:
        text = [r for r in found if r["model"] == "base" and r["split"] == split]
        models = {"base": run.base} | ({"ref": run.ref} if run.has_ref else {})
        perplexities[split] = {
            name: responses.perplexity(run, module, text, name) for name, module in models.items()
        } | {
            "chosen": {
                name: responses.chosen(run, module, text, name) for name, module in models.items()
            }
        }
    records.write_json(run.workdir.path / "perplexity.json", perplexities)
    first = run.config.evaluate.splits[0]
    thresholds = compliance.fit_guard(
        [r for r in found if r["model"] == "base" and r["split"] == first]
    )
    records.write_json(run.workdir.path / "guard.json", thresholds.to_json())
    records.write_jsonl(
        run.workdir.path / "baseline.jsonl", compliance.with_guard(found, thresholds)
    )
    metrics.say(f"  guard: {thresholds.to_json()}")
    return {"rows": len(found), **responses.told_undecided(found)}
