"""What impact scores are worth: do they predict retraining, and how reliable are they?

python -m bench.weights --config=configs/quickstart.py --workdir=runs/quickstart \\
    --out=docs/results/synth_weights [--subsets=40] [--steps=80] [--config.key=value]

1. Linear datamodelling score (TRAK, arXiv 2303.14186): the gold pairs of J are taken out of the
   data; trace with w = 1 is trained from M_ref on random halves of the other records; the fall of J
   of each half is compared with the sum of its records' scores, by rank correlation over the halves
   (95 % by bootstrap over halves). Scores: identity (the paper), fisher_diag, cg, each clamped or
   not, and two that look at no gradient: the number of conflicts, and of each action.
2. Reliability: rank correlation within an action of the scores from two halves of the gold batch,
   as it grows.

Writes OUT.json and OUT.png.
"""

import sys
from pathlib import Path

import numpy as np
from absl import flags

from bench import realign, results
from trace_jax import (
    batches,
    compare,
    fit,
    impact,
    launch,
    logprobs,
    metrics,
    records,
    workdir,
)
from trace_jax import config as config_lib
from trace_jax.errors import InputError
from trace_jax.evaluate import statistics
from trace_jax.stages import context, scoring

CURVATURES = ("identity", "fisher_diag", "cg")
GOLD_SIZES = (50, 100, 200, 400, 800)


def _context(config, prepared: Path, **overrides: object) -> context.Context:
    config = config_lib.with_overrides(
        config, {k.replace("__", "."): v for k, v in overrides.items()}
    )
    return context.Context(config, workdir.Workdir(prepared))


def _conflicts(run: context.Context):
    """(examples of unit weight, their tokens) of all conflicts."""
    found = [e for e in run.examples("trace", None) if not e.kl and e.action != "RETAIN"]
    return batches.encode_examples(run.encoder, found)


def _gold(run: context.Context, size: int):
    return impact.draw_gold(run.fitting, run.corrections, size=size, seed=run.config.seed)[0]


def objective(run: context.Context, module, gold, encoded, ref_n2: np.ndarray) -> float:
    """J of a model: mean logistic loss of the gold pairs."""
    row_length = batches.longest_row(encoded)
    logp_n2 = logprobs.of_texts(module, encoded, row_length=row_length, micro_rows=4)
    r_n2 = logp_n2 - ref_n2
    margin = run.config.impact.gold_beta * (r_n2[:, 0] - r_n2[:, 1])
    return float(np.mean(np.logaddexp(0.0, -margin)))


