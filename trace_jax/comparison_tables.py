"""A comparison as people read it: Markdown, LaTeX and two plots."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_jax.evaluate import statistics

COLUMNS = {
    "compliance_guarded": "guarded, T=1",
    "compliance": "raw, T=1",
    "compliance_greedy": "greedy",
    "retained": "unchanged clauses",
    "retained_guarded": "unchanged, guarded",
    "compliance_old": "old policy",
}
ACCURACY = "right of 4"
_NAMES = {
    "compliance_guarded": "guarded", "compliance": "raw", "perplexity": "log perplexity",
    "choice_accuracy": ACCURACY,
}  # fmt: skip


def markdown(found: Mapping[str, Any]) -> str:
    """Percent with 95 % intervals; the tests, the statements and the gap below."""
    seeds = ", ".join(map(str, found["seeds"]))
    about = f"Percent [95 % interval]; {found['split']} prompts; seeds {seeds}."
    lines = [table(found), "", about, ""]
    for test in found["tests"]:
        if test["figure"] == "compliance_guarded":
            lines.append(f"- {_difference(test)}")
    return "\n".join(lines + _statements(found) + _gap(found)) + "\n"


def table(found: Mapping[str, Any], leave_out: Collection[str] = ()) -> str:
    """Markdown: a line a row of `rows`. leave_out: names of rows and heads of columns."""
    cells_of = {head: of for head, of in columns(found).items() if head not in leave_out}
    lines = ["| | " + " | ".join(cells_of) + " |", "|---" * (len(cells_of) + 1) + "|"]
    for i, (name, _) in enumerate(rows(found)):
        if name not in leave_out:
            cells = [_cell(of[i]) for of in cells_of.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rows(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, figures) of base, M_ref and the methods."""
    named = [("base", found.get("base")), ("M_ref", found.get("ref")), *found["methods"].items()]
    return [(name, row) for name, row in named if row]


