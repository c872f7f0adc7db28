"""What a training step computes and sends as devices are added, by the compiler and not by time.

python -m bench.scaling [--quick] [--topologies v5p:2x2x1,v5p:2x2x2,v5p:2x2x4] [--out FILE]

Full fine-tuning of Gemma-2-9B (rows of 1,024 tokens, a conflict and a KL batch, parameters cut over
all chips), compiled ahead of time for TPU slices: strong scaling has 16 rows of each kind in all,
weak scaling one of each a chip. --quick, and the first rows without: a small Llama over 1, 2, 4 and
8 devices of this host's CPU.

Bytes are what each device receives a step, from the compiled program (bench/collectives.py):
results of all-gather and all-to-all, operands of reduce-scatter, twice the operands of all-reduce,
times the trips of the loops around; the last row has the flags for overlap, which hide transfers
behind products and take memory for it. FLOPs are counted from the shapes. Seconds are the two
divided by what a chip can do (FLOPS, and LINKS: bytes a second over all its links,
cloud.google.com/tpu/docs/v5p): which of both limits, were nothing overlapped and nothing else to
do.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from bench import collectives, frontier
from trace_jax import config as config_lib
from trace_jax import fit, hardware, models, packing, programs, records, sharding

LENGTH, ROWS, SLOTS = 1024, 16, 3
LINKS = {"v5p": 600e9, "v5e": 200e9}  # bytes a second and chip
# Gathers of parameters run in pieces beside the matrix products before them (launch/tpu_pod.sh).
OVERLAP = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}
LINE = (
    "{what:12} {scaling:12} {devices:3} devices: {tflops:8.2f} TFLOP, {gib:7.3f} GiB received, "
    "{waited_gib:7.3f} of them waited for"
)


def step(
    config, shape: models.ModelConfig, mesh, rows: int, length: int, options: dict | None = None
) -> dict:
    """Figures of one compiled step of `rows` rows of each kind."""
    settings = fit.Settings.of(config.train, row_length=length, seed=0)
    model = programs.Model(
        shape, config.model.dtype, config.model.remat, config.model.head_chunk,
        config.train.layer_rows,
    )  # fmt: skip
    layout = packing.Layout(rows, length, SLOTS, 1)
    lowered = programs.train_step(model, settings, layout, layout, mesh)
    compiled = lowered.compile(compiler_options=options)
    text = compiled.as_text()
    received = collectives.received(text)
    waited_for = collectives.received(text, waited_for=True)
    # forward and backward of both kinds, and the reference's forward of one
    flops = 7 * rows * length * shape.forward_flops(length) / mesh.size
    memory = compiled.memory_analysis()
    return {
        "devices": mesh.size,
        "rows_of_each_kind": rows,
        "tflops": flops / 1e12,
        "received_bytes": received,
        "gib": sum(received.values()) / 2**30,
        "waited_gib": sum(waited_for.values()) / 2**30,
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
    slices = {}
    for name in names:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        slices[name] = sharding.make_mesh(1, -1, 1, devices=list(devices))
    cases = [("strong", name, ROWS, None) for name in names]
    cases += [("weak", name, mesh.size, None) for name, mesh in slices.items()]
    cases += [("weak, overlap", names[-1], slices[names[-1]].size, OVERLAP)]
    rows, known = [], {}
    for scaling, name, many, options in cases:
        key = (name, many, options is None)
        if key not in known:  # the largest slice has as many rows in both
            known[key] = step(config, shape, slices[name], many, LENGTH, options)
        found, chip = known[key], hardware.of_topology(name)[0]
        seconds = {
            "compute_seconds": found["tflops"] * 1e12 / chip.flops,
            "transfer_seconds": found["gib"] * 2**30 / LINKS[name.partition(":")[0]],
        }
        limit = max(seconds, key=seconds.get).partition("_")[0]
        rows.append({"what": name, "scaling": scaling, "limit": limit} | found | seconds)
        print(LINE.format(**rows[-1]), f"limited by {limit}, {found['temp_gib']:.1f} GiB of "
              "temporaries", flush=True)  # fmt: skip
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
    if rows[-1]["scaling"] == "weak, overlap":
        headline["waited_share_with_overlap"] = rows[-1]["waited_gib"] / rows[-1]["gib"]
    values.out.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(values.out, {"headline": headline, "rows": rows, **frontier.machine()})
    print(f"{values.out}: {headline}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
