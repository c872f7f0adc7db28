"""A comparison as people read it: Markdown, LaTeX and two plots."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = {
    "compliance_guarded": "guarded, T=1",
    "compliance": "raw, T=1",
    "compliance_greedy": "greedy",
    "retained": "unchanged clauses",
    "compliance_old": "old policy",
}
ACCURACY = "right of 4"
_NAMES = {
    "compliance_guarded": "guarded", "compliance": "raw", "perplexity": "log perplexity",
    "choice_accuracy": ACCURACY,
}  # fmt: skip


def markdown(found: Mapping[str, Any]) -> str:
    """Percent with 95 % intervals; the tests, the statements and the gap below."""
    more = {"choice_accuracy": ACCURACY, "win_rate_vs_u2a": "win rate against u2a"}
    more = {k: v for k, v in more.items() if any(k in row for _, row in _rows(found))}
    heads = [*COLUMNS.values(), "perplexity", *more.values()]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, row in _rows(found):
        cells = [_cell(row[key]) for key in COLUMNS] + [f"{row['perplexity']:.2f}"]
        cells += [_cell(row[key]) if key in row else "-" for key in more]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    seeds = ", ".join(map(str, found["seeds"]))
    lines += ["", f"Percent [95 % interval]; {found['split']} prompts; seeds {seeds}.", ""]
    for test in found["tests"]:
        if test["figure"] == "compliance_guarded":
            lines.append(f"- {_difference(test)}")
    return "\n".join(lines + _statements(found) + _gap(found)) + "\n"


def _rows(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    named = [("base", found.get("base")), ("M_ref", found.get("ref")), *found["methods"].items()]
    return [(name, row) for name, row in named if row]


def _cell(rate: Mapping[str, Any]) -> str:
    if rate["rate"] is None:
        return "-"
    return f"{100 * rate['rate']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def _difference(test: Mapping[str, Any]) -> str:
    return (
        f"{test['a']} - {test['b']}: {100 * test['difference']:+.1f} points guarded "
        f"[{100 * test['low']:+.1f}, {100 * test['high']:+.1f}], Holm's p {_p(test['p_holm'])}, "
        f"Cohen's h {test['cohens_h']:+.2f}"
    )


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _statements(found: Mapping[str, Any]) -> list[str]:
    if not found["statements"]:
        return []
    lines = ["", "| statement of the paper | figure | difference | answer |", "|---|---|---|---|"]
    for row in found["statements"]:
        scale = 1 if row["figure"] == "perplexity" else 100
        digits, unit = (2, "") if scale == 1 else (1, " points")
        shown = f"{scale * row['difference']:+.{digits}f}{unit}"
        if row["low"] is not None:
            low, high = scale * row["low"], scale * row["high"]
            shown += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
        lines.append(f"| {row['claim']} | {_NAMES[row['figure']]} | {shown} | {row['answer']} |")
    return lines


def _gap(found: Mapping[str, Any]) -> list[str]:
    gap = found.get("gap_closed")
    if not gap:
        return []
    of = f"Share of the gap from {gap['lower']} to {gap['upper']} that {gap['method']} closes"
    if gap["rate"] is None:
        return ["", f"{of}: there is no gap ({gap['upper']} is not above {gap['lower']})."]
    said = f"{of}: {_cell(gap)} % guarded, {_cell(gap['raw'])} % raw (the paper: 81.8 %)."
    return ["", said + (f" Caveat: {gap['caveat']}." if "caveat" in gap else "")]


def latex(found: Mapping[str, Any]) -> str:
    """A booktabs table: rate with its interval as an index, percent."""
    columns = COLUMNS | (
        {"choice_accuracy": ACCURACY}
        if all("choice_accuracy" in r for _, r in _rows(found))
        else {}
    )
    heads = " & ".join(["", *columns.values(), "perplexity"])
    lines = [
        r"\begin{tabular}{l" + "r" * (len(columns) + 1) + "}",
        r"\toprule",
        heads + r" \\",
        r"\midrule",
    ]
    for name, row in _rows(found):
        cells = [_latex_cell(row[key]) for key in columns]
        escaped = name.replace("_", r"\_").replace("%", r"\%")
        lines.append(" & ".join([escaped, *cells, f"{row['perplexity']:.2f}"]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _latex_cell(rate: Mapping[str, Any]) -> str:
    rest = f"[{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
    return f"${100 * rate['rate']:.1f}_{{{rest}}}$"


_WIDEST = 2.5  # times the lowest perplexity: what the plot shows
_LINE = 2.2  # percent of compliance that a label is high


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Guarded and raw compliance with intervals, and guarded compliance against perplexity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = _rows(found)
    names = [name for name, _ in rows]
    height = max(3.0, 0.34 * len(rows) + 1.2)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, height), layout="constrained")
    for key, shift, colour in (("compliance", 0.15, "C7"), ("compliance_guarded", -0.15, "C0")):
        rate = [100 * row[key]["rate"] for _, row in rows]
        error = [
            [r - 100 * row[key]["low"] for r, (_, row) in zip(rate, rows, strict=True)],
            [100 * row[key]["high"] - r for r, (_, row) in zip(rate, rows, strict=True)],
        ]
        places = [i + shift for i in range(len(rows))]
        left.errorbar(rate, places, xerr=error, fmt="o", color=colour, label=COLUMNS[key])
    left.set_yticks(range(len(rows)), names)
    left.invert_yaxis()
    left.set_xlabel("compliance with the new policy, held-out prompts (%)")
    left.legend(fontsize=8)
    left.grid(axis="x", alpha=0.3)
    edge = _WIDEST * min(row["perplexity"] for _, row in rows)
    last, aside = -math.inf, 0.03 * edge
    for name, row in sorted(rows, key=lambda of: of[1]["compliance_guarded"]["rate"]):
        beyond = row["perplexity"] > edge
        at = (min(edge, row["perplexity"]), 100 * row["compliance_guarded"]["rate"])
        colour = "C1" if name in ("base", "M_ref") else "C0"
        right.plot(*at, ">" if beyond else "o", color=colour)
        last = max(at[1], last + _LINE)  # labels of points close together stand above each other
        right.annotate(
            name,
            at,
            (at[0] + (-aside if beyond else aside), last),
            fontsize=7,
            ha="right" if beyond else "left",
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "grey"},
        )
    right.set_xlabel(f"perplexity of base text (lower: closer to it; arrows: over {edge:.1f})")
    right.set_ylabel("guarded, T=1 (%)")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
