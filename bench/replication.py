"""The paper's curves, ablation, gap and costs beside ours, for docs/replication.md (`bench.pages`).

python -m bench.replication --pairs=FILE [--columns=prompt=Q,chosen=A,rejected=B]
    counts what triage of these pairs by gemini would cost (docs/results/judge_price.json)

What was not measured on a benchmark says so.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import realign
from trace_jax import config, records, sources, workdir, workload
from trace_jax.errors import InputError
from trace_jax.stages import context

PAGE = Path("docs/replication.md")
BENCHMARKS = ("stories", "synth")
MISSING = "not measured"
# Llama-3.1-8B, percent, arXiv 2511.02623.
ABLATION = (
    ("all of it", "trace", (70.7, 70.2, 27.3)),
    ("no triage", "trace_no_triage", (58.1, 70.2, 24.6)),
    ("no KL", "trace_no_kl", (71.5, 64.1, 29.8)),
    ("no impact weights", "trace_no_impact", (62.8, 69.5, 32.1)),
)
SIZE = (("trace", (55.9, 65.5, 70.7)), ("naive_oracle_dpo", (35.9, 46.5, 52.2)))
NOISE = (("dpo_gold", (73.8, 69.9, 62.4)), ("trace", (70.2, 67.4, 61.5)),
         ("u2a", (55.8, 55.3, 54.7)))  # fmt: skip
GAP = 81.8
RUNS = ("llama8b:lora on h100:1", "llama8b:lora on v5e:2x4", "llama8b:full on v5e:4x4",
        "llama8b:full on v5p:2x2x1", "gemma9b:full on v5p:2x2x1", "qwen7b:full on v5p:2x2x1",
        "llama8b:full on v5p:4x4x4")  # fmt: skip
# US dollars a chip-hour on demand, rounded list prices of 2025; --price takes yours.
PRICES = {"v5e": 1.2, "v5p": 4.2, "h100": 3.0}
PAIRS = 20_000  # of the paper's largest runs

Results = Mapping[str, Mapping[str, Any]]


def read(folder: Path, ending: str) -> dict[str, dict]:
    """Benchmark -> its result file; those that are not there are left out."""
    paths = {name: folder / f"{name}{ending}.json" for name in BENCHMARKS}
    return {name: records.read_json(path) for name, path in paths.items() if path.exists()}


def ablation(found: Results) -> str:
    """TPA, utility and safety of the paper; guarded compliance and both utilities of ours."""
    heads = [f"here, {name}: {what}" for name in BENCHMARKS
             for what in ("TPA guarded", "perplexity", "right of 4")]  # fmt: skip
    lines = _head(["paper: TPA / MMLU / ASR", *heads])
    for label, method, theirs in ABLATION:
        cells = [" / ".join(f"{x:.1f}" for x in theirs)]
        for name in BENCHMARKS:
            row = found.get(name, {}).get("methods", {}).get(method)
            cells += [MISSING] * 3 if row is None else [
                _rate(row["compliance_guarded"]),
                f"{row['perplexity']:.2f}",
                _rate(row.get("choice_accuracy")),
            ]  # fmt: skip
        lines.append(_line(label, cells))
    return "\n".join(lines)


def curve(studies: Results, study: str, theirs: Sequence, at: Sequence[tuple[str, float]]) -> str:
    """A study of `bench.studies` beside the paper's; at: (what the paper has, where ours is)."""
    lines = _head(["paper", *(f"here, {name}" for name in BENCHMARKS)])
    for method, values in theirs:
        for (label, x), value in zip(at, values, strict=True):
            cells = [f"{value:.1f}", *(_point(studies, n, study, method, x) for n in BENCHMARKS)]
            lines.append(_line(f"{method}, {label}", cells))
    return "\n".join(lines)


def _point(studies: Results, name: str, study: str, method: str, x: float) -> str:
    for point in studies.get(name, {}).get("points", ()):
        if (point["study"], point["line"], point["x"]) == (study, method, x):
            return _rate(point["compliance_guarded"])
    return MISSING


def gap(found: Results, studies: Results) -> str:
    """The share of the gap from u2a to dpo_gold that trace closes, with its caveats below."""
    lines = _head(["paper", *(f"here, {name}" for name in BENCHMARKS)])
    same = [found.get(name, {}).get("gap_closed") for name in BENCHMARKS]
    lines.append(_line("one judge for all", [f"{GAP:.1f}", *map(_closed, same)]))
    errors = sorted({x for of in studies.values() for x in of.get("gap_closed", {})})
    for error in errors or ("0.1", "0.2"):
        of = [studies.get(name, {}).get("gap_closed", {}).get(error) for name in BENCHMARKS]
        label = f"dpo_gold on the truth, the others by a judge that errs on {float(error):.0%}"
        lines.append(_line(label, ["-", *map(_closed, of)]))
    for name, of in zip(BENCHMARKS, same, strict=True):
        if of and "caveat" in of:
            lines += ["", f"{name}: {of['caveat']}."]
    return "\n".join(lines)


