"""Stage triage: the judge's verdicts on both responses of every record, and the action."""

from trace_jax import metrics, records, triage
from trace_jax.stages import context


def run(run: context.Context) -> dict:
    """Writes triage.jsonl, in record order; a partial file is continued by id.

    Needs no accelerator and no jax.
    """
    found = [
        records.PreferenceRecord.from_json(row)
        for _, row in records.read_jsonl(run.file("prepare", "records.jsonl"))
    ]
    with run.progress(len(found), "triage") as bar:
        triage.run(found, run.judge, run.workdir.path / "triage.jsonl", progress=bar.advance)
    counts = triage.summary(triage.read(run.workdir.path / "triage.jsonl"))
    metrics.say(f"  {counts}")
    return {"actions": counts.actions}
