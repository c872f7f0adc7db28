"""Where each method operates: guarded compliance against perplexity, on the VALIDATION split.

python -m bench.frontier --config=configs/stories.py --workdir=runs/stories \\
    --out=docs/results/stories_frontier --methods=trace,dpo_gold --grid=1e-4:0.1:150,2e-4:0.1:150 \\
    [--jobs=2] [--config.key=value]

A grid point is learning rate : beta : steps. Every method gets as many points: the common ones, or
those of its own where there are any (npo@1e-5:0.1:50), for methods that the common ones destroy.
Each runs once (the config's seed) over the prepared workdir, evaluated on validation prompts as it
trains. Writes OUT.json and OUT.png and names each method's best point: the highest guarded
compliance at T=1, at any evaluation of its way, at a perplexity on the base model's own samples of
at most 10 % over M_ref's, which is what train.keep_best keeps. The test prompts are never read.

`bench.pages` makes tables of docs/results/*_frontier.json.
"""

import sys
from pathlib import Path

from absl import flags

from bench import results
from trace_jax import compare, launch, records
from trace_jax import config as config_lib
from trace_jax.errors import InputError

LIMIT = 1.10  # perplexity over M_ref's
WIDEST = 2.0  # of M_ref's perplexity, in the plot
EVALUATIONS = 10  # of a run, the last after its last step
PROMPTS = 100  # of an evaluation on the way
POINT = ("learning_rate", "beta", "steps")


def points(grid: list[str], method: str) -> list[compare.Variant]:
    """Grid points as variants of one method: those marked as its own, or else the common ones."""
    own = [text.partition("@")[2] for text in grid if text.startswith(f"{method}@")]
    found = []
    for text in own or [text for text in grid if "@" not in text]:
        parts = text.split(":")
        if len(parts) != 3:
            raise InputError(f"--grid={text}: a point reads learning_rate:beta:steps")
        learning_rate, beta, steps = parts
        keys = f"train.learning_rate={learning_rate}+train.beta={beta}+train.total_steps={steps}"
        found += compare.parse_methods(f"{method}+{keys}")
    return found


def frontier(config, prepared: Path, methods: list[str], grid: list[str], jobs: int) -> dict:
    """Validation figures of all points of all methods and of M_ref, with their way there."""
    variants = {method: points(grid, method) for method in methods}
    if len({len(of) for of in variants.values()}) > 1:
        counts = ", ".join(f"{method} {len(of)}" for method, of in variants.items())
        raise InputError(f"--grid: the methods do not have as many points each: {counts}")
    launch.realign(config, prepared, only=",".join(compare.SHARED))
    todo = []
    for variant in (v for of in variants.values() for v in of):
        every = max(1, round(int(variant.overrides["train.total_steps"]) / EVALUATIONS))
        own = {"evaluate.splits": ("validation",), "seed": config.seed}
        own |= {"train.keep_best": False, "train.evaluate_every": every}
        own |= {"train.evaluate_prompts": PROMPTS}
        todo.append((prepared / "frontier" / variant.name, variant.overrides | own))
    evaluated = compare.run_all(config, prepared, todo, jobs)
    rows = {
        target.name: _row(variant_of, found, target)
        for (target, variant_of), found in zip(todo, evaluated, strict=True)
    }
    ref = {k: evaluated[0]["ref"][k]["rate"] for k in ("compliance_guarded", "compliance")}
    ref["perplexity"] = evaluated[0]["ref"]["perplexity"]
    return {
        "split": "validation",
        "limit": LIMIT,
        "ref": ref,
        "methods": {
            name: method([rows[v.name] for v in of], LIMIT * ref["perplexity"])
            for name, of in variants.items()
        },
        **results.machine(),
    }


def _row(overrides: dict, found: dict, target: Path) -> dict:
    figures = ("compliance_guarded", "compliance", "compliance_greedy")
    rows = [row for _, row in records.read_jsonl(target / "pauses.jsonl")]
    way = [
        {k: row[k] for k in ("step", "compliance_guarded", "perplexity")}
        for row in rows
        if row["kind"] == "evaluation"
    ]
    return {
        "learning_rate": float(overrides["train.learning_rate"]),
        "beta": float(overrides["train.beta"]),
        "steps": int(overrides["train.total_steps"]),
        **{k: found[k]["rate"] for k in figures},
        "perplexity": found["perplexity"],
        "way": way,
    }


def method(rows: list[dict], limit: float) -> dict:
    """A method's points and the best of all evaluations on their ways within the limit.

    best: {learning_rate, beta, steps, step of the evaluation, compliance_guarded, perplexity}; None
    where all are over the limit.
    """
    ways = [
        {k: row[k] for k in POINT} | {"step": row["steps"]} | at
        for row in rows
        for at in (*row["way"], {k: row[k] for k in ("compliance_guarded", "perplexity")})
    ]
    allowed = [at for at in ways if at["perplexity"] <= limit]
    best = max(allowed, key=lambda at: at["compliance_guarded"], default=None)
    return {"points": rows, "best": best}


