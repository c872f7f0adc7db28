"""A compiled program's text (`compiled.as_text()`) as computations and how often each runs."""

import collections
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

Figures = collections.Counter[str]


class Line(NamedTuple):
    """An instruction, and the computation in which it stands: its name and shapes by name."""

    text: str
    computation: str
    shapes: Mapping[str, tuple[int, ...]]


def totals(text: str, of_line: Callable[[Line], Mapping[str, float]]) -> dict[str, float]:
    """Figures of all lines by name, times the trips of the loops around.

    Of a choice (`lax.cond`: chunks of the head without a target, for one) the branch of the largest
    sum counts, so the totals are what a program does at most.

    Raises:
      ValueError: a loop's number of trips is not in the text.
    """
    bodies, entry = _computations(text)

    def of(name: str) -> Figures:
        found: Figures = collections.Counter()
        shapes = dict(_shape(line) for line in bodies.get(name, ()) if _SHAPE.match(line))
        for line in bodies.get(name, ()):
            for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                times = _trips(line, bodies) if f"body=%{called}" in line else 1
                _add(found, of(called), times)
            branches = [of(branch) for branch in _branches(line)]
            _add(found, max(branches, key=Figures.total, default=Figures()), 1)
            _add(found, of_line(Line(line, name, shapes)), 1)
        return found

    return dict(of(entry))


def _add(found: Figures, more: Mapping[str, float], times: int) -> None:
    for name, value in more.items():
        found[name] += times * value


_SHAPE = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]")


def _shape(line: str) -> tuple[str, tuple[int, ...]]:
    name, dims = _SHAPE.match(line).groups()
    return name, tuple(int(d) for d in dims.split(",") if d)


def _branches(line: str) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", line)
    names = listed[1] if listed else ""
    names += " ".join(re.findall(r"(?:true|false)_computation=(%?[\w.\-]+)", line))
    return re.findall(r"[\w.\-]+", names)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of every computation, and the name of the one that starts."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        opened = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if opened and not line.startswith(" "):
            name = opened[2]
            bodies[name] = []
            entry = name if opened[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _trips(loop: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop goes round: as it says, or what its counter is compared with."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop)
    if known:
        return int(known[1])
    condition = bodies[re.search(r"condition=%?([\w.\-]+)", loop)[1]]
    limits = [re.search(r" s32\[\]\S* constant\((\d+)\)", line) for line in condition]
    found = [int(limit[1]) for limit in limits if limit]
    if len(found) != 1 or not any("direction=LT" in line for line in condition):
        raise ValueError(f"a loop of unknown length: {loop[:200]}")
    return found[0]
