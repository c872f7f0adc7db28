"""The results: methods, ablations and controls on one benchmark.

python -m bench.realign --config=configs/stories.py --workdir=runs/stories --name=stories \\
    [--seeds=5] [--jobs=2] [--config.key=value]

A comparison (`trace_jax.compare`) of METHODS: trace as the config has it, the same on every
benchmark; every other tuned method where `bench.frontier` put it on validation prompts of this one
(docs/results/NAME_frontier.json); the rest at the point of the method they vary. Every run keeps
its best evaluation on validation prompts (train.keep_best). Writes docs/results/NAME.json, .md,
.tex and .png with the machine, versions and commit; `bench.pages` makes tables of the JSON.
"""

import sys
import time
from pathlib import Path

from absl import flags

from bench import frontier, results
from trace_jax import compare, comparison_tables, launch, records
from trace_jax.errors import InputError

# Name in the tables -> (method or variant, the method whose operating point it takes).
METHODS = {
    "trace": ("trace", "trace"),
    "trace_no_impact": ("trace_no_impact", "trace"),
    "trace_full_weights": ("trace_full_weights", "trace"),
    "trace_no_nll": ("trace+train.alpha_nll=0", "trace"),
    "trace_no_retain_pairs": ("trace+train.retain_pairs=False", "trace"),
    "trace_no_kl": ("trace_no_kl", "trace"),
    "trace_no_triage": ("trace_no_triage", "npo"),  # it unlearns all, as npo the conflicts
    "trace_dual_npo": ("trace_dual_npo", "trace"),
    "trace_shuffled": ("trace_shuffled", "trace"),
    "trace_invert_only": ("trace_invert_only", "trace"),
    "trace_paper": ("trace_paper", "trace_paper"),
    "dpo_gold": ("dpo_gold", "dpo_gold"),
    "dpo_gold_uncorrected": ("dpo_gold_uncorrected", "dpo_gold"),
    "dpo_gold_nll": ("dpo_gold_nll", "dpo_gold"),
    "trace@beta": ("trace", "trace"),
    "dpo_gold@beta": ("dpo_gold", "dpo_gold"),
    "naive_oracle_dpo": ("naive_oracle_dpo", "naive_oracle_dpo"),
    "npo": ("npo", "npo"),
    "u2a": ("u2a", "u2a"),
    "u2a_ga": ("u2a+u2a.inner=ga", "u2a"),
    "u2a_graddiff": ("u2a+u2a.inner=graddiff", "u2a"),
    "sft": ("sft", "sft"),
}
BETA_OF = {"trace@beta": "dpo_gold", "dpo_gold@beta": "trace"}  # else its own point's
AS_CONFIGURED = "trace"  # its point is the config's
RESULTS = Path("docs/results")
# Rows and columns that a README has no room for; docs/results.md has them.
NOT_IN_SHORT = (
    "trace_no_nll", "trace_no_retain_pairs", "trace_dual_npo", "dpo_gold_uncorrected",
    "dpo_gold_nll", "trace@beta", "dpo_gold@beta", "u2a_ga", "u2a_graddiff",
    "unchanged, guarded", "old policy", "ties", "win rate, guarded",
)  # fmt: skip
# What the paper reports (Llama-3.1-8B, percent), the method and the figure of ours beside it.
PAPER = (
    ("TPA, TRACE, 20k pairs", "70.7", "trace", "compliance_guarded"),
    ("TPA, Naive Oracle DPO, 20k pairs", "52.2", "naive_oracle_dpo", "compliance_guarded"),
    ("TPA, without triage", "58.1", "trace_no_triage", "compliance_guarded"),
    ("TPA, without KL", "71.5", "trace_no_kl", "compliance_guarded"),
    ("TPA, without impact weights", "62.8", "trace_no_impact", "compliance_guarded"),
    ("TPA, DPO-Gold", "73.8", "dpo_gold", "compliance_guarded"),
    ("TPA, U2A", "55.8", "u2a", "compliance_guarded"),
    ("win rate over U2A, DPO-Gold", "87.1 / 92.4", "dpo_gold", "win_rate_vs_u2a"),
    ("win rate over U2A, TRACE", "81.8 / 85.3", "trace", "win_rate_vs_u2a"),
)