def plot(found: dict, path: Path) -> None:
    """Guarded compliance against perplexity: the way of every run, its end as a mark, a star for
    the best evaluation of a method.

    What lies beyond WIDEST times M_ref's perplexity stands at the right edge, as an arrow.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    ref = found["ref"]
    edge = WIDEST * ref["perplexity"]
    start = (ref["perplexity"], 100 * ref["compliance_guarded"])
    for index, (method, of) in enumerate(found["methods"].items()):
        for i, row in enumerate(of["points"]):
            path_ = [*row["way"], row]
            x = [start[0], *(min(edge, r["perplexity"]) for r in path_)]
            y = [start[1], *(100 * r["compliance_guarded"] for r in path_)]
            colour = f"C{index % 10}"
            axes.plot(x, y, "-", color=colour, alpha=0.35, linewidth=1)
            label = method if i == 0 else None
            marker = dict(marker="o", markersize=5)
            if row["perplexity"] > edge:
                marker = dict(marker=">", markersize=7)
            axes.plot(x[-1], y[-1], color=colour, linestyle="", label=label, **marker)
        if best := of["best"]:
            at = (best["perplexity"], 100 * best["compliance_guarded"])
            axes.plot(*at, color=colour, marker="*", markersize=14, markeredgecolor="black")
    axes.plot(*start, "k*", markersize=12, label="M_ref")
    axes.axvline(
        found["limit"] * ref["perplexity"], color="grey", linestyle="--", label="limit: +10 %"
    )
    axes.set_xlabel(f"perplexity of base text (arrows: over {edge:.1f})")
    axes.set_ylabel("guarded compliance, T=1, validation (%)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def markdown(benchmark: str, found: dict, as_run: dict) -> str:
    """The best evaluation of every method, percent.

    as_run: method -> what the comparison ran it with, which for trace and its ablations is the
    config's own point.
    """
    ref = found["ref"]
    lines = [
        f"**{benchmark}**: M_ref {100 * ref['compliance_guarded']:.1f} guarded at perplexity "
        f"{ref['perplexity']:.2f}; limit {found['limit'] * ref['perplexity']:.2f}; "
        f"commit {found['commit']}.",
        "",
        "| | best of nine: learning rate, beta, steps | best at step | guarded | perplexity "
        "| in the comparison |",
        "|---|---|---|---|---|---|",
    ]
    for name, of in found["methods"].items():
        if of["best"] is None:
            lines.append(f"| {name} | all over the limit | - | - | - | {_point(as_run, name)} |")
            continue
        row = of["best"]
        lines.append(
            f"| {name} | {row['learning_rate']:g}, {row['beta']:g}, {row['steps']} | {row['step']} "
            f"| {100 * row['compliance_guarded']:.1f} | {row['perplexity']:.2f} "
            f"| {_point(as_run, name)} |"
        )
    return "\n".join([*lines, ""])


def _point(as_run: dict, method: str) -> str:
    of = as_run.get(method)
    if of is None:
        return "-"
    return ", ".join(f"{of[f'train.{k}']:g}" for k in ("learning_rate", "beta", "total_steps"))


def tables() -> str:
    """Markdown of the committed frontiers."""
    files = sorted(Path("docs/results").glob("*_frontier.json"))
    read = {f.stem.removesuffix("_frontier"): records.read_json(f) for f in files}
    runs = {name: records.read_json(files[0].parent / f"{name}.json") for name in read}
    points = {name: of["operating_points"] for name, of in runs.items()}
    return "\n".join(markdown(name, found, points[name]) for name, found in read.items())


def main(argv: list[str]) -> int:
    """Exit code 0 done, 2 bad input."""
    values = compare.define_flags(argv)
    flags.DEFINE_string("out", None, "Results, without ending.", flag_values=values)
    flags.DEFINE_list("grid", None, "Points [method@]lr:beta:steps.", flag_values=values)
    try:
        launch.parse_flags(values, argv)
        if None in (values.config, values.workdir, values.out, values.grid):
            raise InputError("--config, --workdir, --out and --grid are needed")
        methods = [name.strip() for name in values.methods.split(",")]
        config = config_lib.resolved(values.config)
        found = frontier(config, Path(values.workdir), methods, values.grid, values.jobs)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = Path(values.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(out.with_suffix(".json"), found)
    plot(found, out.with_suffix(".png"))
    for method, of in found["methods"].items():
        for row in of["points"]:
            best = of["best"] and all(row[k] == of["best"][k] for k in POINT)
            print(
                f"{row['compliance_guarded']:.3f} guarded {row['compliance']:.3f} raw "
                f"{row['perplexity']:.2f} perplexity  {method} {row['learning_rate']:g}:"
                f"{row['beta']:g}:{row['steps']}{'  best' if best else ''}"
            )
    print(f"M_ref {found['ref']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
