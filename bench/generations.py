"""A second policy change: on top of the first re-alignment, or from the start?

python -m bench.generations --config=configs/quickstart.py --workdir=runs/quickstart \\
    --third=synth_third --out=docs/results/synth_generations [--seeds=3] [--config.key=value]

The run in --workdir goes pi_0 -> pi_1 (it is finished first where it is not). Then two runs to pi_2
of --third are prepared: chained, with the finished run as parent, and direct, from the M_ref of
pi_0 and the original records; each is trained with several seeds. Same held-out prompts, base model
and guard; differences are paired.
"""

import sys
from pathlib import Path

from absl import flags

from bench import realign, results
from trace_jax import compare, comparison, generations, launch, policy, records
from trace_jax import config as config_lib
from trace_jax.errors import InputError
from trace_jax.evaluate import paired

FIGURES = ("compliance_guarded", "compliance", "retained", "compliance_old")


def measure(config, workdir: Path, third: str, n_seeds: int, jobs: int) -> dict:
    """Both ways to the third policy, a run a seed."""
    launch.realign(config, workdir)
    before = records.read_json(workdir / "config.json")
    kept = policy.diff(policy.load(before["policy"]["new"]), policy.load(third)).unchanged
    rows, perplexity = {}, {}
    for way, parent in (("chained", str(workdir)), ("direct", "")):
        own = {"parent": parent, "policy.new": third, "evaluate.splits": ("test", "validation")}
        of_way = config_lib.resolved(config_lib.with_overrides(config, own))
        prepared = workdir / "generations" / way
        launch.realign(of_way, prepared, only=",".join(compare.SHARED))
        targets = [prepared / f"seed{seed}" for seed in range(n_seeds)]
        todo = [(target, {"seed": seed}) for seed, target in enumerate(targets)]
        found = compare.run_all(of_way, prepared, todo, jobs)
        perplexity[way] = [row["perplexity"] for row in found]
        rows[way] = [
            comparison.rows_of(target / "samples.jsonl", "trained", "test", kept)
            for target in targets
        ]
    outcomes = {w: {f: comparison.outcomes(r, f) for f in FIGURES} for w, r in rows.items()}
    return {
        "policies": [before["policy"]["old"], before["policy"]["new"], third],
        "ways": {w: comparison.figures(r) | {"perplexity": perplexity[w]} for w, r in rows.items()},
        "chained_minus_direct": {
            f: vars_of(paired.compare(outcomes["chained"][f], outcomes["direct"][f]))
            for f in FIGURES
        },
        "history": generations.history(workdir),
        **results.machine(),
    }


def vars_of(found: paired.Paired) -> dict:
    """A paired comparison as JSON."""
    return {name: getattr(found, name) for name in ("difference", "low", "high", "p", "seeds", "n")}


def table() -> str:
    """Markdown of the committed results: both ways, and their paired difference."""
    lines = [
        "| | way | guarded, T=1 | unchanged clauses | the first policy | perplexity | commit |",
        "|---|---|---|---|---|---|---|",
    ]
    figures = ("compliance_guarded", "retained", "compliance_old")
    for name, found in realign.of_benchmarks("_generations").items():
        for way, row in found["ways"].items():
            cells = [realign.percent(row[figure]) for figure in figures]
            cells += [f"{sum(row['perplexity']) / len(row['perplexity']):.2f}", found["commit"]]
            lines.append(f"| {name} | {way} | {' | '.join(cells)} |")
        cells = []
        for figure in figures:
            d = {k: 100 * v for k, v in found["chained_minus_direct"][figure].items()}
            cells.append(f"{d['difference']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]")
        lines.append(f"| {name} | chained - direct | {' | '.join(cells)} | | |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Exit code 0 done, 2 bad input."""
    values = compare.define_flags(argv)
    flags.DEFINE_string("third", None, "The policy after policy.new.", flag_values=values)
    flags.DEFINE_string("out", None, "Results, without ending.", flag_values=values)
    try:
        launch.parse_flags(values, argv)
        if None in (values.config, values.workdir, values.third, values.out):
            raise InputError("--config, --workdir, --third and --out are needed")
        found = measure(
            values.config, Path(values.workdir), values.third, values.seeds, values.jobs
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = Path(values.out).with_suffix(".json")
    out.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(out, found)
    for way, row in found["ways"].items():
        rate = row["compliance_guarded"]
        mean = sum(row["perplexity"]) / len(row["perplexity"])
        interval = f"[{rate['low']:.1%}, {rate['high']:.1%}]"
        print(f"{way}: {rate['rate']:.1%} guarded {interval}, perplexity {mean:.2f}")
    d = found["chained_minus_direct"]["compliance_guarded"]
    print(f"chained - direct: {d['difference']:+.1%} [{d['low']:+.1%}, {d['high']:+.1%}]: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
