"""What a compiled program sends between devices, read from its text (`compiled.as_text()`)."""

import collections
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "f16": 2, "u8": 1, "s8": 1}


def received(text: str, *, waited_for: bool = False) -> dict[str, float]:
    """Bytes that a device receives by each kind of collective, times the trips of loops around.

    waited_for: only of those that stand alone, while nothing else is computed. The TPU compiler
    cuts the others into pieces, each within the fusion of a matrix product (`chain_id`).

    Raises:
      ValueError: a loop's number of trips or a collective's group of devices is not in the text.
    """
    bodies, entry = _computations(text)
    found: collections.Counter[str] = collections.Counter()
    seen: set[str] = set()  # pieces of one collective share a channel

    def visit(computation: str, times: int) -> None:
        for line in bodies.get(computation, ()):
            for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                visit(called, times * _trips(line, bodies) if f"body=%{called}" in line else times)
            kind = next((k for k in KINDS if re.search(rf" {k}(-start)?\(", line)), None)
            channel = re.search(r"channel_id=(\d+)", line)
            if kind is None or (channel and channel[1] in seen):
                continue
            seen.update(channel.groups() if channel else ())
            if not (waited_for and 'chain_id="' in line):
                scatters = computation.startswith("all-reduce-scatter")  # and keeps its own part
                found[kind] += times * _of_line(kind, line) / (2 if scatters else 1)

    visit(entry, 1)
    return dict(found)


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


def _of_line(kind: str, line: str) -> float:
    result, operands = re.split(rf" {kind}(?:-start)?\(", line, maxsplit=1)
    shapes = [_size(*s) for s in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result.split(" = ")[-1])]
    largest, smallest = max(shapes, default=0), min(shapes, default=0)
    if kind == "collective-permute":
        return largest  # of one neighbour
    n = _of_a_group(operands)
    if n == 1:
        return 0.0
    whole = {"reduce-scatter": smallest * n, "all-reduce": 2 * largest}.get(kind, largest)
    return whole * (n - 1) / n


def _of_a_group(text: str) -> int:
    """Devices that a collective joins: of a list, an iota, or named axes of a mesh."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return listed[1].count(",") + 1
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", text)
    if iota:
        return int(iota[1])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text)
    if mesh is None:
        raise ValueError(f"a collective without groups: {text[:200]}")
    sizes = dict(part.split("=") for part in mesh[1].split(","))
    return math.prod(int(sizes[axis.strip()]) for axis in mesh[2].split(","))


def _size(dtype: str, dims: str) -> int:
    count = 1
    for d in filter(None, dims.split(",")):
        count *= int(d)
    return count * _BYTES.get(dtype, 0)