def columns(found: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Head -> of each row: a rate, a text, or None where there is none.

    Figures that no row has, as in results of earlier versions, have no column.
    """
    figures = [row for _, row in rows(found)]
    named = {head: [row.get(key) for row in figures] for key, head in COLUMNS.items()}
    named["perplexity"] = [f"{row['perplexity']:.2f}" for row in figures]
    named[ACCURACY] = [row.get("choice_accuracy") for row in figures]
    won = [row.get("win_rate_vs_u2a", {}) for row in figures]
    named["win rate against u2a"] = [of or None for of in won]
    named["ties"] = [f"{100 * _ties(of):.0f}" if of.get("n") else None for of in won]
    named["win rate, guarded"] = [of.get("guarded") for of in won]
    return {head: of for head, of in named.items() if any(of)}


def _ties(won: Mapping[str, Any]) -> float:
    """Share of decided pairs; earlier versions counted them alone."""
    return won["ties"] if "ties" in won else won["counts"]["tie"] / won["n"]


def _cell(value: Mapping[str, Any] | str | None) -> str:
    if isinstance(value, str):
        return value
    if value is None or value["rate"] is None:
        return "-"
    return f"{100 * value['rate']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def _difference(test: Mapping[str, Any]) -> str:
    return (
        f"{test['a']} - {test['b']}: {100 * test['difference']:+.1f} points guarded "
        f"[{100 * test['low']:+.1f}, {100 * test['high']:+.1f}], Holm's p {_p(test)}, "
        f"Cohen's h {test['cohens_h']:+.2f}"
    )


def _p(test: Mapping[str, Any]) -> str:
    """Corrected; "at most" where no resample was on the other side, as more could say less."""
    corrected = test["p_holm"]
    at_most = test["p"] <= 2.001 / (statistics.RESAMPLES + 1)
    if corrected < 0.001:
        return "< 0.001"
    return f"<= {corrected:.3f}" if at_most else f"{corrected:.3f}"


def _statements(found: Mapping[str, Any]) -> list[str]:
    if not found["statements"]:
        return []
    lines = [
        "",
        "Above 0, or above the points that a statement names, A - B speaks for it. Yes and no need "
        "an interval on one side, and Holm's p over all statements below 0.05.",
        "",
        "| statement of the paper | A - B | figure | difference | answer |",
        "|---|---|---|---|---|",
    ]
    for row, (claim, *others) in zip(found["statements"], statements(found), strict=True):
        lines.append(f"| {' | '.join((claim, sides(row), *others))} |")
    return lines


def sides(statement: Mapping[str, Any]) -> str:
    """Which rows its difference is of, as in "trace - u2a"."""
    return f"{statement['a']} - {statement['b']}"


def statements(found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(claim, figure, difference with its interval, answer) of each statement tested."""
    out = []
    for row in found["statements"]:
        scale = 1 if row["figure"] == "perplexity" else 100
        digits, unit = (2, "") if scale == 1 else (1, " points")
        shown = f"{scale * row['difference']:+.{digits}f}{unit}"
        if row["low"] is not None:
            low, high = scale * row["low"], scale * row["high"]
            shown += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
        out.append((row["claim"], _NAMES[row["figure"]], shown, row["answer"]))
    return out


def _gap(found: Mapping[str, Any]) -> list[str]:
    said, caveat = gap(found), found.get("gap_closed", {}).get("caveat")
    if said is None:
        return []
    return ["", said + (f" Caveat: {caveat}." if caveat else "")]


def gap(found: Mapping[str, Any]) -> str | None:
    """The share of the gap in words, without its caveat; None where nobody asked."""
    closed = found.get("gap_closed")
    if not closed:
        return None
    lower, upper = closed["lower"], closed["upper"]
    of = f"Share of the gap from {lower} to {upper} that {closed['method']} closes"
    if closed["rate"] is None:
        return f"{of}: there is no gap ({upper} is not above {lower})."
    both = f"{_cell(closed)} % guarded, {_cell(closed['raw'])} % raw"
    return f"{of}: {both} (the paper: 81.8 %)."


def latex(found: Mapping[str, Any]) -> str:
    """A booktabs table: rate with its interval as an index, percent."""
    cells_of = columns(found)
    lines = [
        r"\begin{tabular}{l" + "r" * len(cells_of) + "}",
        r"\toprule",
        " & ".join(["", *cells_of]) + r" \\",
        r"\midrule",
    ]
    for i, (name, _) in enumerate(rows(found)):
        cells = [_latex_cell(of[i]) for of in cells_of.values()]
        escaped = name.replace("_", r"\_").replace("%", r"\%")
        lines.append(" & ".join([escaped, *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _latex_cell(value: Mapping[str, Any] | str | None) -> str:
    if isinstance(value, str):
        return value
    if value is None or value["rate"] is None:
        return "--"
    rest = f"[{100 * value['low']:.1f}, {100 * value['high']:.1f}]"
    return f"${100 * value['rate']:.1f}_{{{rest}}}$"


_WIDEST = 2.5  # times the lowest perplexity: what the plot shows


def _apart(rising: Sequence[float], lines: float) -> list[float]:
    """Heights of labels: each near its point, none on another, all between the ends.

    lines: how many of them fill the height; more than there are.
    """
    line, high = (rising[-1] - rising[0]) / lines, rising[-1]
    places: list[float] = []
    for height in rising:
        places.append(max(height, places[-1] + line) if places else height)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], places[i + 1] - line if i + 1 < len(places) else high)
    return places


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Guarded and raw compliance with intervals, and guarded compliance against perplexity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = rows(found)
    names = [name for name, _ in shown]
    height = max(3.0, 0.34 * len(shown) + 1.2)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, height), layout="constrained")
    for key, shift, colour in (("compliance", 0.15, "C7"), ("compliance_guarded", -0.15, "C0")):
        rate = [100 * row[key]["rate"] for _, row in shown]
        error = [
            [r - 100 * row[key]["low"] for r, (_, row) in zip(rate, shown, strict=True)],
            [100 * row[key]["high"] - r for r, (_, row) in zip(rate, shown, strict=True)],
        ]
        places = [i + shift for i in range(len(shown))]
        left.errorbar(rate, places, xerr=error, fmt="o", color=colour, label=COLUMNS[key])
    left.set_yticks(range(len(shown)), names)
    left.invert_yaxis()
    left.set_xlabel("compliance with the new policy, held-out prompts (%)")
    left.legend(fontsize=8)
    left.grid(axis="x", alpha=0.3)
    edge = _WIDEST * min(row["perplexity"] for _, row in shown)
    upwards = sorted(shown, key=lambda of: of[1]["compliance_guarded"]["rate"])
    rates = [100 * row["compliance_guarded"]["rate"] for _, row in upwards]
    for (name, row), rate, place in zip(upwards, rates, _apart(rates, 7 * height), strict=True):
        at = (min(edge, row["perplexity"]), rate)
        colour = "C1" if name in ("base", "M_ref") else "C0"
        right.plot(*at, ">" if row["perplexity"] > edge else "o", color=colour)
        right.annotate(
            name,
            at,
            (1.03, place),
            textcoords=right.get_yaxis_transform(),  # beside the axes, at the height of a rate
            fontsize=7,
            ha="left",
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "grey", "relpos": (0, 0.5)},
        )
    right.set_xlabel(f"perplexity of base text (lower: closer to it; arrows: over {edge:.1f})")
    right.set_ylabel("guarded, T=1 (%)")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
