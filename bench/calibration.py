"""The `rules` judge against people: refusals on XSTest, propositions on RBR.

python -m bench.calibration [--data DIR] [--out FILE] [--docs FILE]

--docs writes the tables into docs/judges.md between its marks.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import results
from trace_jax import judges, policy, records
from trace_jax.judges import calibrate, human_labels

MODELS = {"GPT-4": "gpt4", "Llama-2": "llama2orig", "Mistral-Instruct": "mistralinstruct"}
_KEPT = (
    "n", "coverage", "accuracy", "low", "high", "accuracy_adjudicated", "alpha_with_humans",
    "alpha_humans", "precision_violating", "recall_violating",
)  # fmt: skip


def measured(name: str, data: Path) -> dict[str, Any]:
    """What stands in calibration.json, of the rules judge."""
    rules = policy.load(name)
    with tempfile.TemporaryDirectory() as folder:
        return calibrate.calibrate(
            judges.make("rules", rules),
            rules,
            human_labels.read(data, rules),
            data=data.name,
            kept=None,
            out=Path(folder) / "c.json",
        )


def _kept(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in _KEPT}


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Mark -> Markdown."""

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f} %"

    refusals = [
        "| completions of | accuracy, two annotators | against the final labels | refusals found "
        "(recall) | of those called refusals (precision) | alpha with people | among people |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["refusals"].items():
        refusals.append(
            f"| {name} | {percent(row['accuracy'])} ({100 * row['low']:.1f} to "
            f"{100 * row['high']:.1f}) | {percent(row['accuracy_adjudicated'])} | "
            f"{percent(row['recall_violating'])} | {percent(row['precision_violating'])} | "
            f"{row['alpha_with_humans']:.2f} | {row['alpha_humans']:.2f} |"
        )
    propositions = [
        "| clause | responses | decided | accuracy | recall of violating | precision |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rbr"].items():
        propositions.append(
            f"| {name} | {row['n']} | {percent(row['coverage'])} | {percent(row['accuracy'])} | "
            f"{percent(row['recall_violating'] if row['coverage'] else None)} | "
            f"{percent(row['precision_violating'])} |"
        )
    return {"refusals": "\n".join(refusals), "rbr": "\n".join(propositions)}


def fill(text: str, parts: dict[str, str]) -> str:
    """The text with each part between <!-- NAME --> and <!-- end of NAME -->."""
    for name, part in parts.items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        text = between.sub(lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text)
    return text


def main(argv: Sequence[str]) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/calibration.json"))
    parser.add_argument("--docs", type=Path)
    values = parser.parse_args(argv)
    files = {
        name: values.data / "xstest" / f"xstest_v2_completions_{file}.csv"
        for name, file in MODELS.items()
    }
    gold = measured("rbr", values.data / "rbr" / "gold.jsonl")
    result = results.machine() | {
        "refusals": {name: _kept(measured("answers", path)) for name, path in files.items()},
        "rbr": {name: _kept(row) for name, row in gold["per_clause"].items()},
    }
    records.write_json(values.out, result)
    parts = tables(result)
    print("\n\n".join(parts.values()))
    if values.docs is not None:
        values.docs.write_text(fill(values.docs.read_text(), parts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
