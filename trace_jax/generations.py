"""Successive policies: a run on top of a finished one, and what became of each policy on the way.

`--config.parent=WORKDIR` takes the parent's re-aligned model as M_ref, its base model as the base
of comparison, its held-out prompts, its judgement store, and its records as the parent re-labelled
them: INVERT turned round, (y_c, y_w) where a correction was found, UNRESOLVED and uncorrected
PUNISH records as they were.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from trace_jax import policy, records, triage, workdir
from trace_jax.errors import InputError
from trace_jax.sources import export


def settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Keys that a parent decides, {} without one.

    Raises:
      InputError: the parent is not a finished run, or its policy is not the old one here.
    """
    if not config.parent:
        return {}
    parent = Path(config.parent)
    path = parent / "config.json"
    if not os.path.exists(path):  # a name that can be none is not there either
        raise InputError(f"parent={parent}: no run there (no config.json)")
    for needed in ("triage.jsonl", "model/config.json"):
        if not (parent / needed).exists():
            raise InputError(f"parent={parent}: not finished ({needed} is not there)")
    before = records.read_json(path)
    policies = {config.policy.old: "policy.old", before["policy"]["new"]: "the parent's policy.new"}
    hashes = {policy.load(name).hash for name in policies}
    default = config.policy.old == before["policy"]["old"]  # the same config file, one policy on
    if len(hashes) > 1 and not default:
        raise InputError(
            f"parent={parent} was aligned to {before['policy']['new']}, policy.old here is "
            f"{config.policy.old}; they have to be one"
        )
    base = before["model"]["path"] or str(parent / "base")
    return {
        "model.path": base,
        "model.ref_path": str(parent / "model"),
        "policy.old": before["policy"]["new"],
        "align.enabled": False,
        "data.source": "parent",
        "data.path": str(parent),
        "asking.store": str(workdir.store(parent, config)),
    }


def relabelled(parent: Path) -> Iterator[records.PreferenceRecord]:
    """The parent's records as its policy orders them, under their own ids where nothing changed."""
    rows = (row for _, row in records.read_jsonl(parent / "corrections.jsonl"))
    corrections = {row["id"]: row["response"] for row in rows if row["response"] is not None}
    originals = {
        row["id"]: records.PreferenceRecord.from_json(row)
        for _, row in records.read_jsonl(parent / "records.jsonl")
    }
    for item in triage.read(parent / "triage.jsonl"):
        record = originals[item.record.id]  # with its labels
        better, worse = export.relabelled(item, corrections) or (record.chosen, record.rejected)
        if (better, worse) == (record.chosen, record.rejected):
            yield record
            continue
        labels = dict(record.labels) if isinstance(record.labels, Mapping) else {}
        of_rejected = None if item.action == "PUNISH" else labels.get("rejected")
        labels |= {"chosen": of_rejected, "rejected": labels.get("chosen")}
        labels = {name: found for name, found in labels.items() if found is not None}
        name = records.content_id(record.prompt, better, worse)
        yield records.PreferenceRecord(name, record.prompt, better, worse, labels or None)


def history(workdir: Path) -> list[dict[str, Any]]:
    """Every generation up to this run, oldest first: figures of its re-aligned model then.

    {"workdir", "old", "new", "compliance_guarded", "compliance", "compliance_old", "perplexity"};
    all perplexities are of samples of one base model.
    """
    found: list[dict[str, Any]] = []
    place: Path | None = Path(workdir)
    while place is not None and (place / "config.json").exists():
        config = records.read_json(place / "config.json")
        row = {"workdir": str(place), **{k: config["policy"][k] for k in ("old", "new")}}
        if (place / "eval.json").exists():
            evaluated = records.read_json(place / "eval.json")
            for key in ("compliance_guarded", "compliance", "compliance_old"):
                if key in evaluated:
                    row[key] = {k: evaluated[key][k] for k in ("rate", "low", "high", "n")}
            row["perplexity"] = evaluated["perplexity"]
        found.insert(0, row)
        place = Path(config["parent"]) if config.get("parent") else None
        if len(found) > 100:
            raise InputError(f"{workdir}: its parents go round in a circle")
    return found
