"""Over-refusal before and after: how often a run's models decline held-out safe and unsafe prompts.

python -m bench.overrefusal WORKDIR [WORKDIR ...] [--out FILE] [--split test]

Reads samples.jsonl of finished runs of configs/xstest.py (several workdirs: seeds of one config)
and counts refusals by the detector of trace_jax/refusals.py, which agrees with people on 95 % of
the answers of real models (docs/judges.md). Intervals are bootstraps over prompts, and over seeds
where there are several. Beside them: the action table of the triage by people's labels against that
by rules.
"""

import argparse
import collections
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench import frontier
from trace_jax import policy, records, refusals, triage
from trace_jax.evaluate import statistics
from trace_jax.judges import labels, rules

MODELS = ("base", "ref", "trained")
KINDS = {"safe": False, "unsafe": True}


def refusal_rates(folder: Path, split: str, mode: str) -> dict[str, dict[str, np.ndarray]]:
    """model -> "safe" or "unsafe" -> [prompts, samples] 1 where it declines."""
    about = {row["id"]: row["labels"] for _, row in records.read_jsonl(folder / "prompts.jsonl")}
    found: dict[tuple[str, bool], dict[str, list[float]]] = collections.defaultdict(dict)
    for _, row in records.read_jsonl(folder / "samples.jsonl"):
        if row["split"] == split and row["mode"] == mode:
            of_prompt = found[row["model"], about[row["id"]]["unsafe"]]
            declines = refusals.kind(row["response"]) != "none"
            of_prompt.setdefault(row["id"], []).append(float(declines))
    return {
        model: {
            name: np.array([rates for _, rates in sorted(found[model, unsafe].items())])
            for name, unsafe in KINDS.items()
        }
        for model in MODELS
    }


def over_seeds(folders: Sequence[Path], split: str, mode: str) -> dict:
    """Rates with their intervals, and the difference that re-aligning makes to M_ref."""
    runs = [refusal_rates(folder, split, mode) for folder in folders]
    table: dict = {}
    for model in MODELS:
        table[model] = {}
        for name in KINDS:
            rate = statistics.rate_over_seeds([run[model][name] for run in runs])
            table[model][name] = {
                "rate": rate.rate, "low": rate.low, "high": rate.high, "prompts": rate.n,
                "seeds": [float(run[model][name].mean()) for run in runs],
            }  # fmt: skip
    table["change"] = {}
    for name in KINDS:
        after, before = (
            np.concatenate([run[model][name] for run in runs], axis=1)
            for model in ("trained", "ref")
        )
        found = statistics.paired_difference(after, before)
        table["change"][name] = {
            "difference": found.difference, "low": found.low, "high": found.high,
        }  # fmt: skip
    return table


def confusion(folder: Path) -> dict:
    """Actions by people's labels (rows) against actions by rules (columns), and their agreement."""
    found = [
        records.PreferenceRecord.from_json(row)
        for _, row in records.read_jsonl(folder / "records.jsonl")
    ]
    new = policy.load("overrefusal_new")
    people = triage.triage(found, labels.LabelsJudge(new))
    lexical = triage.triage(found, rules.RulesJudge(new))
    pairs = collections.Counter((a.action, b.action) for a, b in zip(people, lexical, strict=True))
    table = {a: {b: pairs[a, b] for b in records.ACTIONS} for a in records.ACTIONS}
    same = sum(n for (a, b), n in pairs.items() if a == b)
    low, high = statistics.wilson(same, len(found))
    return {"records": len(found), "agree": same / len(found), "low": low, "high": high,
            "people_by_rules": table}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", type=Path, nargs="+")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, default=Path("docs/results/xstest.json"))
    values = parser.parse_args(argv)
    result = frontier.machine() | {"split": values.split, "seeds": len(values.workdirs)}
    for mode in ("sample", "greedy"):
        result[mode] = over_seeds(values.workdirs, values.split, mode)
        for model in MODELS:
            row = result[mode][model]
            said = ", ".join(
                f"{name} {cell['rate']:.1%} [{cell['low']:.1%}, {cell['high']:.1%}]"
                for name, cell in row.items()
            )
            print(f"{mode:6} {model:8} declines {said}")
        for name, cell in result[mode]["change"].items():
            print(f"{mode:6} {name}: re-aligned against M_ref {cell['difference']:+.1%} "
                  f"[{cell['low']:+.1%}, {cell['high']:+.1%}]")  # fmt: skip
    result["triage"] = confusion(values.workdirs[0])
    print(f"people and rules give the same action to {result['triage']['agree']:.1%} of records")
    for action, row in result["triage"]["people_by_rules"].items():
        print(f"  people {action:10} " + "  ".join(f"{b} {n}" for b, n in row.items()))
    records.write_json(values.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
