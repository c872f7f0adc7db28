"""Tasks of the harness from a user's own files: MMLU, HellaSwag, GSM8K, GPQA, without a network.

Each file becomes documents in JSONL below a folder, and a task that reads them.
"""

import collections
import csv
import io
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trace_jax import records
from trace_jax.errors import InputError
from trace_jax.sources import files

SHOTS = 5
_LETTERS = "ABCD"


def tasks(
    paths: dict[str, Path], folder: Path, *, limit: int = 0, seed: int = 0
) -> list[dict[str, Any]]:
    """Task configs for `lm_eval.simple_evaluate`; their documents are written to `folder`.

    paths: a name of NAMES -> its file (MMLU: zip or folder). limit: documents of a task, evenly
    drawn; 0: all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, path in paths.items():
        if not path.exists():
            raise InputError(f"--{name}={path}: no such file")
        documents = _READERS[name](path, seed)
        if not documents:
            raise InputError(f"--{name}={path}: no documents")
        if limit and len(documents) > limit:
            places = np.linspace(0, len(documents) - 1, limit).round().astype(int)
            documents = [documents[i] for i in places]
        out = folder / f"{name}.jsonl"
        records.write_jsonl(out, documents)
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(out)}}}
        shared = {"task": f"{name}_file", "test_split": "test", "num_fewshot": 0}
        made.append(shared | data | (_GENERATED if name == "gsm8k" else _CHOICE))
    return made


def _metric(name: str, **options: Any) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True} | options


_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
    "metric_list": [_metric("acc"), _metric("acc_norm")],
}
# As the harness's own gsm8k: what is left out of the answer and of the target alike.
_IGNORED = [",", r"\$", "(?s).*#### ", r"\.$"]
_GENERATED = {
    "output_type": "generate_until",
    "doc_to_text": "{{query}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["Question:", "</s>"], "do_sample": False, "max_gen_toks": 256},
    "metric_list": [_metric("exact_match", ignore_case=True, regexes_to_ignore=_IGNORED)],
    "filter_list": [
        {
            "name": "strict-match",
            "filter": [
                {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"},
                {"function": "take_first"},
            ],
        }
    ],
}


def _mmlu(path: Path, seed: int) -> list[dict]:
    """CSV files *_dev.csv and *_test.csv of question, A, B, C, D, answer; 5 shots out of dev."""
    del seed
    dev, test = {}, {}
    for name, text in _csv_files(path):
        found = re.search(r"(\w+)_(dev|test)\.csv$", name)
        if found:
            rows = [row for row in csv.reader(io.StringIO(text)) if len(row) == 6]
            (dev if found[2] == "dev" else test)[found[1]] = rows
    made = []
    for subject, rows in sorted(test.items()):
        about = subject.replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
        shots = "".join(_mmlu_question(r) + f" {r[5]}\n\n" for r in dev.get(subject, [])[:SHOTS])
        made += [
            {
                "query": head + shots + _mmlu_question(row),
                "choices": list(_LETTERS),
                "gold": _LETTERS.index(row[5]),
                "group": subject,
            }
            for row in rows
            if row[5] in _LETTERS
        ]
    return made


def _mmlu_question(row: Sequence[str]) -> str:
    options = "".join(f"{letter}. {row[i + 1]}\n" for i, letter in enumerate(_LETTERS))
    return f"{row[0].strip()}\n{options}Answer:"


def _csv_files(path: Path) -> Iterator[tuple[str, str]]:
    if path.is_dir():
        for file in sorted(path.rglob("*.csv")):
            yield file.name, file.read_text(encoding="utf-8")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".csv"):
                    yield name, archive.read(name).decode("utf-8")
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise InputError(f"--mmlu={path}: not a zip file of MMLU's CSV files ({error})") from error


def _hellaswag(path: Path, seed: int) -> list[dict]:
    """HellaSwag's own lines (ctx, endings, label), or requests with a doc (query, choices)."""
    del seed
    made: dict[str, dict] = {}
    for where, row in files.rows(str(path)):
        doc = row.get("doc", row)
        if {"query", "choices"} <= doc.keys():
            query, choices = doc["query"], doc["choices"]
            gold = doc.get("gold", doc.get("label", row.get("label")))
        else:
            query, choices, gold = _own_hellaswag(doc, where)
        key = str(doc.get("ind", query))
        made.setdefault(key, {"query": query, "choices": choices, "gold": int(gold)})
    return list(made.values())


def _own_hellaswag(doc: dict, where: str) -> tuple[str, list[str], int]:
    try:
        context = (
            f"{doc['activity_label']}: {doc['ctx']}" if "activity_label" in doc else doc["ctx"]
        )
        return _clean(context), [_clean(e) for e in doc["endings"]], int(doc["label"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: not a line of HellaSwag (ctx, endings, label)") from error


def _clean(text: str) -> str:
    """As the harness cleans WikiHow's marks."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _gsm8k(path: Path, seed: int) -> list[dict]:
    """question, answer; the first 5 are the shots, and are not asked."""
    del seed
    rows = [row for _, row in files.rows(str(path))]
    for row in rows[: SHOTS + 1]:
        if not {"question", "answer"} <= row.keys():
            raise InputError(f"--gsm8k={path}: lines need question and answer")
    shots = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in rows[:SHOTS])
    return [
        {
            "query": f"{shots}Question: {row['question']}\nAnswer:",
            "answer": row["answer"].split("####")[-1].strip().replace(",", ""),
        }
        for row in rows[SHOTS:]
    ]


def _gpqa(path: Path, seed: int) -> list[dict]:
    """Its CSV. The right answer's place is drawn (the paper's script has it always at D)."""
    names = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    made = []
    for where, row in files.rows(str(path)):
        if not {"Question", *names} <= row.keys():
            raise InputError(f"{where}: a row of GPQA has Question, {', '.join(names)}")
        number = int(records.content_id(row["Question"])[:8], 16)
        order = np.random.default_rng([seed, number]).permutation(4)
        options = [str(row[names[i]]).strip() for i in order]
        query = _mmlu_question([str(row["Question"]), *options])
        made.append({"query": query, "choices": list(_LETTERS), "gold": int(list(order).index(0))})
    return made


_READERS: dict[str, Callable[[Path, int], list[dict]]] = {
    "mmlu": _mmlu,
    "hellaswag": _hellaswag,
    "gsm8k": _gsm8k,
    "gpqa": _gpqa,
}
NAMES = tuple(_READERS)


def by_group(rows: Sequence[dict], metric: str) -> dict[str, float]:
    """Mean of a metric by the documents' group (MMLU: subject), from logged samples."""
    groups: dict[str, list[float]] = collections.defaultdict(list)
    for row in rows:
        if "group" in row["doc"]:
            groups[row["doc"]["group"]].append(float(row[metric]))
    return {name: float(np.mean(of)) for name, of in sorted(groups.items())}
