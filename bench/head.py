"""The LM head in chunks against all logits at once: peak temporaries and time.

python -m bench.head [--quick] [--topology v5e:2x4] [--step] [--out FILE]

Log-probs (value, gradient, directional derivative) and KL (gradient) of 2,048 tokens, a head of
width 512 and 32k, 128k and 256k entries, float32. Temporaries are the compiler's (memory_analysis),
on this machine and, with --topology, ahead of time for one TPU chip of that slice in bfloat16;
seconds, of value and gradient of log-probs, are medians of alternating runs here. The unchunked
form is the same code with one chunk. --step (two minutes, needs libtpu): the whole train step of
Gemma-2-9B with LoRA for one v5p chip, with the head in chunks and layers two rows at a time,
against one with layers whole that keeps all logits for its backward pass.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import frontier
from trace_jax import losses, records

ROWS, LENGTH, WIDTH = 2, 1024, 512
VOCABULARIES = {"32k": 32_000, "128k": 128_256, "256k": 256_000}
REPEATS = 3
STEP_ROWS, LAYER_ROWS = 8, 2  # of the whole step: of each kind; that a layer works on at once
TIMED = ("logprob_gradient",)  # of all, the temporaries are compared


def programs(chunk: int) -> dict[str, Callable]:
    """Name -> function of (hidden [B, L, D], kernel [D, V], targets [B, L])."""

    def logprob(hidden_BLD, kernel_DV, targets_BL):
        def logits(h):
            return (h @ kernel_DV).astype(jnp.float32)

        return losses.token_logprobs(logits, hidden_BLD, targets_BL, targets_BL >= 0, chunk).sum()

    def kl(hidden_BLD, kernel_DV, targets_BL):
        def logits(h):
            return (h @ kernel_DV).astype(jnp.float32)

        reference = jax.lax.stop_gradient(hidden_BLD) * 1.1
        return losses.token_kl(logits, reference, logits, hidden_BLD, targets_BL >= 0, chunk).sum()

    def derivative(hidden_BLD, kernel_DV, targets_BL):
        def of(h, k):
            return logprob(h, k, targets_BL)

        return jax.jvp(of, (hidden_BLD, kernel_DV), (hidden_BLD, kernel_DV))

    return {
        "logprob": logprob,
        "logprob_gradient": jax.value_and_grad(logprob, argnums=(0, 1)),
        "logprob_jvp": derivative,
        "kl_gradient": jax.value_and_grad(kl, argnums=(0, 1)),
    }


def shapes(vocabulary: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of the programs' arguments."""
    return (
        jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), dtype),
        jax.ShapeDtypeStruct((WIDTH, vocabulary), dtype),
        jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32),
    )