def variants(names: list[str], tuned: dict, config) -> list[compare.Variant]:
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
        point = _point(at, tuned, config)
        keys = {"learning_rate": "learning_rate", "beta": "beta", "steps": "total_steps"}
        own = {f"train.{key}": point[name_] for name_, key in keys.items()}
        if name in BETA_OF:
            own["train.beta"] = _point(BETA_OF[name], tuned, config)["beta"]
        own |= {"train.keep_best": True, "train.evaluate_prompts": frontier.PROMPTS}
        own["train.evaluate_every"] = max(1, round(point["steps"] / frontier.EVALUATIONS))
        found.append(compare.Variant(name, own | variant.overrides))
    return found


def _point(method: str, tuned: dict, config) -> dict:
    if method == AS_CONFIGURED:
        train = config.train
        return {
            "learning_rate": train.learning_rate,
            "beta": train.beta,
            "steps": train.total_steps,
        }
    if method not in tuned["methods"]:
        raise InputError(f"the frontier has no points of {method}; run bench.frontier with it")
    of = tuned["methods"][method]
    return of["best"] or min(of["points"], key=lambda row: row["perplexity"])


def measure(config, prepared: Path, name: str, methods: list[str], seeds: int, jobs: int) -> None:
    """Runs the comparison and writes its result files."""
    start = time.time()
    tuned = records.read_json(RESULTS / f"{name}_frontier.json")
    chosen = variants(methods, tuned, config)
    folders = [compare.folder(prepared, v, config.seed + n) for v in chosen for n in range(seeds)]
    anew = {"runs": sum(not f.exists() for f in folders), "jobs": jobs}
    anew["with_preparation"] = not (prepared / ".stages").exists()
    found = compare.compare(config, prepared, chosen, seeds, jobs)
    found["operating_points"] = {v.name: v.overrides for v in chosen}
    found |= {"name": name, **results.machine()}
    anew |= {"wall_seconds": round(time.time() - start), "commit": found["commit"]}
    found["timings"] = [*_timings(name, anew["with_preparation"]), anew]
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


def _timings(name: str, is_first: bool) -> list[dict]:
    """Of earlier calls that made runs of this workdir, as a comparison goes on where it ended."""
    path = RESULTS / f"{name}.json"
    return [] if is_first or not path.exists() else records.read_json(path).get("timings", [])


def of_benchmarks(ending: str) -> dict[str, dict]:
    """Benchmark -> its committed docs/results/NAME<ending>.json."""
    paths = sorted(RESULTS.glob(f"*{ending}.json"))
    return {p.name.removesuffix(f"{ending}.json"): records.read_json(p) for p in paths}


