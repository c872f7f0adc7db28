"""What a training step computes and sends as devices are added, by the compiler and not by time.

python -m bench.scaling [--quick] [--topologies v5p:2x2x1,v5p:2x2x2,v5p:2x2x4] [--out FILE]

Full fine-tuning of Gemma-2-9B (rows of 1,024 tokens, a conflict and a KL batch, parameters cut over
all chips), compiled ahead of time for TPU slices: strong scaling has 16 rows of each kind in all,
weak scaling one of each a chip. --quick, and the first rows without: a small Llama over 1, 2, 4 and
8 devices of this host's CPU.

Bytes are what each device receives a step, from the compiled program: results of all-gather and
all-to-all, operands of reduce-scatter, twice the operands of all-reduce, times the trips of the
loops around. FLOPs are counted from the shapes. Seconds are the two divided by what a chip can do
(FLOPS, and LINKS: bytes a second over all its links, cloud.google.com/tpu/docs/v5p): which of both
limits, were nothing overlapped and nothing else to do.
"""

import argparse
import collections
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from bench import frontier
from trace_jax import config as config_lib
from trace_jax import fit, hardware, models, packing, programs, records, sharding

LENGTH, ROWS, SLOTS = 1024, 16, 3
LINKS = {"v5p": 600e9, "v5e": 200e9}  # bytes a second and chip
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "f16": 2, "u8": 1, "s8": 1}
LINE = "{what:12} {scaling:6} {devices:3} devices: {tflops:8.2f} TFLOP, {gib:7.3f} GiB received"


def collective_bytes(text: str) -> dict[str, float]:
    """Bytes that a device receives by each kind of collective, of a compiled program's text."""
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
    found: collections.Counter[str] = collections.Counter()

    def visit(computation: str, times: int) -> None:
        for line in bodies.get(computation, ()):
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                inside = times * int(trips[1]) if trips and f"body=%{called}" in line else times
                visit(called, inside)
            for kind in KINDS:
                if re.search(rf" {kind}(-start)?\(", line):
                    found[kind] += times * _received(kind, line)

    visit(entry, 1)
    return dict(found)


def _received(kind: str, line: str) -> float:
    result, operands = re.split(rf" {kind}(?:-start)?\(", line, maxsplit=1)
    shapes = [_size(*s) for s in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result.split(" = ")[-1])]
    n = _of_a_group(operands)
    largest, smallest = max(shapes, default=0), min(shapes, default=0)
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


def step(config, shape: models.ModelConfig, mesh, rows: int, length: int) -> dict:
    """Figures of one compiled step of `rows` rows of each kind."""
    settings = fit.Settings.of(config.train, row_length=length, seed=0)
    model = programs.Model(
        shape, config.model.dtype, config.model.remat, config.model.head_chunk,
        config.train.layer_rows,
    )  # fmt: skip
    layout = packing.Layout(rows, length, SLOTS, 1)
    compiled = programs.train_step(model, settings, layout, layout, mesh).compile()
    received = collective_bytes(compiled.as_text())
    # forward and backward of both kinds, and the reference's forward of one
    flops = 7 * rows * length * shape.forward_flops(length) / mesh.size
    memory = compiled.memory_analysis()
    return {
        "devices": mesh.size,
        "rows_of_each_kind": rows,
        "tflops": flops / 1e12,
        "received_bytes": received,
        "gib": sum(received.values()) / 2**30,
        "temp_gib": memory.temp_size_in_bytes / 2**30,
        "argument_gib": memory.argument_size_in_bytes / 2**30,
    }


def on_host() -> list[dict]:
    """A small Llama over 1 to 8 devices of the CPU, its parameters cut."""
    config = config_lib.base_config()
    values = {"family": "llama", "hidden_size": 256, "intermediate_size": 768, "layers": 8,
              "heads": 4, "kv_heads": 4, "context": 256}  # fmt: skip
    shape = models.scratch(values, 32_768)
    rows = []
    for scaling in ("strong", "weak"):
        for n in (1, 2, 4, 8):
            mesh = sharding.make_mesh(1, n, 1, devices=jax.devices("cpu")[:n])
            found = step(config, shape, mesh, 8 if scaling == "strong" else n, 256)
            rows.append({"what": "16m, CPU", "scaling": scaling} | found)
            print(LINE.format(**rows[-1]))
    return rows


def on_slices(names: Sequence[str]) -> list[dict]:
    """Gemma-2-9B over TPU slices."""
    from jax.experimental import topologies

    from configs import gemma9b

    config = gemma9b.get_config("full")
    shape = models.ModelConfig.from_hf(config.model.hf_config.to_dict())
    rows = []
    for scaling in ("strong", "weak"):
        for name in names:
            devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
            mesh = sharding.make_mesh(1, -1, 1, devices=list(devices))
            found = step(config, shape, mesh, ROWS if scaling == "strong" else mesh.size, LENGTH)
            chip = hardware.of_topology(name)[0]
            seconds = {
                "compute_seconds": found["tflops"] * 1e12 / chip.flops,
                "transfer_seconds": found["gib"] * 2**30 / LINKS[name.partition(":")[0]],
            }
            limit = max(seconds, key=seconds.get).partition("_")[0]
            rows.append({"what": name, "scaling": scaling, "limit": limit} | found | seconds)
            print(LINE.format(**rows[-1]), f"limited by {limit}, {found['temp_gib']:.1f} GiB of "
                  "temporaries")  # fmt: skip
    return rows


def main(argv: Sequence[str]) -> int:
    """Compiles, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="devices of this host's CPU alone")
    parser.add_argument("--topologies", default="v5p:2x2x1,v5p:2x2x2,v5p:2x2x4")
    parser.add_argument("--out", type=Path, default=Path("bench/results/scaling.json"))
    values = parser.parse_args(argv)
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_STDERR_LOG_LEVEL": "3"}
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    rows = on_host()
    if not values.quick:
        rows += on_slices(values.topologies.split(","))
    of = [r for r in rows if r["scaling"] == "weak"]
    largest = [r for r in of if r["what"] == of[-1]["what"]][-1]
    before = [r for r in of if r["devices"] == largest["devices"] // 2][-1]
    headline = {
        "weak_flops_ratio": largest["tflops"] / before["tflops"],
        "weak_bytes_ratio": largest["gib"] / before["gib"],
    }
    values.out.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(values.out, {"headline": headline, "rows": rows, **frontier.machine()})
    print(f"{values.out}: {headline}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
