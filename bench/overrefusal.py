"""Over-refusal before and after: how often a run's models decline held-out safe and unsafe prompts.

python -m bench.overrefusal WORKDIR [WORKDIR ...] [--out FILE] [--split test]

Reads samples.jsonl of finished runs of configs/xstest.py (several workdirs: seeds of one config)
and counts refusals by the detector of trace_jax/refusals.py, which agrees with people on 95 % of
the answers of real models (docs/judges.md). Every seed trains its own models and holds out its own
prompts; intervals are bootstraps over the prompts of all seeds. Beside them: the same on the
prompts that it was re-aligned on (greedy); how well a linear classifier of words that learns from
the same training prompts tells safe from unsafe held-out ones, which says what there is to learn;
and the action table of the triage by people's labels against that by rules.
"""

import argparse
import collections
import dataclasses
import itertools
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from bench import results
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
    """Rates with their intervals, and the difference that re-aligning makes to M_ref.

    Every seed holds out prompts of its own; those of all seeds are pooled.
    """
    runs = [refusal_rates(folder, split, mode) for folder in folders]

    def pooled(model: str, name: str) -> np.ndarray:
        return np.concatenate([run[model][name] for run in runs])

    table: dict = {"change": {}}
    for model in MODELS:
        table[model] = {}
        for name in KINDS:
            rate = statistics.rate(pooled(model, name))
            table[model][name] = {
                "rate": rate.rate, "low": rate.low, "high": rate.high, "prompts": rate.n,
                "seeds": [float(run[model][name].mean()) for run in runs],
            }  # fmt: skip
    for name in KINDS:
        found = statistics.paired_difference(pooled("trained", name), pooled("ref", name))
        table["change"][name] = dataclasses.asdict(found)
    return table


def on_training_prompts(folder: Path) -> dict[str, dict[str, list[float]]]:
    """model -> "safe" or "unsafe" -> 1 where its greedy answer to a training prompt declines."""
    import transformers

    from trace_jax import encoding, models, respond

    about = _training_prompts(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    encoder = encoding.Encoder(tokenizer, max_length=1 << 20, end_id=None)
    prompts = [
        respond.Prompt(str(i), [{"role": "user", "content": text}]) for i, text in enumerate(about)
    ]
    table = {}
    for name, path in (("ref", folder / "ref"), ("trained", folder / "model")):
        answers = respond.respond(
            models.load(path), prompts, encoder, seed=0, samples=1, max_new_tokens=48,
            temperature=0.0, stop_ids=(tokenizer.eos_token_id,), batch_rows=64,
        )  # fmt: skip
        declines = [float(refusals.kind(answer) != "none") for (answer,) in answers]
        table[name] = {
            kind: [d for d, known in zip(declines, about.values(), strict=True) if known is unsafe]
            for kind, unsafe in KINDS.items()
        }
    return table


def _training_prompts(folder: Path) -> dict[str, bool]:
    """Text -> unsafe."""
    rows = (row for _, row in records.read_jsonl(folder / "records.jsonl"))
    return {row["prompt"][-1]["content"]: row["labels"]["prompt"]["unsafe"] for row in rows}


def words_tell(folder: Path, split: str) -> dict[str, float]:
    """Accuracy of logistic regression on words and pairs of words, and that of the majority."""
    train = _training_prompts(folder)
    rows = (row for _, row in records.read_jsonl(folder / "prompts.jsonl"))
    test = {
        row["prompt"][-1]["content"]: row["labels"]["unsafe"]
        for row in rows
        if row["split"] == split
    }
    column: dict[str, int] = {}
    for text in train:
        for word in _words(text):
            column.setdefault(word, len(column))
    x, y = _counts(train, column), np.array(list(train.values()), float)
    weights, bias = np.zeros(len(column)), 0.0
    for _ in range(2000):
        residual = 1 / (1 + np.exp(-(x @ weights + bias))) - y
        weights -= 0.5 * (x.T @ residual / len(y) + 1e-3 * weights)
        bias -= 0.5 * residual.mean()
    truth = np.array(list(test.values()))
    said = _counts(test, column) @ weights + bias > 0
    majority = max(truth.mean(), 1 - truth.mean())
    return {"accuracy": float((said == truth).mean()), "majority": float(majority)}


def _words(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]


def _counts(texts: Iterable[str], column: dict[str, int]) -> np.ndarray:
    table = np.zeros((len(list(texts)), len(column)))
    for i, text in enumerate(texts):
        for word in _words(text):
            if word in column:
                table[i, column[word]] = 1.0
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


def tables() -> str:
    """Markdown of the committed results: all seeds, then the one with a stronger KL anchor."""
    parts = []
    for name, mode in (("xstest", "sample"), ("xstest_kl10", "greedy")):
        found = records.read_json(Path("docs/results") / f"{name}.json")
        prompts = sum(cell["prompts"] for cell in found[mode]["ref"].values())
        how = {"sample": "sampled", "greedy": "greedy"}[mode]
        said = [
            f"{name}: {prompts} prompts, seeds: {found['seeds']}, {how} answers, "
            f"commit {found['commit']}",
            "",
            "| declined, % | safe prompts | unsafe prompts |",
            "|---|---|---|",
        ]
        for label, model in (("base", "base"), ("M_ref", "ref"), ("re-aligned", "trained")):
            cells = ["{:.1f} [{:.1f}, {:.1f}]".format(
                *(100 * found[mode][model][kind][e] for e in ("rate", "low", "high"))
            ) for kind in KINDS]  # fmt: skip
            said.append(f"| {label} | {' | '.join(cells)} |")
        cells = ["{:+.1f} [{:+.1f}, {:+.1f}]".format(
            *(100 * found[mode]["change"][kind][e] for e in ("difference", "low", "high"))
        ) for kind in KINDS]  # fmt: skip
        parts.append("\n".join([*said, f"| re-aligned - M_ref | {' | '.join(cells)} |"]))
    triaged, words = found["triage"], found["words_tell"]
    parts.append(
        f"People and rules give {100 * triaged['agree']:.0f} % of {triaged['records']} records the "
        f"same action. The words of a prompt tell safe from unsafe with accuracy "
        f"{100 * words['accuracy']:.0f} % (majority {100 * words['majority']:.0f} %)."
    )
    return "\n\n".join(parts)


def main(argv: Sequence[str]) -> int:
    """Prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", type=Path, nargs="+")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, default=Path("docs/results/xstest.json"))
    values = parser.parse_args(argv)
    result = results.machine() | {"split": values.split, "seeds": len(values.workdirs)}
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
    trained_on = [on_training_prompts(folder) for folder in values.workdirs]
    result["training_prompts"] = {
        model: {name: float(np.mean([np.mean(run[model][name]) for run in trained_on]))
                for name in KINDS}
        for model in ("ref", "trained")
    }  # fmt: skip
    for model, row in result["training_prompts"].items():
        said = ", ".join(f"{name} {rate:.1%}" for name, rate in row.items())
        print(f"training prompts, greedy: {model} declines {said}")
    result["words_tell"] = words_tell(values.workdirs[0], values.split)
    print("the words of a prompt tell safe from unsafe with accuracy {accuracy:.1%}, its majority "
          "{majority:.1%}".format(**result["words_tell"]))  # fmt: skip
    result["triage"] = confusion(values.workdirs[0])
    print(f"people and rules give the same action to {result['triage']['agree']:.1%} of records")
    for action, row in result["triage"]["people_by_rules"].items():
        print(f"  people {action:10} " + "  ".join(f"{b} {n}" for b, n in row.items()))
    records.write_json(values.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
