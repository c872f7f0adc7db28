"""Methods compared over a workdir: figures in the order they were asked for, tests, statements."""

from typing import Any

from trace_jax import comparison_tables
from trace_jax.report.files import Row

_TESTED = ("compliance_guarded", "compliance")


def collect(found: Row | None) -> Row | None:
    """See `report.collect`. found: comparison.json."""
    if found is None:
        return None
    found = found | {"methods": {name: found["methods"][name] for name in order(found)}}
    columns = comparison_tables.columns(found)
    names = [name for name, _ in comparison_tables.rows(found)]
    compliance = set(comparison_tables.COLUMNS.values())
    parts = ([h for h in columns if h in compliance], [h for h in columns if h not in compliance])
    return {
        "tables": [
            _table({head: columns[head] for head in heads}, names) for heads in parts if heads
        ],
        "tests": _tests(found["tests"]),
        "statements": [
            _statement(row, shown)
            for row, shown in zip(
                found["statements"], comparison_tables.statements(found), strict=True
            )
        ],
        "gap": comparison_tables.gap(found),
        "caveat": found.get("gap_closed", {}).get("caveat"),
        "split": found["split"],
        "seeds": found["seeds"],
    }


def order(found: Row) -> list[str]:
    """The methods as they were asked for; the keys of a JSON file are sorted.

    The tests are a list: the first method against every other. Whatever neither names comes last.
    """
    listed = found.get("methods_order") or [
        name for test in found["tests"] for name in (test["a"], test["b"])
    ]
    named = [name for name in listed if name in found["methods"]]
    return list(dict.fromkeys([*named, *found["methods"]]))


def _table(columns: dict[str, list[Any]], names: list[str]) -> Row:
    """{"columns": [(head, whether its cells are texts)], "rows": [{"name", "cells"}]}."""
    return {
        "columns": [
            (head, any(isinstance(cell, str) for cell in of)) for head, of in columns.items()
        ],
        "rows": [
            {"name": name, "cells": [of[i] for of in columns.values()]}
            for i, name in enumerate(names)
        ],
    }


def _tests(tests: list[Row]) -> list[Row]:
    """A row of two methods: {"a", "b", "cells": [difference, p, h of each figure]}."""
    rows: dict[tuple[str, str], dict[str, Row]] = {}
    for test in tests:
        rows.setdefault((test["a"], test["b"]), {})[test["figure"]] = test
    return [
        {"a": a, "b": b, "cells": [c for figure in _TESTED for c in _cells(of.get(figure))]}
        for (a, b), of in rows.items()
    ]


def _cells(test: Row | None) -> tuple[str, str, str]:
    if test is None:
        return "–", "–", "–"
    points = [f"{100 * test[key]:+.1f}" for key in ("difference", "low", "high")]
    shown = f"{points[0]} [{points[1]}, {points[2]}]"
    return shown, _p(test["p_holm"]), f"{test['cohens_h']:+.2f}"


def _statement(row: Row, shown: tuple[str, str, str, str]) -> Row:
    claim, figure, difference, answer = shown
    sides: dict[str, Any] = {"a": row["a"], "b": row["b"], "p": _p(row["p_holm"])}
    told = {"claim": claim, "figure": figure, "difference": difference, "answer": answer}
    return sides | told


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
