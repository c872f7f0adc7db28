"""Is the default of trace as good as dpo_gold, at no more perplexity? Many seeds, many samples.

python -m bench.against_gold --config=configs/stories.py --workdir=runs/stories4 --name=stories \\
    [--seeds=10] [--jobs=2] [--config.key=value]

trace as the config has it, the same in every config of a benchmark; dpo_gold where
`bench.frontier` put it (docs/results/NAME_frontier.json). Both keep their best evaluation on
validation prompts. Four samples a prompt; paired difference over prompts and seeds on the test
prompts. Writes docs/results/NAME_against_gold.json. The workdir is one of its own, since the number
of samples decides what stage baseline writes.
"""

import sys
import time
from pathlib import Path

from absl import flags

from bench import realign, results
from trace_jax import compare, launch, records
from trace_jax import config as config_lib
from trace_jax.errors import InputError

SAMPLES = 4
MARGIN = -0.05  # not below by more than this


def measure(config, prepared: Path, tuned: dict, seeds: int, jobs: int) -> dict:
    """The comparison, and whether the answer is yes."""
    chosen = realign.variants(["trace", "dpo_gold"], tuned, config)
    config = config_lib.with_overrides(config, {"evaluate.samples": SAMPLES})
    found = compare.compare(config, prepared, chosen, seeds, jobs, winrate=False)
    (test,) = [t for t in found["tests"] if t["figure"] == "compliance_guarded"
               and {t["a"], t["b"]} == {"trace", "dpo_gold"}]  # fmt: skip
    perplexity = {v.name: found["methods"][v.name]["perplexity"] for v in chosen}
    return found | {
        "operating_points": {v.name: v.overrides for v in chosen},
        "difference": test,
        "not_below": test["low"] > MARGIN,
        "no_more_perplexity": perplexity["trace"] <= perplexity["dpo_gold"],
    }


def table() -> str:
    """Markdown of the committed results."""
    lines = [
        "| | trace, guarded | dpo_gold | difference, points | perplexity | dpo_gold's | commit |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in realign.of_benchmarks("_against_gold").items():
        ours, gold = (found["methods"][name] for name in ("trace", "dpo_gold"))
        d = {k: 100 * found["difference"][k] for k in ("difference", "low", "high")}
        cells = [
            realign.percent(ours["compliance_guarded"]),
            realign.percent(gold["compliance_guarded"]),
            f"{d['difference']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]",
            f"{ours['perplexity']:.2f}",
            f"{gold['perplexity']:.2f}",
            found["commit"],
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Exit code 0 done, 2 bad input."""
    values = compare.define_flags(argv)
    values.set_default("seeds", 10)
    flags.DEFINE_string("name", None, "Name of the result file.", flag_values=values)
    try:
        launch.parse_flags(values, argv)
        if None in (values.config, values.workdir, values.name):
            raise InputError("--config, --workdir and --name are needed")
        start = time.time()
        tuned = records.read_json(realign.RESULTS / f"{values.name}_frontier.json")
        found = measure(values.config, Path(values.workdir), tuned, values.seeds, values.jobs)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found |= {"wall_seconds": round(time.time() - start), **results.machine()}
    records.write_json(realign.RESULTS / f"{values.name}_against_gold.json", found)
    d = found["difference"]
    print(
        f"trace - dpo_gold: {d['difference']:+.1%} [{d['low']:+.1%}, {d['high']:+.1%}] guarded; "
        f"not below: {found['not_below']}; no more perplexity: {found['no_more_perplexity']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
