"""The LM head in chunks against all logits at once: peak temporaries and time.

python -m bench.head [--quick] [--topology v5e:2x4] [--out FILE]

Log-probs (value, gradient, directional derivative) and KL (gradient), a head of width 512 and 32k,
128k and 256k entries, float32. `whole` has the logits of all tokens and keeps what its backward
pass needs: optax's cross entropy, and KL of two log_softmax. `chunked` is what training uses, which
computes logits again in the backward pass.

Temporaries of 2,048 tokens are the compiler's (memory_analysis), here and ahead of time for one
TPU chip of that slice in bfloat16. Seconds are medians here, of 1,024 tokens, the order alternated
and all outputs compared. The last row is the whole train step of Gemma-2-9B with LoRA for one v5p
chip, 8 rows of each kind, the head in chunks and layers two rows at a time, against layers whole
and all logits kept. --topology= leaves out what needs libtpu. --quick has the temporaries of 256k
here and the seconds of 128k and 512 tokens.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench import results
from trace_jax import losses

ROWS, LENGTH, TIMED_LENGTH, WIDTH = 2, 1024, 512, 512
VOCABULARIES = {"32k": 32_000, "128k": 128_256, "256k": 256_000}
REPEATS = 3
STEP_ROWS, LAYER_ROWS = 8, 2  # of the whole step: of each kind; that a layer works on at once
KINDS = ("chunked", "whole")
# What a program is called in the headlines; that of the gradient is the issue of memory as well.
ENDS = {"logprob": "_forward", "logprob_gradient": "", "logprob_jvp": "_jvp", "kl_gradient": "_kl"}


def programs(kind: str) -> dict[str, Callable]:
    """Name -> function of hidden [B, L, D], kernel [D, V], targets [B, L] and two tangents."""

    def logprob(hidden_BLD, kernel_DV, targets_BL, *_):
        def logits(h):
            return (h @ kernel_DV).astype(jnp.float32)

        if kind == "whole":
            of = optax.losses.softmax_cross_entropy_with_integer_labels
            return -of(logits(hidden_BLD), targets_BL).sum()
        return losses.token_logprobs(logits, hidden_BLD, targets_BL, targets_BL >= 0).sum()

    def kl(hidden_BLD, kernel_DV, targets_BL, *_):
        def logits(h):
            return (h @ kernel_DV).astype(jnp.float32)

        reference = jax.lax.stop_gradient(hidden_BLD) * 1.1
        counts_BL = targets_BL >= 0
        if kind == "whole":
            of_reference = jax.lax.stop_gradient(logits(reference))
            means_B = losses.forward_kl(of_reference, logits(hidden_BLD), counts_BL)
            return (means_B * counts_BL.sum(-1)).sum()
        return losses.token_kl(logits, reference, logits, hidden_BLD, counts_BL).sum()

    def derivative(hidden_BLD, kernel_DV, targets_BL, *tangents):
        def of(h, k):
            return logprob(h, k, targets_BL)

        # Tangents of their own: with those of the values the three products are one.
        return jax.jvp(of, (hidden_BLD, kernel_DV), tangents)

    return {
        "logprob": logprob,
        "logprob_gradient": jax.value_and_grad(logprob, argnums=(0, 1)),
        "logprob_jvp": derivative,
        "kl_gradient": jax.value_and_grad(kl, argnums=(0, 1)),
    }


def shapes(vocabulary: int, length: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of the programs' arguments."""
    return (
        jax.ShapeDtypeStruct((ROWS, length, WIDTH), dtype),
        jax.ShapeDtypeStruct((WIDTH, vocabulary), dtype),
        jax.ShapeDtypeStruct((ROWS, length), jnp.int32),
        jax.ShapeDtypeStruct((ROWS, length, WIDTH), dtype),
        jax.ShapeDtypeStruct((WIDTH, vocabulary), dtype),
    )


def temporaries(vocabulary: int, where: Any = None) -> dict[str, dict[str, Any]]:
    """Bytes of each program here, or in bfloat16 on the device of a sharding."""
    placed = {} if where is None else {"in_shardings": where, "out_shardings": where}
    of = shapes(vocabulary, LENGTH, jnp.float32 if where is None else jnp.bfloat16)
    found = {}
    for name in ENDS:
        temp = {}
        for kind in KINDS:
            compiled = jax.jit(programs(kind)[name], **placed).lower(*of).compile()
            temp[kind] = compiled.memory_analysis().temp_size_in_bytes
        found[name] = {"temp_bytes": temp, "temp_ratio": temp["chunked"] / temp["whole"]}
    return found