def datamodelling(config, prepared: Path, n_subsets: int, steps: int, scratch: Path) -> dict:
    """Part 1."""
    run = _context(config, prepared)
    examples, encoded = _conflicts(run)
    gold = _gold(run, config.impact.gold_size)
    gold_ids = {e.record_id for e in gold}
    by_kind = {}
    for kind in CURVATURES:
        of_kind = _context(config, prepared, impact__curvature=kind)
        of_kind.__dict__["ref"] = run.ref
        by_kind[kind] = scoring.scores(of_kind, examples, encoded, gold).along_J
    ids, actions = [e.record_id for e in examples], [e.action for e in examples]
    usable = [t for t in run.triaged if t.record.id not in gold_ids and t.action != "UNRESOLVED"]
    gold_encoded = [run.encoder.encode(e.prompt, [e.y0, e.y1], e.record_id) for e in gold]
    row_length = batches.longest_row(gold_encoded)
    ref_n2 = logprobs.of_texts(run.ref, gold_encoded, row_length=row_length, micro_rows=4)
    falls, members = [], []
    done = scratch / "subsets.jsonl"
    known = {r["subset"]: r for _, r in records.read_jsonl(done)} if done.exists() else {}
    start = float(np.log(2.0))  # J at M_ref, where every margin is 0
    for k in range(n_subsets):
        chosen = np.random.default_rng([config.seed, k, 0x1D5]).permutation(len(usable))
        subset = {usable[i].record.id for i in chosen[: len(usable) // 2]}
        if k not in known:
            fall = start - _retrained(run, subset, steps, gold, gold_encoded, ref_n2, scratch)
            known[k] = {"subset": k, "fall": fall}
            records.write_jsonl(done, known.values())
        falls.append(known[k]["fall"])
        members.append(np.array([i in subset for i in ids]))
        metrics.say(f"subset {k + 1} of {n_subsets}: J falls by {falls[-1]:.4f}")
    within = np.array(members)
    is_action = {a: np.array([x == a for x in actions], float) for a in ("INVERT", "PUNISH")}
    predictors = {kind: within @ s for kind, s in by_kind.items()}
    predictors |= {f"{k}, clamped": within @ np.maximum(s, 0) for k, s in by_kind.items()}
    predictors |= {"number of conflicts": within.sum(axis=1)}
    predictors |= {f"number of {a}": within @ of for a, of in is_action.items()}
    return {
        "subsets": n_subsets,
        "steps": steps,
        "gold": len(gold),
        "fall_mean": float(np.mean(falls)),
        "fall_sd": float(np.std(falls, ddof=1)),
        "correlation": {name: _correlated(np.array(falls), p) for name, p in predictors.items()},
        "rank_correlation_with_identity": {
            kind: statistics.spearman(by_kind["identity"], s) for kind, s in by_kind.items()
        },
    }


def _retrained(run, subset: set[str], steps: int, gold, gold_encoded, ref_n2, scratch) -> float:
    config = run.config
    some = _context(
        config, run.workdir.path, train__total_steps=steps,
        train__warmup_steps=min(10, steps - 1), train__save_every=steps,
    )  # fmt: skip
    some.__dict__["triaged"] = [t for t in run.triaged if t.record.id in subset]
    some.__dict__["corrections"] = run.corrections
    target = scratch / "subset"
    workdir.remove(target)
    fitted = fit.fit(
        run.ref,
        some.examples("trace_no_impact", None),
        some.settings("train"),
        encoder=run.encoder,
        directory=target / "checkpoints",
        metrics_path=target / "metrics.jsonl",
        on_drop=None,
        progress=run.progress,
    )
    return objective(run, fitted.module, gold, gold_encoded, ref_n2)


def _correlated(falls: np.ndarray, predicted: np.ndarray) -> dict:
    """Spearman over subsets, 95 % by bootstrap over subsets."""
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(falls), (2000, len(falls)))
    found = [statistics.spearman(falls[d], predicted[d]) for d in draws]
    low, high = np.nanpercentile(found, (2.5, 97.5))
    rho = statistics.spearman(falls, predicted)
    return {"rho": rho, "low": float(low), "high": float(high)}


def reliability(config, prepared: Path) -> list[dict]:
    """Part 2: a row a gold size and action."""
    rows = []
    for draw in ("thirds", "proportional"):
        for size in GOLD_SIZES:
            run = _context(
                config,
                prepared,
                impact__gold_size=size,
                impact__gold_draw=draw,
                impact__reliability_examples=0,
            )
            examples, encoded = _conflicts(run)
            gold, _ = impact.draw_gold(
                run.fitting, run.corrections, size=size, seed=config.seed, draw=draw
            )
            scores = scoring.scores(run, examples, encoded, gold)
            kept = ~np.isin([e.record_id for e in examples], [e.record_id for e in gold])
            for action in ("INVERT", "PUNISH"):
                of = kept & np.array([e.action == action for e in examples])
                rho = scores.stability(of)
                rows.append(
                    {"draw": draw, "gold": len(gold), "half": len(gold) // 2, "action": action,
                     "n": int(of.sum()), "half_correlation": rho,
                     "whole_reliability": 2 * rho / (1 + rho),
                     "negative": float((scores.along_J[of] <= 0).mean())}
                )  # fmt: skip
            metrics.say(
                f"{draw} {len(gold)}: {[round(r['half_correlation'], 2) for r in rows[-2:]]}"
            )
    return rows


def plot(found: dict, path: Path) -> None:
    """Both parts side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    of = found["datamodelling"]["correlation"]
    for i, (_, row) in enumerate(of.items()):
        error = [[row["rho"] - row["low"]], [row["high"] - row["rho"]]]
        left.errorbar([row["rho"]], [i], xerr=error, fmt="o", color="C0")
    left.set_yticks(range(len(of)), list(of))
    left.invert_yaxis()
    left.axvline(0, color="grey", linewidth=1)
    left.set_xlabel("rank correlation with the fall of J on retraining [95 %]")
    for i, action in enumerate(("INVERT", "PUNISH")):
        for draw, style in (("thirds", "o-"), ("proportional", "s--")):
            rows = [r for r in found["reliability"] if r["action"] == action and r["draw"] == draw]
            right.plot(
                [r["half"] for r in rows], [r["half_correlation"] for r in rows], style,
                color=f"C{i}", label=f"{action}, {draw}",
            )  # fmt: skip
    right.set_xscale("log")
    right.set_xticks([n // 2 for n in GOLD_SIZES], [str(n // 2) for n in GOLD_SIZES])
    right.minorticks_off()
    right.set_xlabel("pairs in each half of the gold batch")
    right.set_ylabel("rank correlation of the two halves, within an action")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def tables() -> str:
    """Markdown of the committed results: do scores predict retraining, how reliable are they?"""
    found = realign.of_benchmarks("_weights")
    head = f"| | {' | '.join(found)} |\n" + "|---" * (len(found) + 1) + "|"
    predicted = [of["datamodelling"]["correlation"] for of in found.values()]
    lines = ["Rank correlation of a score's sum over a half with the fall of J [95 %]:", "", head]
    for name in predicted[0]:
        cells = [f"{of[name]['rho']:+.2f} [{of[name]['low']:+.2f}, {of[name]['high']:+.2f}]"
                 for of in predicted]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Rank correlation of the scores by two halves of a gold batch:", "", head]
    rows = [_reliabilities(of) for of in found.values()]
    for key in rows[0]:
        cells = [of.get(key, "-") for of in rows]
        lines.append(f"| {', '.join(key)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Commits: " + ", ".join(of["commit"] for of in found.values())])


def _reliabilities(found: dict) -> dict[tuple[str, str, str], str]:
    """(action, draw, size asked for) -> correlation, and the size drawn where that is another."""
    cells = {}
    for r in found["reliability"]:
        asked, drawn = min(GOLD_SIZES, key=lambda n: abs(n - r["gold"])), r["gold"]
        drawn = "" if abs(asked - drawn) <= 1 else f" (of {drawn})"
        cells[r["action"], r["draw"], f"gold of {asked}"] = f"{r['half_correlation']:.2f}{drawn}"
    return cells


def main(argv: list[str]) -> int:
    """Exit code 0 done, 2 bad input."""
    values = compare.define_flags(argv)
    flags.DEFINE_string("out", None, "Results, without ending.", flag_values=values)
    flags.DEFINE_integer("subsets", 40, "Random halves of the data.", flag_values=values)
    flags.DEFINE_integer("steps", 80, "Steps of a retraining.", flag_values=values)
    try:
        launch.parse_flags(values, argv)
        if None in (values.config, values.workdir, values.out):
            raise InputError("--config, --workdir and --out are needed")
        config, prepared = config_lib.resolved(values.config), Path(values.workdir)
        launch.realign(config, prepared, only=",".join(compare.SHARED))
        scratch = prepared / "weights"
        scratch.mkdir(exist_ok=True)
        found = {
            "datamodelling": datamodelling(config, prepared, values.subsets, values.steps, scratch),
            "reliability": reliability(config, prepared),
            **results.machine(),
        }
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = Path(values.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(out.with_suffix(".json"), found)
    plot(found, out.with_suffix(".png"))
    for name, row in found["datamodelling"]["correlation"].items():
        print(f"{row['rho']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]  {name}")
    for row in found["reliability"]:
        rho = row["half_correlation"]
        print(f"{row['draw']:12} {row['action']} {row['half']:4} pairs a half: {rho:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
