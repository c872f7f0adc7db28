"""Several methods and seeds over one prepared workdir: same records, M_ref, verdicts, corrections.

python -m trace_jax.compare --config=FILE --workdir=DIR --methods=trace,dpo,sft --seeds=3 \\
    [--jobs=2] [--config.key=value]

A method may carry overrides: `trace+train.punish=dual_npo`. Each run has its own folder,
DIR/compare/<method>-seed<k>, with its own impact, train and evaluate stages, so an interrupted
comparison goes on. Writes comparison.json and comparison.md.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from trace_jax import config as config_lib
from trace_jax import launch, methods, metrics, policy, records, stages, validation, workdir
from trace_jax.errors import InputError
from trace_jax.stages import context

SHARED = ("prepare", "align", "triage", "baseline", "correct")
OWN = ("impact", "train", "evaluate")
FIGURES = ("compliance_guarded", "compliance", "compliance_greedy", "retained", "compliance_old")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A method with overrides of the config, under the name it has in tables."""

    name: str
    overrides: dict[str, str]


def parse_methods(text: str) -> list[Variant]:
    """ "trace,trace+train.punish=dual_npo" -> variants."""
    found = []
    for name in (part.strip() for part in text.split(",") if part.strip()):
        method, *pairs = name.split("+")
        split = [pair.partition("=") for pair in pairs]
        if any(not equals for _, equals, _ in split):
            raise InputError(f"--methods={name}: an override reads key=value")
        preset = methods.PRESETS.get(method, {"train.method": method})
        found.append(Variant(name, preset | {key: value for key, _, value in split}))
    if len({v.name for v in found}) < len(found) or not found:
        raise InputError(f"--methods={text}: name each method once")
    return found


def folder(prepared: Path, variant: Variant, seed: int) -> Path:
    """Where a run of the comparison lives."""
    return prepared / "compare" / f"{variant.name.replace('/', '_')}-seed{seed}"


def run_variant(config: dict, prepared: Path, target: Path) -> dict:
    """Runs a variant's own stages in `target`, returns its eval.json. Arguments cross processes."""
    settings = ml_collections.ConfigDict(config)
    settings.evaluate.splits = tuple(settings.evaluate.splits)
    directory = workdir.Workdir(target, workdir.Workdir(prepared), frozenset(SHARED))
    target.mkdir(parents=True, exist_ok=True)
    run = context.Context(settings, directory)
    stages.run(run, stages.chosen(",".join(OWN)), redo=True)
    return records.read_json(target / "eval.json")


def run_all(
    config: ml_collections.ConfigDict, prepared: Path, todo: Sequence[tuple[Path, dict]], jobs: int
) -> list[dict]:
    """Runs (folder, overrides) pairs, `jobs` at once, and returns their eval.json in order."""
    configs = [config_lib.with_overrides(config, overrides) for _, overrides in todo]
    for one in configs:
        validation.validate(one)
    work = [
        (one.to_dict(), prepared, target) for one, (target, _) in zip(configs, todo, strict=True)
    ]
    with metrics.progress(len(work), "compare") as bar:
        if jobs == 1:
            return [_counted(run_variant(*item), bar) for item in work]
        cores = multiprocessing.Manager().Queue()
        for core in sorted(os.sched_getaffinity(0)) * jobs:
            cores.put(core)
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
            jobs, spawn, initializer=_pin, initargs=(cores,)
        ) as pool:
            return [
                _counted(future.result(), bar)
                for future in [pool.submit(run_variant, *item) for item in work]
            ]


def _pin(cores) -> None:
    """One core a process: several times faster for small micro-batches than shared threads."""
    os.sched_setaffinity(0, {cores.get()})


def _counted(found: dict, bar) -> dict:
    bar.advance(1)
    return found


def compare(
    config: ml_collections.ConfigDict,
    prepared: Path,
    variants: Sequence[Variant],
    n_seeds: int,
    jobs: int = 1,
) -> dict:
    """Runs everything that is not there yet and returns the comparison (see `summary`)."""
    config = config_lib.resolved(config)
    seeds = [config.seed + k for k in range(n_seeds)]
    for variant in variants:
        validation.validate(config_lib.with_overrides(config, variant.overrides))
    launch.realign(config, prepared, only=",".join(SHARED))
    todo = [(folder(prepared, v, s), v.overrides | {"seed": s}) for v in variants for s in seeds]
    run_all(config, prepared, todo, jobs)
    return summary(config, prepared, variants, seeds)