def blind() -> str:
    """Runs of whole seeds (prompts, records, base and M_ref anew), of which no choice was made."""
    lines = [
        "| seed | M_ref, guarded | re-aligned, guarded | perplexity | M_ref's |",
        "|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("synth_blind_seed*.eval.json")):
        found = records.read_json(path)
        seed = path.name.removeprefix("synth_blind_seed").removesuffix(".eval.json")
        before, after = (percent(of["compliance_guarded"]) for of in (found["ref"], found))
        perplexity = f"{found['perplexity']:.2f} | {found['ref']['perplexity']:.2f}"
        lines.append(f"| {seed} | {before} | {after} | {perplexity} |")
    return "\n".join(lines)


def committed() -> list[dict]:
    """The results of every benchmark, methods as in METHODS."""
    read = [records.read_json(path) for path in sorted(RESULTS.glob("*.json"))]
    return [_in_order(found) for found in read if "name" in found]


def tables() -> str:
    """Everything that is known of every benchmark."""
    return "\n".join(section(found) for found in committed())


def in_short() -> str:
    """The methods of the paper on every benchmark."""
    return "\n\n".join(
        f"**{found['name']}** (commit {found['commit']}, {len(found['seeds'])} seeds"
        f"{_older(found, '; ')})\n\n" + comparison_tables.table(found, NOT_IN_SHORT)
        for found in committed()
    )


def _older(found: dict, before: str = "") -> str:
    """How it was measured otherwise than today, after `before`; "" where it was not."""
    if found["operating_points"]["trace"].get("train.keep_best"):
        return ""
    return (
        f"{before}measured at the ends of runs, not at their best evaluations, with an earlier "
        "default of trace"
    )


def answers() -> str:
    """The statements of the paper on rows of a README, with the answer of every benchmark."""
    of = {found["name"]: _answers(found) for found in committed()}
    claims = list(dict.fromkeys(claim for found in of.values() for claim in found))
    lines = [f"| | A - B | {' | '.join(of)} |", "|---" * (len(of) + 2) + "|"]
    for claim, compared in claims:
        cells = [found.get((claim, compared), "-") for found in of.values()]
        lines.append(f"| {claim} | {compared} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _answers(found: dict) -> dict[tuple[str, str], str]:
    """(claim, what is compared) -> difference and answer."""
    told = zip(found["statements"], comparison_tables.statements(found), strict=True)
    return {
        (
            claim if figure == "guarded" else f"{claim} ({figure})",
            comparison_tables.sides(row),
        ): f"{difference}: **{answer}**"
        for row, (claim, figure, difference, answer) in told
        if figure != "raw" and not {row["a"], row["b"]} & set(NOT_IN_SHORT)
    }


def _in_order(found: dict) -> dict:
    """Methods as in METHODS, behind base and M_ref; JSON has them by name."""
    names = [name for name in ("base", "M_ref", *METHODS) if name in found["methods"]]
    return found | {"methods": {name: found["methods"][name] for name in names}}


def beside_the_paper() -> str:
    """The paper's figures and ours, percent with intervals."""
    read = committed()
    names = [found["name"] for found in read]
    lines = [
        f"| | paper, Llama-3.1-8B | {' | '.join(f'here, {name}' for name in names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    for what, theirs, method, figure in PAPER:
        cells = [found["methods"].get(method, {}).get(figure) for found in read]
        ours = ["-" if cell is None else percent(cell) for cell in cells]
        lines.append(f"| {what} | {theirs} | {' | '.join(ours)} |")
    for found in read:
        if older := _older(found):
            where = "here and in the tables of the ablation and the gap below"
            lines += ["", f"{found['name']}, {where}: {older}."]
    return "\n".join([*lines, ""])


def percent(rate: dict) -> str:
    """Of a share with its interval."""
    return f"{100 * rate['rate']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def section(found: dict) -> str:
    """One benchmark's table with its provenance."""
    actions = ", ".join(f"{k} {n}" for k, n in found["summary"]["triage"]["actions"].items())
    versions = found.get("versions", found)  # of earlier results they were beside the rest
    provenance = (
        f"`docs/results/{found['name']}.json`{_older(found, '; ')}; commit {found['commit']}, "
        f"jax {versions['jax']}, {found['machine']}, CPU only; "
        f"triage: {actions}; unchanged clauses: {', '.join(found['unchanged_clauses'])}."
    )
    made = [
        f"{t['runs']} in {t['wall_seconds'] / 60:.0f} min"
        + " with all that they share" * t["with_preparation"]
        for t in found.get("timings", [])
        if t["runs"]
    ]
    if made:
        provenance += f" Runs, {found['timings'][0]['jobs']} at a time: {', '.join(made)}."
    return f"### {found['name']}\n\n{comparison_tables.markdown(found)}\n{provenance}\n"


def main(argv: list[str]) -> int:
    """Exit code 0 done, 2 bad input."""
    values = compare.define_flags(argv)
    values.set_default("methods", ",".join(METHODS))
    flags.DEFINE_string("name", None, "Name of the result file.", flag_values=values)
    try:
        launch.parse_flags(values, argv)
        if None in (values.config, values.workdir, values.name):
            raise InputError("--config, --workdir and --name are needed")
        prepared = Path(values.workdir)
        names = [name.strip() for name in values.methods.split(",")]
        measure(values.config, prepared, values.name, names, values.seeds, values.jobs)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
