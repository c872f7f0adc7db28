"""The results of the README: methods, ablations and controls on one benchmark.

python -m bench.realign --config=configs/stories.py --workdir=runs/stories --name=stories \\
    [--jobs=2] [--config.key=value]
python -m bench.realign --readme    writes the tables of docs/results/*.json into README.md

A comparison (`trace_jax.compare`) with METHODS; writes docs/results/NAME.json with the machine,
versions and commit it ran on.
"""

import sys
import time
from pathlib import Path

from absl import flags

from bench import frontier
from trace_jax import compare, comparison_tables, launch, records
from trace_jax.errors import InputError

METHODS = (
    "trace,trace_no_impact,trace_no_kl,trace_no_triage,trace+train.punish=dual_npo,"
    "trace+impact.normalisation=sum_to_one,dpo,sft"
)
RESULTS = Path("docs/results")
BEGIN, END = "<!-- results: python -m bench.realign --readme -->", "<!-- end of results -->"


def measure(config, prepared: Path, name: str, methods: str, seeds: int, jobs: int) -> None:
    """Runs the comparison and writes its result file."""
    start = time.time()
    variants = compare.parse_methods(methods)
    found = compare.compare(config, prepared, variants, seeds, jobs)
    found |= {"name": name, "wall_seconds": round(time.time() - start), **frontier.machine()}
    weighed = compare.folder(prepared, variants[0], config.seed) / "impact_summary.json"
    found["summary"] = {
        "triage": records.read_json(prepared / ".stages" / "triage.json")["summary"],
        "impact": records.read_json(weighed),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    records.write_json(RESULTS / f"{name}.json", found)
    print(comparison_tables.markdown(found))


def readme() -> None:
    """Writes the tables into README.md."""
    path = Path("README.md")
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        raise InputError(f"README.md has no {BEGIN} ... {END}")
    names = sorted(
        p.stem for p in RESULTS.glob("*.json") if not p.stem.endswith(("_frontier", ".eval"))
    )
    sections = [section(records.read_json(RESULTS / f"{name}.json")) for name in names]
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
    values.set_default("methods", METHODS)
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
        measure(values.config, prepared, values.name, values.methods, values.seeds, values.jobs)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
