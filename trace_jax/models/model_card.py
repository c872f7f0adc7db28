"""README.md of an exported model: how it was made, from what, and what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml


def text(
    *,
    base: str,
    made: Mapping[str, Any],
    policies: Mapping[str, str],
    data: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    versions: Mapping[str, str],
) -> str:
    """The card, in the hub's form: YAML front matter, then Markdown.

    made: method and hyper-parameters. policies: name -> hash. data: counts and hashes of files.
    metrics: rows of one table, all with the same keys; none where nothing was evaluated.
    """
    front = {"base_model": base, "library_name": "transformers", "tags": ["alignment", "trace_jax"]}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {base.rstrip('/').split('/')[-1]}, re-aligned\n",
        "Made by trace_jax: TRACE (arXiv 2511.02623) re-aligns a model to a changed policy with "
        "the preference data that it was aligned with before.\n",
        _section("Training", made),
        _section("Policies", policies),
        _section("Data", data),
    ]
    if metrics:
        parts.append(f"## Held-out prompts\n\n{_table(metrics)}\n")
    return "\n".join([*parts, _section("Versions", versions)])


def _section(title: str, values: Mapping[str, Any]) -> str:
    lines = [f"- {key}: `{_plain(value)}`" for key, value in values.items()]
    return "\n".join([f"## {title}\n", *lines]) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _plain(value: Any) -> str:
    """One line that no Markdown breaks out of."""
    return " ".join(str(value).split()).replace("`", "'").replace("|", "/")
