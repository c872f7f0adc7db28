"""Stage triage: the judge's verdicts on both responses of every record, and the action."""

import dataclasses
from collections.abc import Sequence

from trace_jax import coverage, metrics, noise, overrides, records, triage
from trace_jax.judges import ensemble
from trace_jax.stages import context


def run(run: context.Context) -> dict:
    """Writes triage.jsonl, in record order, and coverage.json; a partial file is continued by id.

    Needs no accelerator and no jax, unless the judge does.
    """
    path, config = run.workdir.path / "triage.jsonl", run.config.triage
    found = [
        records.PreferenceRecord.from_json(row)
        for _, row in records.read_jsonl(run.file("prepare", "records.jsonl"))
    ]
    settings = _settings(run, [r.id for r in found])
    with run.progress(2 * len(found), f"triage by {run.triage_judge.id}") as bar:
        counts = triage.run(found, run.triage_judge, path, settings, progress=bar.advance)
    triaged = triage.read(path)
    clauses = coverage.of(run.new_policy, triaged, least=config.coverage_least)
    records.write_json(
        run.workdir.path / "coverage.json", [dataclasses.asdict(clause) for clause in clauses]
    )
    _tell(run, triaged, counts, clauses, settings)
    summary = {"actions": counts.actions, "judge_errors": counts.errors}
    summary |= {"abstentions": counts.abstentions, "overridden": len(settings.by_hand)}
    if isinstance(run.judge, ensemble.EnsembleJudge):
        summary["agreement"] = run.judge.agreement()  # of what this run judged
        for name, alpha in summary["agreement"].items():
            said = "not defined" if alpha is None else f"{alpha:.2f}"
            metrics.say(f"  agreement of the judges on {name}: Krippendorff's alpha {said}")
    return summary | {"corrupted": len(settings.corruptions)}


def _settings(run: context.Context, ids: Sequence[str]) -> triage.Settings:
    config = run.config.triage
    by_hand = overrides.read(config.overrides, ids) if config.overrides else {}
    return triage.Settings(
        decide_by=config.decide_by,
        compliant_from=config.compliant_from,
        violating_below=config.violating_below,
        soft=config.soft,
        by_hand=by_hand,
        corruptions=noise.plan(ids, share=config.noise, seed=config.noise_seed),
    )


def _tell(
    run: context.Context,
    triaged: Sequence[records.TriagedRecord],
    counts: triage.Summary,
    clauses: Sequence[coverage.Clause],
    settings: triage.Settings,
) -> None:
    total = sum(counts.actions.values())
    unresolved = counts.actions["UNRESOLVED"]
    metrics.say(f"  {counts} ({unresolved / total:.0%} UNRESOLVED)")
    if settings.by_hand:
        metrics.say(f"  {len(settings.by_hand)} records decided by people")
    if settings.corruptions:
        metrics.say(f"  {len(settings.corruptions)} records corrupted on purpose (triage.noise)")
    if counts.errors:
        metrics.say(
            f"  warning: no verdict on {counts.errors} responses after every try; run again with "
            "--redo to ask them again"
        )
    if not counts.actions["INVERT"] + counts.actions["PUNISH"]:
        metrics.say(
            "  warning: no record is INVERT or PUNISH: the data agrees with policy.new, or the "
            "judge misses what violates it"
        )
    if idle := sum(triage.trains_nothing(t) for t in triaged):
        metrics.say(
            f"  {idle} records train nothing: python -m trace_jax.shortlist "
            f"{run.workdir.path} lists those most worth a look by people"
        )
    for line in coverage.warnings(clauses, least=run.config.triage.coverage_least):
        metrics.say(f"  warning: {line}")
