"""Forward-mode impact scores against per-example gradients: time, memory, the same numbers.

python -m bench.impact --model=../shared/models/stories260k [--quick] [--out=FILE.json]

Both paths score the same 8 pairs a batch, one pair a row, full parameters, along the same g_J; the
order alternates, medians are given. Temporary memory is what the compiler says (memory_analysis),
so it does not depend on the machine's load. vmap(grad) is measured as it comes and with layers
recomputed in the backward pass (remat), its best case for memory.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx

from bench import frontier
from trace_jax import (
    batches,
    encoding,
    impact,
    logprobs,
    methods,
    models,
    packing,
    records,
    synth,
    train,
)

BATCH = 8


def pairs(
    encoder: encoding.Encoder, n: int
) -> tuple[list[methods.Example], list[encoding.Encoded]]:
    """n SynthValueBench pairs as INVERT examples, in the model's tokens."""
    found = synth.pairs(0, n)
    examples = [
        methods.Example(
            str(i), "INVERT", p["prompt"], " " + p["rejected"], " " + p["chosen"], pref=1.0
        )
        for i, p in enumerate(found)
    ]
    return batches.encode_examples(encoder, examples)


def measure(model: Path, repeats: int) -> dict:
    """Rows and headline of the benchmark."""
    module = models.load(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    examples, encoded = pairs(encoding.Encoder(tokenizer, max_length=256, end_id=None), 4 * BATCH)
    length = packing.round_up(max(e.row_length for e in encoded), 64)
    layout = packing.Layout(BATCH, length, 1, len(encoded) // BATCH)
    ref = logprobs.of_texts(module, encoded, row_length=length, micro_rows=4)
    batch = batches.make_batch([[i] for i in range(len(encoded))], layout, encoded, examples, ref)
    module.remat = "layer"
    remat = nnx.split(module)[0]
    module.remat = "none"
    graphdef, params, frozen = nnx.split(module, nnx.Param, ...)
    hyper = train.Hyper(*(jnp.float32(v) for v in (1e-4, 0.1, 0.1)))
    options = train.Options(
        "logistic", "plain", False, len(encoded), 1, 2, 1, 0.1, 0.0, 1.0, 0.9, 0.999
    )
    fixed = {"graphdef": graphdef, "options": options}
    gold = impact.objective_gradient(params, frozen, batches.Step(batch, None), hyper, **fixed)
    rows_args = (params, frozen, jax.tree.map(lambda g: g[None], gold), batch.rows)
    loss_args = (params, frozen, gold, batch, hyper)
    paths = {
        "jvp": (impact.response_derivatives, rows_args, {"graphdef": graphdef, "n_responses": 2}),
        "jvp_losses": (impact.loss_derivatives, loss_args, fixed),
        "vmap_grad": (impact.per_example_gradient_dots, loss_args, fixed),
        "vmap_grad_remat": (
            impact.per_example_gradient_dots,
            loss_args,
            fixed | {"graphdef": remat},
        ),
    }
    compiled = {
        name: f.lower(*args, **kwargs).compile() for name, (f, args, kwargs) in paths.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    values = {}
    for repeat in range(repeats + 1):
        for name in list(paths)[:: 1 if repeat % 2 else -1]:
            start = time.perf_counter()
            values[name] = np.asarray(jax.block_until_ready(compiled[name](*paths[name][1])))
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return _result(
        compiled, seconds, _scores(values, examples, layout, options), len(encoded), length
    )


def _scores(
    values: dict, examples, layout: packing.Layout, options: train.Options
) -> dict[str, np.ndarray]:
    d_n2 = values["jvp"].reshape(layout.n_rows, 2)
    closed = [
        impact.score(e, d[0], d[1], options=options, beta=0.1, tau=0.1)
        for e, d in zip(examples, d_n2, strict=True)
    ]
    return {"jvp": np.array(closed)} | {k: values[k].reshape(-1) for k in values if k != "jvp"}


def _result(compiled: dict, seconds: dict, scores: dict, n: int, length: int) -> dict:
    temp = {name: c.memory_analysis().temp_size_in_bytes for name, c in compiled.items()}
    median = {name: statistics.median(s) for name, s in seconds.items()}
    scale = float(np.sqrt(np.mean(np.square(scores["vmap_grad"]))))
    rows = [
        {
            "path": name,
            "pairs_per_second": n / median[name],
            "seconds_median": median[name],
            "seconds_min": min(seconds[name]),
            "seconds_max": max(seconds[name]),
            "temp_bytes": temp[name],
            "max_error_over_rms": float(np.max(np.abs(scores[name] - scores["vmap_grad"]))) / scale,
        }
        for name in compiled
    ]
    headline = {
        "speedup_vs_vmap_grad": median["vmap_grad"] / median["jvp"],
        "speedup_vs_vmap_grad_remat": median["vmap_grad_remat"] / median["jvp"],
        "temp_vs_vmap_grad": temp["jvp"] / temp["vmap_grad"],
        "temp_vs_vmap_grad_remat": temp["jvp"] / temp["vmap_grad_remat"],
        "max_relative_error": max(r["max_error_over_rms"] for r in rows),
    }
    return {
        "headline": headline,
        "rows": rows,
        "batch": BATCH,
        "row_length": length,
        **frontier.machine(),
    }


def main(argv: list[str]) -> int:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="../shared/models/stories260k", help="Hugging Face directory of a Llama"
    )
    parser.add_argument("--out", default="bench/results/impact.json")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    args = parser.parse_args(argv[1:])
    found = measure(Path(args.model), 5 if args.quick else 20)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    records.write_json(args.out, found)
    for row in found["rows"]:
        print(
            f"{row['path']:<16} {row['pairs_per_second']:8.1f} pairs/s  "
            f"{row['temp_bytes'] / 2**20:8.2f} MiB temporary  error {row['max_error_over_rms']:.1e}"
        )
    print(", ".join(f"{k} {v:.3g}" for k, v in found["headline"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