def times(name: str, vocabulary: int, length: int, repeats: int) -> dict[str, Any]:
    """Seconds of a program: least, median and largest of each kind, and all ratios."""
    rng = np.random.default_rng(0)
    hidden, of_hidden = jnp.asarray(rng.standard_normal((2, ROWS, length, WIDTH)), jnp.float32)
    drawn = 0.05 * rng.standard_normal((2, WIDTH, vocabulary), dtype=np.float32)
    kernel, of_kernel = jnp.asarray(drawn)
    targets = jnp.asarray(rng.integers(0, vocabulary, (ROWS, length)), jnp.int32)
    inputs = hidden, kernel, targets, of_hidden, of_kernel
    of = shapes(vocabulary, length, jnp.float32)
    compiled = {kind: jax.jit(programs(kind)[name]).lower(*of).compile() for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    values = {}
    for repeat in range(repeats + 1):
        for kind in KINDS[:: 1 if repeat % 2 else -1]:
            start = time.perf_counter()
            values[kind] = jax.block_until_ready(compiled[kind](*inputs))
            if repeat:  # the first round warms up
                seconds[kind].append(time.perf_counter() - start)
    for a, b in zip(*(jax.tree.leaves(values[kind]) for kind in KINDS), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3, err_msg=name)
    return {
        "timed_tokens": ROWS * length,
        "seconds": {k: [min(s), statistics.median(s), max(s)] for k, s in seconds.items()},
        "time_ratios": [a / b for a, b in zip(*(seconds[k] for k in KINDS), strict=True)],
    }


def step(rows: int) -> dict[str, Any]:
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
    chunked, temp = losses._over_chunks, {}
    for kind in KINDS:
        losses._over_chunks = chunked if kind == "chunked" else _kept
        layer_rows = LAYER_ROWS if kind == "chunked" else 0
        model = programs.Model(shape, "bfloat16", "layer", config.model.head_chunk, layer_rows)
        jax.clear_caches()
        lowered = programs.train_step(model, settings, layout, layout, mesh)
        temp[kind] = programs.memory(lowered).temp_bytes
    losses._over_chunks = chunked
    return {
        "where": "v5p:1x1x1", "vocabulary": "256k", "program": "gemma9b_step", "rows": 2 * rows,
        "layer_rows": LAYER_ROWS, "temp_bytes": temp, "temp_ratio": temp["chunked"] / temp["whole"],
    }  # fmt: skip


def _kept(
    of_chunk: Callable, logits_fn: Callable, arrays: tuple, counts_BL: jax.Array, chunk: int
) -> jax.Array:
    """What the chunked head stands against: all logits at once, kept for the backward pass."""
    del logits_fn, counts_BL, chunk
    return of_chunk(*arrays)


def chip(topology: str) -> jax.sharding.NamedSharding:
    """Everything on one chip of a TPU slice that is not here."""
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    mesh = jax.sharding.Mesh(np.array(found.devices[:1]), ("x",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def shown(row: dict) -> str:
    """A row of the table."""
    temp = ", ".join(f"{kind} {n / 2**20:.0f} MiB" for kind, n in row["temp_bytes"].items())
    took = f", {statistics.median(row['time_ratios']):.2f} of the time" if "seconds" in row else ""
    return f"{row['vocabulary']:5} {row['where']:9} {row['program']:17} {temp}{took}"


def headline(rows: Sequence[dict]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Ratios here of the largest head that was measured, and those of all repeats."""
    here = [row for row in rows if row["where"] == "here"]
    found = {
        f"temp_ratio_{row['vocabulary']}": row["temp_ratio"]
        for row in here
        if row["program"] == "logprob_gradient" and row["vocabulary"] == here[-1]["vocabulary"]
    }
    timed = [row for row in here if "time_ratios" in row]
    spread = {
        f"time_ratio_{row['vocabulary']}{ENDS[row['program']]}": row["time_ratios"]
        for row in timed
        if row["vocabulary"] == timed[-1]["vocabulary"]
    }
    return found | {name: statistics.median(of) for name, of in spread.items()}, spread


def measure(vocabulary: str, length: int | None, repeats: int, where: Any = None) -> list[dict]:
    """Rows of a head; length: of the timed rows, None for temporaries alone."""
    size = VOCABULARIES[vocabulary]
    rows = []
    for name, of in temporaries(size, where).items():
        row = {"where": "here" if where is None else where.mesh.devices.flat[0].device_kind}
        row |= {"vocabulary": vocabulary, "program": name} | of
        rows.append(row if length is None else row | times(name, size, length, repeats))
        print(shown(rows[-1]), flush=True)
    return rows


def main(argv: Sequence[str]) -> int:
    """Measures, prints and writes."""
    values = results.flags(
        argv, "head", __doc__, "temporaries of 256k entries, seconds of 128k and 512 tokens",
        topology={"default": "v5e:2x4", "help": "a TPU slice; needs libtpu"},
    )  # fmt: skip
    if values.quick:
        rows = measure("128k", TIMED_LENGTH // 2, 1) + measure("256k", None, 0)
    else:
        rows = [row for name in VOCABULARIES for row in measure(name, TIMED_LENGTH, REPEATS)]
    afar = bool(values.topology) and not values.quick
    if afar:
        where = chip(values.topology)
        rows += [row for name in VOCABULARIES for row in measure(name, None, 0, where)]
        rows.append(step(STEP_ROWS))
        print(shown(rows[-1]))
    found, spread = headline(rows)
    results.write(
        values.out, rows=rows, headline=found, spread=spread, packages=["libtpu"] * afar,
        tokens=ROWS * LENGTH, width=WIDTH,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
