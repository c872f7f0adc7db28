"""What a training step and the impact pass compute and send as devices are added, by the compiler.

python -m bench.scaling [--quick] [--topologies v5p:2x2x1,v5p:2x2x2,v5p:2x2x4] [--out FILE]

A small Llama over 1, 2, 4 and 8 devices of this host's CPU (all that --quick does), and Gemma-2-9B
(rows of 1,024 tokens, a conflict and a KL batch, all parameters trained and cut over all chips)
compiled ahead of time for TPU slices. Strong scaling has 8 or 16 rows of each kind in all, weak
scaling one of each a device. Not by time: none of these devices is here, or they share two cores.

FLOPs are those of the compiled program's matrix products (bench/products.py): what a step computes
again in its backward pass is in them. Bytes are what each device receives (bench/collectives.py):
results of all-gather and all-to-all, operands of reduce-scatter, twice the operands of all-reduce.
Both times the trips of the loops around, and of a choice (chunks of the head without a target are
skipped) the dearer branch. The last row has the flags for overlap, which hide transfers behind
products and take memory for it. Seconds are FLOPs and bytes divided by what a chip can do
(FLOPS, and LINKS: bytes a second over all its links, cloud.google.com/tpu/docs/v5p): which of both
limits, were nothing overlapped and nothing else to do.

Headlines are of twice the devices over once (ends in 8_over_4 and so on): a device's FLOPs or bytes
in weak scaling, FLOPs of all devices together in strong scaling. 1 is best; what parts every
device receives of parameters cut over n grows as 1 - 1/n, 1.17 from 4 to 8 and 1.07 from 8 to 16.
"""

import itertools
import os
import sys
from collections.abc import Sequence

import jax

from bench import collectives, products, results
from trace_jax import config as config_lib
from trace_jax import fit, hardware, models, packing, programs, sharding

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
PROGRAMS = ("train", "impact")
LINE = (
    "{what:10} {program:6} {scaling:13} {devices:3} devices: {tflops:8.3f} TFLOP, {gib:7.3f} GiB "
    "received, {waited_gib:7.3f} of them waited for"
)


def compiled(program: str, config, shape: models.ModelConfig, mesh, rows: int, length: int,
             options: dict | None = None) -> dict:  # fmt: skip
    """Figures of a train step with `rows` rows of each kind, or an impact pass over `rows`."""
    settings = fit.Settings.of(config.train, row_length=length, seed=0)
    model = programs.Model(
        shape, config.model.dtype, config.model.remat, config.model.head_chunk,
        config.train.layer_rows,
    )  # fmt: skip
    layout = packing.Layout(rows, length, SLOTS, 1)
    if program == "train":
        lowered = programs.train_step(model, settings, layout, layout, mesh)
    else:
        lowered = programs.impact_pass(model, settings, layout, mesh)
    found = lowered.compile(compiler_options=options)
    text, memory = found.as_text(), found.memory_analysis()
    received = collectives.received(text)
    waited_for = collectives.received(text, waited_for=True)
    return {
        "program": program,
        "devices": mesh.size,
        "rows_of_each_kind": rows,
        "tflops": products.flops(text) / 1e12,
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
    for program, scaling in itertools.product(PROGRAMS, ("strong", "weak")):
        for n in (1, 2, 4, 8):
            mesh = sharding.make_mesh(1, n, 1, devices=jax.devices("cpu")[:n])
            found = compiled(program, config, shape, mesh, 8 if scaling == "strong" else n, 256)
            rows.append({"what": "CPU", "scaling": scaling} | found)
            print(LINE.format(**rows[-1]), flush=True)
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
    cases = []
    for program in PROGRAMS:
        cases += [(program, "strong", name, ROWS, None) for name in names]
        cases += [(program, "weak", name, mesh.size, None) for name, mesh in slices.items()]
    cases += [("train", "weak, overlap", names[-1], slices[names[-1]].size, OVERLAP)]
    rows, known = [], {}
    for program, scaling, name, many, options in cases:
        key = (program, name, many, options is None)
        if key not in known:  # the largest slice has as many rows in both
            known[key] = compiled(program, config, shape, slices[name], many, LENGTH, options)
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


def headline(rows: Sequence[dict]) -> dict[str, float]:
    """Ratios of neighbours: twice the devices over once."""
    found = {}
    for one, two in itertools.pairwise(rows):
        alike = all(one[key] == two[key] for key in ("program", "scaling"))
        where = {row["what"] == "CPU" for row in (one, two)}
        if not alike or len(where) > 1 or two["devices"] != 2 * one["devices"]:
            continue
        begin = f"{'host_' if True in where else ''}{one['program']}_{one['scaling']}"
        end = f"{two['devices']}_over_{one['devices']}"
        together = 2 if one["scaling"] == "strong" else 1
        found[f"{begin}_flops_{end}"] = together * two["tflops"] / one["tflops"]
        if one["scaling"] == "weak" and one["gib"]:  # one device receives nothing
            found[f"{begin}_bytes_{end}"] = two["gib"] / one["gib"]
    if rows[-1]["scaling"] == "weak, overlap":
        found["waited_share_with_overlap"] = rows[-1]["waited_gib"] / rows[-1]["gib"]
    return found


def main(argv: Sequence[str]) -> int:
    """Compiles, prints and writes."""
    values = results.flags(
        argv, "scaling", __doc__, "devices of this host's CPU alone",
        topologies={"default": "v5p:2x2x1,v5p:2x2x2,v5p:2x2x4"},
    )  # fmt: skip
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_STDERR_LOG_LEVEL": "3"}
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    rows = on_host()
    if not values.quick:
        rows += on_slices(values.topologies.split(","))
    packages = () if values.quick else ("libtpu",)
    results.write(values.out, rows=rows, headline=headline(rows), packages=packages)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
