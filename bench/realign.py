"""The results of the README: methods, ablations and controls on one benchmark.

python -m bench.realign --config=configs/stories.py --workdir=runs/stories --name=stories \\
    [--seeds=5] [--jobs=2] [--config.key=value]
python -m bench.realign --readme    writes the tables of docs/results/*.json into README.md

A comparison (`trace_jax.compare`) with METHODS at the operating points that `bench.frontier` chose
on validation (docs/results/NAME_frontier.json): each tuned method at its own, the others at that of
the method they vary. Writes docs/results/NAME.json, .md, .tex and .png with the machine, versions
and commit.
"""

import sys
import time
from pathlib import Path

from absl import flags

from bench import frontier
from trace_jax import compare, comparison_tables, launch, records
from trace_jax.errors import InputError

# Name in the tables -> (method or variant, the tuned method whose operating point it takes).
METHODS = {
    "trace": ("trace", "trace"),
    "trace_no_impact": ("trace_no_impact", "trace_no_impact"),
    "trace_no_nll": ("trace+train.alpha_nll=0", "trace"),
    "trace_no_kl": ("trace_no_kl", "trace"),
    "trace_no_triage": ("trace_no_triage", "trace"),
    "trace_dual_npo": ("trace_dual_npo", "trace"),
    "trace_shuffled": ("trace_shuffled", "trace"),
    "trace_invert_only": ("trace_invert_only", "trace"),
    "trace_paper": ("trace_paper", "trace_paper"),
    "dpo_gold": ("dpo_gold", "dpo_gold"),
    "dpo_gold_uncorrected": ("dpo_gold_uncorrected", "dpo_gold"),
    "naive_oracle_dpo": ("naive_oracle_dpo", "naive_oracle_dpo"),
    "npo": ("npo", "npo"),
    "u2a": ("u2a", "u2a"),
    "sft": ("sft", "sft"),
}
RESULTS = Path("docs/results")
BEGIN, END = "<!-- results: python -m bench.realign --readme -->", "<!-- end of results -->"


def variants(names: list[str], tuned: dict) -> list[compare.Variant]:
    """The methods of the table at their operating points.

    A method none of whose points kept the perplexity limit takes the one nearest to it.
    """
    if "methods" not in tuned:
        raise InputError("the frontier is of an older bench.frontier; run it again")
    found = []
    for name in names:
        if name not in METHODS:
            raise InputError(f"--methods: {name!r} is none of {', '.join(METHODS)}")
        text, at = METHODS[name]
        (variant,) = compare.parse_methods(text)
        if at not in tuned["methods"]:
            raise InputError(f"the frontier has no points of {at}; run bench.frontier with it")
        of = tuned["methods"][at]
        point = of["best"] or min(of["points"], key=lambda row: row["perplexity"])
        keys = {"learning_rate": "learning_rate", "beta": "beta", "steps": "total_steps"}
        own = {f"train.{key}": point[name_] for name_, key in keys.items()}
        found.append(compare.Variant(name, own | variant.overrides))
    return found


def measure(config, prepared: Path, name: str, methods: list[str], seeds: int, jobs: int) -> None:
    """Runs the comparison and writes its result files."""
    start = time.time()
    tuned = records.read_json(RESULTS / f"{name}_frontier.json")
    chosen = variants(methods, tuned)
    found = compare.compare(config, prepared, chosen, seeds, jobs)
    found["operating_points"] = {v.name: v.overrides for v in chosen}
    found |= {"name": name, "wall_seconds": round(time.time() - start), **frontier.machine()}
    weighed = compare.folder(prepared, chosen[0], config.seed) / "impact_summary.json"
    found["summary"] = {
        "triage": records.read_json(prepared / ".stages" / "triage.json")["summary"],
        "impact": records.read_json(weighed),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    records.write_json(RESULTS / f"{name}.json", found)
    (RESULTS / f"{name}.md").write_text(comparison_tables.markdown(found))
    (RESULTS / f"{name}.tex").write_text(comparison_tables.latex(found))
    comparison_tables.plot(found, RESULTS / f"{name}.png")
    print(comparison_tables.markdown(found))


def readme() -> None:
    """Writes the tables into README.md."""
    path = Path("README.md")
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        raise InputError(f"README.md has no {BEGIN} ... {END}")
    read = {path.stem: records.read_json(path) for path in sorted(RESULTS.glob("*.json"))}
    sections = [section(found) for found in read.values() if "operating_points" in found]
    path.write_text(before + BEGIN + "\n\n" + "\n".join(sections) + END + after)


def section(found: dict) -> str:
    """One benchmark's table with its provenance."""
    actions = ", ".join(f"{k} {n}" for k, n in found["summary"]["triage"]["actions"].items())
    provenance = (
        f"`docs/results/{found['name']}.json`; commit {found['commit']}, jax {found['jax']}, "
        f"{found['machine']}, CPU only; "
        f"triage: {actions}; unchanged clauses: {', '.join(found['unchanged_clauses'])}."
    )
    return f"### {found['name']}\n\n{comparison_tables.markdown(found)}\n{provenance}\n"


def main(argv: list[str]) -> int:
    """Exit code 0 done, 2 bad input."""
    values = compare.define_flags(argv)
    values.set_default("methods", ",".join(METHODS))
    flags.DEFINE_string("name", None, "Name of the result file.", flag_values=values)
    flags.DEFINE_bool("readme", False, "Only write the tables into README.md.", flag_values=values)
    try:
        launch.parse_flags(values, argv)
        if values.readme:
            readme()
            return 0
        if None in (values.config, values.workdir, values.name):
            raise InputError("--config, --workdir and --name are needed (or --readme)")
        prepared = Path(values.workdir)
        names = [name.strip() for name in values.methods.split(",")]
        measure(values.config, prepared, values.name, names, values.seeds, values.jobs)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
