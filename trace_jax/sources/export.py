"""A run's triage as data sets that other trainers read, in TRL's forms.

    preference  prompt, chosen, rejected: INVERT records turned round, RETAIN records as they are,
                PUNISH records with their correction as the better response, if they have one
    unpaired    prompt, completion, label: every response that was decided, true where it complies

Both have id, action and weight (of the impact stage; 1 elsewhere). Chats give chats, texts texts.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_jax import judges, records, triage
from trace_jax import policy as policies
from trace_jax.errors import InputError

FORMATS = ("parquet", "jsonl")


def export(workdir: Path, out: Path, form: str = "parquet") -> dict[str, int]:
    """Writes preference.* and unpaired.* with a README that names them; returns rows of each.

    Raises:
      InputError: no triage there, or `out` cannot be written.
    """
    path = workdir / "triage.jsonl"
    if not path.exists():
        raise InputError(f"{path}: not there; run stage triage first")
    found = triage.read(path)
    corrections = _column(workdir / "corrections.jsonl", "response")
    weights = _column(workdir / "impact.jsonl", "weight")
    tables = {
        "preference": list(_preference(found, corrections, weights)),
        "unpaired": list(_unpaired(found, corrections, weights)),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, rows in tables.items():
            _write(out / f"{name}.{form}", rows)
        (out / "README.md").write_text(_card(workdir, tables, form), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); use another") from error
    return {name: len(rows) for name, rows in tables.items()}


def _column(path: Path, key: str) -> dict[str, Any]:
    if not path.exists():
        return {}
    return {row["id"]: row[key] for _, row in records.read_jsonl(path) if row.get(key) is not None}


def relabelled(
    item: records.TriagedRecord, corrections: Mapping[str, records.Text]
) -> tuple[records.Text, records.Text] | None:
    """(better, worse) of a record under the new policy; None where it has no such pair."""
    record = item.record
    if item.action == "INVERT":
        return record.rejected, record.chosen
    if item.action == "PUNISH" and record.id in corrections:
        return corrections[record.id], record.chosen
    return (record.chosen, record.rejected) if item.action == "RETAIN" else None


def _preference(
    found: Sequence[records.TriagedRecord],
    corrections: Mapping[str, str],
    weights: Mapping[str, float],
) -> Iterator[dict[str, Any]]:
    for item in found:
        record, pair = item.record, relabelled(item, corrections)
        if pair is None:
            continue
        better, worse = pair
        row = {"id": record.id, "prompt": record.prompt}
        row |= {"chosen": _side(record.prompt, better), "rejected": _side(record.prompt, worse)}
        yield row | _common(item, weights)


def _unpaired(
    found: Sequence[records.TriagedRecord],
    corrections: Mapping[str, str],
    weights: Mapping[str, float],
) -> Iterator[dict[str, Any]]:
    for item in found:
        record = item.record
        sides = [
            (record.chosen, item.chosen_verdict.compliant),
            (record.rejected, item.rejected_verdict.compliant),
        ]
        if item.action == "PUNISH" and record.id in corrections:
            sides.append((corrections[record.id], True))
        for response, compliant in sides:
            if compliant is not None:
                row = {"id": record.id, "prompt": record.prompt}
                row |= {"completion": _side(record.prompt, response), "label": compliant}
                yield row | _common(item, weights)


def _common(item: records.TriagedRecord, weights: Mapping[str, float]) -> dict[str, Any]:
    return {"action": item.action, "weight": float(weights.get(item.record.id, 1.0))}


def _side(prompt: records.Text, response: records.Text) -> records.Text:
    """As the prompt is: messages after messages, text after text."""
    text = judges.response_text(response)
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        records.write_jsonl(path, rows)
        return
    import pyarrow
    import pyarrow.parquet

    temporary = path.with_name(f"{path.name}.tmp")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), temporary)
    temporary.replace(path)


def _card(workdir: Path, tables: Mapping[str, Sequence[Mapping[str, Any]]], form: str) -> str:
    """A data set card; its front matter lets `datasets.load_dataset` find the two parts."""
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.{form}\n" for name in tables)
    source = workdir / "policy.yaml"
    policy = policies.load(source).name if source.exists() else ""
    counts = [
        f"| {name} | {action} | {n} |"
        for name, rows in tables.items()
        for action, n in sorted(collections.Counter(row["action"] for row in rows).items())
    ]
    return "\n".join(
        [
            f"---\nconfigs:\n{configs}---",
            "# Preferences re-labelled under a new policy" + (f": {policy}" if policy else ""),
            "",
            "Triaged by trace_jax. `preference` suits DPO and its relatives, `unpaired` KTO:",
            "",
            "    import datasets",
            f'    datasets.load_dataset("{form if form == "parquet" else "json"}", '
            f'data_files="preference.{form}", split="train")',
            "",
            "| part | action | rows |",
            "|---|---|---|",
            *counts,
            "",
        ]
    )
