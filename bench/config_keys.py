"""Every key of trace_jax/config.py, its default and its comment: docs/config.md (`bench.pages`).

A comment stands on the line of its key, or of its section, and on the lines below it.
"""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections

from trace_jax import config

SOURCE = Path("trace_jax/config.py")
# Sections that begin with the same keys: the first is shown in full, the others refer to it.
TRAINING = ("train", "align", "model.scratch.training")


def tables() -> str:
    """Markdown: a table a section, in the order of the file."""
    told, defaults = comments(SOURCE.read_text()), dict(leaves(config.base_config()))
    by_section: dict[str, list[str]] = {}
    for key in filter(defaults.__contains__, told):
        by_section.setdefault(_apart(key)[0], []).append(key)
    same = {_apart(key)[1] for key in by_section[TRAINING[-1]]}
    parts = []
    for section, keys in by_section.items():
        if _apart(section)[0] in TRAINING[1:]:
            continue
        lines = [f"## {section or 'the run'}"]
        if told.get(section):
            lines += ["", f"`{section}`: {told[section]}."]
        if section in TRAINING[1:]:
            keys = [key for key in keys if _apart(key)[1] not in same]
            lines += ["", "The keys from `total_steps` to `lora.*` are those of [train](#train)."]
        if keys:
            lines += ["", "| key | default | what |", "|---|---|---|"]
            lines += [_row(key, defaults[key], told[key]) for key in keys]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _row(key: str, default: Any, what: str) -> str:
    what = what.replace("|", "\\|")
    return f"| `{key}` | `{default!r}` | {what} |"


def _apart(key: str) -> tuple[str, str]:
    section, _, name = key.rpartition(".")
    return section, name


def leaves(c: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and their values; a section without keys counts as one."""
    for name, value in c.items():
        if isinstance(value, ml_collections.ConfigDict) and len(value):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", {} if isinstance(value, ml_collections.ConfigDict) else value


def comments(source: str) -> dict[str, str]:
    """Key or section -> what the text of config.py says of it, in its order; "" is the whole."""
    functions = {f.name: f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}
    of_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found: dict[str, str] = {}

    def read(function: ast.FunctionDef, section: str) -> None:
        sections = {"c": section}  # of each variable
        nodes = [node for node in function.body if isinstance(node, ast.Assign | ast.Return)]
        for node, following in zip(nodes, nodes[1:], strict=False):
            inside = [of_line[n] for n in _lines(node.lineno, node.end_lineno + 1, of_line)]
            below = [of_line[n] for n in _lines(node.end_lineno + 1, following.lineno, of_line)]
            names = [t for t in node.targets if isinstance(t, ast.Attribute)]
            key = _key(names[0], sections) if names else section
            found[key] = " ".join(filter(None, (found.get(key), *inside, *below)))
            sections |= {t.id: key for t in node.targets if isinstance(t, ast.Name)}
            called = node.value.func if isinstance(node.value, ast.Call) else None
            if isinstance(called, ast.Name):
                read(functions[called.id], key)

    read(functions["base_config"], "")
    return found


def _lines(begin: int, end: int, of_line: dict[int, str]) -> list[int]:
    return [n for n in range(begin, end) if n in of_line]


def _key(target: ast.Attribute, sections: dict[str, str]) -> str:
    variable, *names = ast.unparse(target).split(".")
    return ".".join(filter(None, (sections[variable], *names)))
