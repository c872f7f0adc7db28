"""Stage evaluate: the re-aligned model on the held-out prompts, beside the base model and M_ref."""

from trace_jax import records, tracking
from trace_jax.evaluate import choices, compliance, guard
from trace_jax.stages import context, responses


def run(run: context.Context) -> dict:
    """Writes samples.jsonl (all models) and eval.json (top level: first of evaluate.splits).

    eval.json: `compliance.summary`, perplexity and choice_accuracy (`choices.py`) of the re-aligned
    model, the same of others under "base" and "ref"; "guard", "split", and "splits" for the rest;
    "policy": content hashes of "old" and "new".
    """
    before = [row for _, row in records.read_jsonl(run.file("baseline", "baseline.jsonl"))]
    thresholds = guard.Guard.from_json(records.read_json(run.file("baseline", "guard.json")))
    perplexities = records.read_json(run.file("baseline", "perplexity.json"))
    rows, found = list(before), {}
    for split in run.config.evaluate.splits:
        of_split = [r for r in before if r["split"] == split]
        base_rows = [r for r in of_split if r["model"] == "base"]
        trained = compliance.with_guard(
            responses.rows_of(run, run.trained, "trained", split), thresholds
        )
        rows += trained
        actions = responses.actions(run, base_rows)
        figures = compliance.summary(trained, actions)
        figures["perplexity"] = responses.perplexity(run, run.trained, base_rows, "trained")
        chosen = {"trained": responses.chosen(run, run.trained, base_rows, "trained")}
        chosen |= perplexities[split].get("chosen", {})
        figures |= choices.figure(chosen["trained"])
        for model in sorted({r["model"] for r in of_split}):
            of_model = [r for r in of_split if r["model"] == model]
            figures[model] = compliance.summary(of_model, actions) | {
                "perplexity": perplexities[split][model],
                **choices.figure(chosen.get(model)),
            }
        found[split] = figures
        told = {k: figures[k]["rate"] for k in ("compliance_guarded", "compliance")}
        told["perplexity"] = figures["perplexity"]
        tracking.scalars(
            "evaluate",
            run.config.train.total_steps,
            {f"{split}/{name}": value for name, value in told.items()},
        )
    tracking.flush()
    first, *others = run.config.evaluate.splits
    out = found[first] | {
        "split": first,
        "guard": thresholds.to_json(),
        "policy": {"old": run.old_policy.hash, "new": run.new_policy.hash},
        "splits": {s: found[s] for s in others},
    }
    records.write_jsonl(run.workdir.path / "samples.jsonl", rows)
    records.write_json(run.workdir.path / "eval.json", out)
    rates = ("compliance_guarded", "compliance", "compliance_greedy")
    return {k: round(out[k]["rate"], 4) for k in rates} | responses.told_undecided(
        [row for row in rows if row["model"] == "trained"]
    )