def _closed(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return MISSING
    return "no gap" if found["rate"] is None else _rate(found)


def cost(plans: Mapping[str, Any], per_hour: Mapping[str, float], judge: Mapping | None) -> str:
    """Device hours of `--plan` and what they cost, the judge's price for PAIRS pairs."""
    lines = _head(["chips", "hours", "chip-hours", "dollars a chip-hour", "dollars"])
    for key in RUNS:
        plan = plans.get(key)
        if plan is None or plan["hours"] is None:
            lines.append(_line(key, [MISSING] * 5))
            continue
        kind, count = plan["device"]["kind"], plan["device"]["count"]
        spent, price = count * plan["hours"], per_hour[kind]
        figures = (f"{plan['hours']:.2f}", f"{spent:.1f}", f"{price:.2f}", f"{spent * price:.0f}")
        lines.append(_line(key, [f"{count} x {kind}", *figures]))
    lines.append("")
    if judge is None:
        return "\n".join([*lines, f"The judge: {MISSING}."])
    scale = PAIRS / judge["pairs"]
    said = (
        f"The judge, {judge['model']}, both responses of {PAIRS:,} pairs under `{judge['policy']}` "
        f"({judge['clauses']} clauses), reckoned from {judge['pairs']:,} pairs: "
        f"{scale * judge['calls']:,.0f} calls, {scale * judge['tokens'] / 1e6:.1f} million tokens, "
        f"{scale * judge['price']:.0f} dollars ({scale * judge['price'] / 2:.0f} by the Batch API)."
    )
    return "\n".join([*lines, said])


def judge_price(path: str, columns: str) -> dict[str, Any]:
    """What `--plan` says of triage of these pairs by gemini; nothing is asked."""
    c = config.base_config()
    c.data.source, c.data.path, c.data.columns = "file", path, columns
    c.policy.old, c.policy.new, c.judge.name = "pku_old", "pku_new", "gemini"
    pairs = len(sources.read_records(path, sources.Reading.of(c.data, c.seed))[0])
    with tempfile.TemporaryDirectory() as empty:
        run = context.Context(c, workdir.Workdir(Path(empty)))
        found = workload.judging(run)
    about = {"model": c.judge.gemini.model, "policy": c.policy.new}
    return found | about | {"pairs": pairs, "clauses": len(run.new_policy.clauses)}


def blocks(folder: Path, per_hour: Mapping[str, float]) -> dict[str, str]:
    """What stands on the page, by the name in its marks."""
    found, studies = read(folder, ""), read(folder, "_studies")
    plans, judge = folder / "plans.json", folder / "judge_price.json"
    return {
        "ablation": ablation(found),
        "size": curve(studies, "size", SIZE, [("5k pairs; here 25 %", 0.25),
                      ("10k; 50 %", 0.5), ("20k; 100 %", 1.0)]),
        "noise": curve(studies, "noise", NOISE, [(f"{x:.0%}", x) for x in (0.0, 0.1, 0.2)]),
        "gap": gap(found, studies),
        "cost": cost(
            records.read_json(plans)["plans"] if plans.exists() else {},
            per_hour,
            records.read_json(judge) if judge.exists() else None,
        ),
    }  # fmt: skip


def _head(heads: Sequence[str]) -> list[str]:
    return [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]


def _line(label: str, cells: Sequence[str]) -> str:
    return f"| {label} | {' | '.join(cells)} |"


def _rate(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return MISSING
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * found[e] for e in ("rate", "low", "high")))


def prices(given: Sequence[str]) -> dict[str, float]:
    """PRICES with those given as KIND=DOLLARS instead.

    Raises:
      InputError: one is not of that form.
    """
    try:
        return PRICES | {kind: float(value) for kind, _, value in (g.partition("=") for g in given)}
    except ValueError as error:
        raise InputError(f"--price={' '.join(given)}: give KIND=DOLLARS, as v5e=1.2") from error


def main(argv: Sequence[str]) -> int:
    """Exit code 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", metavar="FILE", required=True)
    parser.add_argument("--columns", default="", help="as data.columns")
    values = parser.parse_args(argv)
    try:
        found = judge_price(values.pairs, values.columns)
        records.write_json(realign.RESULTS / "judge_price.json", found)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("python -m bench.pages writes it into the page")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
