"""Artefacts of a workdir that may be missing, as the parts of a report read them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_jax import records

Row = dict[str, Any]


def read_json(path: Path) -> Any:
    """What a JSON file holds, None where there is no such file."""
    return records.read_json(path) if path.exists() else None


def read_jsonl(path: Path) -> list[Row] | None:
    """The rows of a JSONL file, None where there is no such file."""
    return [row for _, row in records.read_jsonl(path)] if path.exists() else None


def flat(values: Mapping[str, Any], prefix: str = "") -> Row:
    """{"a": {"b": 1}} as {"a.b": 1}.

    Of a config that an earlier version wrote, keys may be missing.
    """
    found: Row = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