def summary(
    config: ml_collections.ConfigDict,
    prepared: Path,
    variants: Sequence[Variant],
    seeds: Sequence[int],
) -> dict:
    """comparison.json; "tests" are paired differences of guarded compliance to the first method."""
    from trace_jax.evaluate import compliance, statistics

    split = config.evaluate.splits[0]
    kept = policy.diff(policy.load(config.policy.old), policy.load(config.policy.new)).unchanged
    rows = {
        v.name: [
            _rows(folder(prepared, v, s) / "samples.jsonl", "trained", split, kept) for s in seeds
        ]
        for v in variants
    }
    perplexity = {
        v.name: [
            records.read_json(folder(prepared, v, s) / "eval.json")["perplexity"] for s in seeds
        ]
        for v in variants
    }
    before = {m: [_rows(prepared / "baseline.jsonl", m, split, kept)] for m in ("base", "ref")}
    known = records.read_json(prepared / "perplexity.json")[split]
    first = variants[0].name
    guarded = {
        name: compliance.outcomes([r for rs in of for r in rs if r["mode"] == "sample"], "guarded")
        for name, of in rows.items()
    }
    return {
        "methods": {name: _figures(of) | _spread(perplexity[name]) for name, of in rows.items()},
        **{m: _figures(of) | {"perplexity": known[m]} for m, of in before.items() if of[0]},
        "seeds": list(seeds),
        "split": split,
        "unchanged_clauses": list(kept),
        "tests": [
            {"a": first, "b": name, "figure": "compliance_guarded"}
            | dataclasses.asdict(statistics.paired_difference(guarded[first], guarded[name]))
            for name in rows
            if name != first
        ],
    }


def _rows(path: Path, model: str, split: str, kept: Sequence[str]) -> list[dict]:
    found = (row for _, row in records.read_jsonl(path))
    return [
        row | {"retained": all(row["clauses"][c] == "compliant" for c in kept)}
        for row in found
        if row["model"] == model and row["split"] == split
    ]


def _figures(of_seeds: Sequence[Sequence[dict]]) -> dict:
    """Rates over seeds; `seeds` are the rates of each."""
    from trace_jax.evaluate import compliance, statistics

    keys = {"compliance_guarded": ("guarded", "sample"), "compliance": ("compliant", "sample")}
    keys |= {"compliance_greedy": ("compliant", "greedy"), "retained": ("retained", "sample")}
    keys |= {"compliance_old": ("old_compliant", "sample")}
    out = {}
    for name, (key, mode) in keys.items():
        outcomes = [
            compliance.outcomes([r for r in rows if r["mode"] == mode], key) for rows in of_seeds
        ]
        found = statistics.rate_over_seeds(outcomes)
        out[name] = dataclasses.asdict(found) | {"seeds": [float(o.mean()) for o in outcomes]}
    return out


def _spread(values: Sequence[float]) -> dict:
    return {"perplexity": sum(values) / len(values), "perplexity_seeds": list(values)}


def markdown(found: dict) -> str:
    """The comparison as a Markdown table, percent with 95 % intervals."""
    lines = [
        "| | guarded, T=1 | raw, T=1 | greedy | unchanged clauses | old policy | perplexity |",
        "|---|---|---|---|---|---|---|",
    ]
    named = [("base", found.get("base")), ("M_ref", found.get("ref")), *found["methods"].items()]
    for name, row in named:
        if row:
            cells = " | ".join(_cell(row[key]) for key in FIGURES)
            lines.append(f"| {name} | {cells} | {row['perplexity']:.2f} |")
    seeds = ", ".join(map(str, found["seeds"]))
    lines += ["", f"Percent [95 % interval]; {found['split']} prompts; seeds {seeds}.", ""]
    for test in found["tests"]:
        lines.append(
            f"- {test['a']} - {test['b']}: {100 * test['difference']:+.1f} points guarded "
            f"[{100 * test['low']:+.1f}, {100 * test['high']:+.1f}]"
        )
    return "\n".join(lines) + "\n"


def _cell(rate: dict) -> str:
    return f"{100 * rate['rate']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The flags of a comparison, anew for every call."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Experiment file, see configs/.", flag_values=values, sys_argv=argv
    )
    define = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "Prepared run (prepared first where it is not).", **define)
    flags.DEFINE_string("methods", "trace", "Methods, joined by commas: name+key=value.", **define)
    flags.DEFINE_integer("seeds", 3, "Runs a method: config.seed, config.seed + 1, ...", **define)
    flags.DEFINE_integer("jobs", 1, "Processes at once, each on a core of its own.", **define)
    flags.DEFINE_bool("help", False, "Show the flags.", short_name="h", **define)
    return values


def main(argv: list[str]) -> int:
    """Exit code 0 done, 2 bad input."""
    try:
        values = define_flags(argv)
        launch.parse_flags(values, argv)
        if values.help:
            print(f"{__doc__}\n{values.get_help()}")
            return 0
        if values.config is None or values.workdir is None:
            raise InputError("--config=FILE and --workdir=DIR are needed")
        target, variants = Path(values.workdir), parse_methods(values.methods)
        found = compare(values.config, target, variants, values.seeds, values.jobs)
    except InputError as error:
        print("error:", str(error).replace("\n", " "), file=sys.stderr)
        return 2
    records.write_json(target / "comparison.json", found)
    (target / "comparison.md").write_text(markdown(found))
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
