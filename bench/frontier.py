"""Where to operate: guarded compliance against perplexity over a grid, on the VALIDATION split.

python -m bench.frontier --config=configs/stories.py --workdir=runs/stories \\
    --out=docs/results/stories_frontier --grid=3e-4:0.1:150,1e-3:0.1:150 \\
    [--methods=trace] [--jobs=2] [--config.key=value]

A grid point is learning rate : beta : steps. Every point runs once (the config's seed) over the
prepared workdir. Writes OUT.json and OUT.png and names the best point by guarded compliance at T=1
among those whose perplexity on the base model's own samples is at most 10 % over M_ref's. The test
prompts are never read.
"""

import platform
import subprocess
import sys
from pathlib import Path

from absl import flags

from trace_jax import compare, launch, records
from trace_jax.errors import InputError

LIMIT = 1.10  # perplexity over M_ref's


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "machine": f"{platform.machine()}, {platform.system()}",
        "commit": commit.stdout.strip(),
        **launch.versions(),
    }


def points(grid: list[str], method: str) -> list[compare.Variant]:
    """Grid points as variants of one method."""
    found = []
    for text in grid:
        parts = text.split(":")
        if len(parts) != 3:
            raise InputError(f"--grid={text}: a point reads learning_rate:beta:steps")
        learning_rate, beta, steps = parts
        keys = f"train.learning_rate={learning_rate}+train.beta={beta}+train.total_steps={steps}"
        found += compare.parse_methods(f"{method}+{keys}")
    return found


def frontier(config, prepared: Path, variants: list[compare.Variant], jobs: int) -> dict:
    """Validation figures of all points and M_ref; the best point, None if none keeps the limit."""
    launch.realign(config, prepared, only=",".join(compare.SHARED))
    own = {"evaluate.splits": ("validation",), "seed": config.seed}
    todo = [(prepared / "frontier" / v.name, v.overrides | own) for v in variants]
    evaluated = compare.run_all(config, prepared, todo, jobs)
    rows = []
    for variant, found in zip(variants, evaluated, strict=True):
        figures = {
            k: found[k]["rate"] for k in ("compliance_guarded", "compliance", "compliance_greedy")
        }
        rows.append(
            {
                "name": variant.name,
                **variant.overrides,
                **figures,
                "perplexity": found["perplexity"],
            }
        )
    ref = {k: evaluated[0]["ref"][k]["rate"] for k in ("compliance_guarded", "compliance")}
    ref["perplexity"] = evaluated[0]["ref"]["perplexity"]
    allowed = [r for r in rows if r["perplexity"] <= LIMIT * ref["perplexity"]]
    best = max(allowed, key=lambda r: r["compliance_guarded"], default=None)
    return {
        "split": "validation",
        "limit": LIMIT,
        "ref": ref,
        "points": rows,
        "best": best,
        **machine(),
    }


def plot(found: dict, path: Path) -> None:
    """Guarded compliance against perplexity, one mark a point, the limit as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for beta in sorted({r["train.beta"] for r in found["points"]}, key=float):
        rows = sorted(
            (r for r in found["points"] if r["train.beta"] == beta), key=lambda r: r["perplexity"]
        )
        axes.plot(
            [r["perplexity"] for r in rows],
            [100 * r["compliance_guarded"] for r in rows],
            "o-",
            label=f"beta {beta}",
        )
        for r in rows:
            label = f"{float(r['train.learning_rate']):g}, {r['train.total_steps']} steps"
            axes.annotate(
                label,
                (r["perplexity"], 100 * r["compliance_guarded"]),
                fontsize=7,
                xytext=(3, 4),
                textcoords="offset points",
            )
    axes.plot(
        found["ref"]["perplexity"],
        100 * found["ref"]["compliance_guarded"],
        "k*",
        markersize=12,
        label="M_ref",
    )
    axes.axvline(
        found["limit"] * found["ref"]["perplexity"],
        color="grey",
        linestyle="--",
        label="limit: M_ref + 10 %",
    )
    axes.margins(x=0.15)
    axes.set_xlabel("perplexity of base text (lower: closer to the base model)")
    axes.set_ylabel("guarded compliance, T=1, validation (%)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> int:
    """Exit code 0 done, 2 bad input."""
    values = compare.define_flags(argv)
    flags.DEFINE_string("out", None, "Results, without ending.", flag_values=values)
    flags.DEFINE_list("grid", None, "Points lr:beta:steps.", flag_values=values)
    try:
        launch.parse_flags(values, argv)
        if None in (values.config, values.workdir, values.out, values.grid):
            raise InputError("--config, --workdir, --out and --grid are needed")
        variants = points(values.grid, values.methods)
        found = frontier(values.config, Path(values.workdir), variants, values.jobs)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = Path(values.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(out.with_suffix(".json"), found)
    plot(found, out.with_suffix(".png"))
    for row in found["points"]:
        print(
            f"{row['compliance_guarded']:.3f} guarded {row['compliance']:.3f} raw "
            f"{row['perplexity']:.2f} perplexity  {row['name']}"
        )
    print(f"M_ref {found['ref']}\nbest {found['best'] and found['best']['name']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
