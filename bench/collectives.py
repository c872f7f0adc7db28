"""What a compiled program sends between devices, read from its text (`compiled.as_text()`)."""

import math
import re

from bench import program_text

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "f16": 2, "u8": 1, "s8": 1}


def received(text: str, *, waited_for: bool = False) -> dict[str, float]:
    """Bytes that a device receives by each kind of collective, times the trips of loops around.

    waited_for: only of those that stand alone, while nothing else is computed. The TPU compiler
    cuts the others into pieces, each within the fusion of a matrix product (`chain_id`).

    Raises:
      ValueError: a loop's number of trips or a collective's group of devices is not in the text.
    """
    seen: set[str] = set()  # pieces of one collective share a channel

    def of_line(line: program_text.Line) -> dict[str, float]:
        kind = next((k for k in KINDS if re.search(rf" {k}(-start)?\(", line.text)), None)
        channel = re.search(r"channel_id=(\d+)", line.text)
        if kind is None or (channel and channel[1] in seen):
            return {}
        seen.update(channel.groups() if channel else ())
        if waited_for and 'chain_id="' in line.text:
            return {}
        scatters = line.computation.startswith("all-reduce-scatter")  # and keeps its own part
        return {kind: _of_line(kind, line.text) / (2 if scatters else 1)}

    return program_text.totals(text, of_line)


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
    order = r"(?:, device_ids=\([^{]*\))?"  # of the devices in the mesh
    mesh = re.search(rf"replica_groups=mesh\[([^\]]*)\]{order} \{{([^}}]*)\}}", text)
    if mesh is None:
        raise ValueError(f"a collective without groups: {text[:200]}")
    sizes = dict(part.split("=") for part in mesh[1].split(","))
    return math.prod(int(sizes[axis.strip()]) for axis in mesh[2].split(","))


def _size(dtype: str, dims: str) -> int:
    count = 1
    for d in filter(None, dims.split(",")):
        count *= int(d)
    return count * _BYTES.get(dtype, 0)