def here(vocabulary: int) -> list[dict]:
    """Temporaries and seconds on this machine."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((ROWS, LENGTH, WIDTH)), jnp.float32)
    kernel = jnp.asarray(0.05 * rng.standard_normal((WIDTH, vocabulary)), jnp.float32)
    arguments = hidden, kernel, jnp.asarray(rng.integers(0, vocabulary, (ROWS, LENGTH)), jnp.int32)
    rows = []
    for name in programs(0):
        compiled = {
            kind: jax.jit(programs(chunk)[name]).lower(*shapes(vocabulary, jnp.float32)).compile()
            for kind, chunk in (("chunked", 0), ("whole", ROWS * LENGTH))
        }
        if name not in TIMED:
            rows.append({"program": name} | _temporaries(compiled))
            continue
        seconds: dict[str, list[float]] = {kind: [] for kind in compiled}
        values = {}
        for repeat in range(REPEATS + 1):
            for kind in list(compiled)[:: 1 if repeat % 2 else -1]:
                start = time.perf_counter()
                values[kind] = jax.block_until_ready(compiled[kind](*arguments))
                if repeat:
                    seconds[kind].append(time.perf_counter() - start)
        assert all(
            np.allclose(a, b, rtol=1e-3, atol=1e-3)
            for a, b in zip(*(jax.tree.leaves(v) for v in values.values()), strict=True)
        )
        ratios = [a / b for a, b in zip(seconds["chunked"], seconds["whole"], strict=True)]
        rows.append(
            {
                "program": name,
                "seconds": {kind: statistics.median(found) for kind, found in seconds.items()},
                "time_ratio": statistics.median(ratios),
                "time_ratio_range": [min(ratios), max(ratios)],
            }
            | _temporaries(compiled)
        )
    return rows


def _temporaries(compiled: dict[str, Any]) -> dict[str, Any]:
    temp = {kind: c.memory_analysis().temp_size_in_bytes for kind, c in compiled.items()}
    return {"temp_bytes": temp, "temp_ratio": temp["chunked"] / temp["whole"]}


def afar(vocabulary: int, topology: str) -> list[dict]:
    """Temporaries on one chip of a TPU slice, in bfloat16."""
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    mesh = jax.sharding.Mesh(np.array(chips.devices[:1]), ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows = []
    for name in programs(0):
        compiled = {}
        for kind, chunk in (("chunked", 0), ("whole", ROWS * LENGTH)):
            jitted = jax.jit(programs(chunk)[name], in_shardings=whole, out_shardings=whole)
            compiled[kind] = jitted.lower(*shapes(vocabulary, jnp.bfloat16)).compile()
        rows.append({"program": name} | _temporaries(compiled))
    return rows


def step(rows: int) -> dict[str, int]:
    """Temporaries of the 42-layer step: `rows` conflict and as many KL rows of 1,024 tokens."""
    from jax.experimental import topologies

    from configs import gemma9b
    from trace_jax import fit, models, packing, programs, sharding

    chips = topologies.get_topology_desc(
        platform="tpu", topology_name="v5p:1x1x1", chips_per_host_bounds=(1, 1, 1)
    )
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=list(chips.devices))
    config = gemma9b.get_config("lora")
    shape = models.ModelConfig.from_hf(config.model.hf_config.to_dict())
    settings = fit.Settings.of(config.train, row_length=LENGTH, seed=0)
    layout = packing.Layout(rows, LENGTH, 3, 1)
    chunked, found = losses._over_chunks, {}
    for kind in ("chunked", "kept"):
        losses._over_chunks = chunked if kind == "chunked" else _kept
        layer_rows = LAYER_ROWS if kind == "chunked" else 0
        model = programs.Model(shape, "bfloat16", "layer", config.model.head_chunk, layer_rows)
        jax.clear_caches()
        lowered = programs.train_step(model, settings, layout, layout, mesh)
        found[kind] = programs.memory(lowered).temp_bytes
    losses._over_chunks = chunked
    return found


def _kept(
    of_chunk: Callable, logits_fn: Callable, arrays: tuple, counts_BL: jax.Array, chunk: int
) -> jax.Array:
    """What the chunked head stands against: all logits at once, kept for the backward pass."""
    del logits_fn, counts_BL, chunk
    return of_chunk(*arrays)


def main(argv: Sequence[str]) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="256k alone")
    parser.add_argument("--topology", help="a TPU slice such as v5e:2x4; needs libtpu")
    parser.add_argument("--step", action="store_true", help="the whole train step as well")
    parser.add_argument("--out", type=Path, default=Path("bench/results/head.json"))
    values = parser.parse_args(argv)
    names = ["256k"] if values.quick else list(VOCABULARIES)
    result = frontier.machine() | {"tokens": ROWS * LENGTH, "width": WIDTH, "here": {}, "tpu": {}}
    for name in names:
        result["here"][name] = here(VOCABULARIES[name])
        if values.topology:
            result["tpu"][name] = afar(VOCABULARIES[name], values.topology)
        for where in ("here", "tpu"):
            for row in result[where].get(name, ()):
                temp = {kind: f"{n / 2**20:.0f} MiB" for kind, n in row["temp_bytes"].items()}
                took = f", {row['time_ratio']:.2f} times the time" if "time_ratio" in row else ""
                print(f"{name:5} {where:4} {row['program']:17} {temp}{took}")
    last = {row["program"]: row for row in result["here"]["256k"]}
    result["headline"] = {
        "temp_ratio_256k": last["logprob_gradient"]["temp_ratio"],
        "time_ratio_256k": last["logprob_gradient"]["time_ratio"],
    }
    if values.step:
        temp = step(STEP_ROWS)
        result["step"] = {
            "rows": 2 * STEP_ROWS,
            "layer_rows": LAYER_ROWS,
            "length": LENGTH,
            "temp_bytes": temp,
            "temp_ratio": temp["chunked"] / temp["kept"],
        }
        print(f"whole step: {temp['chunked'] / 2**30:.1f} GiB, kept {temp['kept'] / 2**30:.1f} GiB")
    records.write_json(values.out, result)
    print(f"{values.out}: {result['headline']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
