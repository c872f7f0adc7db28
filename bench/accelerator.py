"""Speed of the train step and of the impact pass on an accelerator: tokens, pairs, MFU, memory.

python -m bench.accelerator [--shapes llama8b] [--program train] [--rows 8] [--length 1024] \\
    [--remat dots] [--head_chunk 1024] [--adapters lora] [--out FILE]

The shape of a config (configs/llama8b.py) with random weights drawn on the device, packed rows of
random tokens without padding: three examples a row, two responses each. A step of `train` has
--rows conflict rows and as many KL rows; one of `impact` has --rows rows and one tangent.
Utilisation is MFU: operations of the model, not those it recomputes, over the chip's peak. FILE
keeps one row a setting; a process measures one, so that its peak memory is its own.
"""

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench import results
from trace_jax import (
    batches,
    encoding,
    fit,
    hardware,
    impact,
    methods,
    models,
    packing,
    records,
    train,
)

EXAMPLES, TANGENTS = 3, 1  # of a row; gradients that scores are taken along
WARM_UP = 2


def model(config, values: argparse.Namespace) -> models.Decoder:
    """Random weights of a config's shape, bfloat16."""
    of_hf = config.model.hf_config.to_dict() | (
        {"num_hidden_layers": values.layers} if values.layers else {}
    )
    shape = models.ModelConfig.from_hf(of_hf)

    def make(key: jax.Array):
        count = iter(range(1000))

        def draw(std: float, of: tuple[int, ...]) -> jax.Array:
            drawn = jax.random.normal(jax.random.fold_in(key, next(count)), of, jnp.bfloat16)
            return jnp.asarray(std, jnp.bfloat16) * drawn

        return nnx.split(models.Decoder(shape, draw, jnp.bfloat16))

    graphdef, state = nnx.split(nnx.eval_shape(lambda: nnx.merge(*make(jax.random.key(0)))))
    state = jax.jit(lambda key: make(key)[1])(jax.random.key(0))
    module = nnx.merge(graphdef, state)
    module.remat, module.head_chunk = values.remat, values.head_chunk
    return module


def texts(vocabulary: int, n: int, length: int) -> list[encoding.Encoded]:
    """Examples of random tokens that fill rows of `length` by threes."""
    rng = np.random.default_rng(0)
    room = length // EXAMPLES + 1
    response = room // 3

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, vocabulary, n).tolist())

    return [
        encoding.Encoded(tokens(room - 2 * response), (tokens(response), tokens(response)), (0, 0))
        for _ in range(n)
    ]


def batch(module: models.Decoder, rows: int, length: int, **coefficients: float) -> batches.Batch:
    """One micro-batch of `rows` full rows, on the device."""
    encoded = texts(module.config.vocab_size, rows * EXAMPLES, length)
    examples = [
        methods.Example(str(i), "INVERT", "", "", "", **coefficients) for i in range(len(encoded))
    ]
    plan_of = [list(range(r * EXAMPLES, (r + 1) * EXAMPLES)) for r in range(rows)]
    layout = packing.Layout(rows, length, EXAMPLES, 1)
    return jax.device_put(batches.make_batch(plan_of, layout, encoded, examples))


def train_program(module, settings: fit.Settings, values) -> tuple[Callable[[], None], int]:
    """(one update, and waits for it; forward passes of a token it is worth, times tokens)."""
    graphdef, params, frozen = nnx.split(
        fit.with_adapters(module, settings), fit.trainable(settings), ...
    )
    step = batches.Step(
        batch(module, values.rows, values.length, pref=1.0),
        batch(module, values.rows, values.length, kl=1.0),
    )
    state = [train.init_state(params, settings.options())]
    reference = fit.reference(params, settings)

    def once() -> None:
        state[0], metrics = train.train_step(
            state[0], frozen, reference, step, settings.hyper(), None,
            graphdef=graphdef, options=settings.options(),
        )  # fmt: skip
        assert np.isfinite(jax.device_get(metrics["loss/total"]))

    tokens = values.rows * values.length
    passes = 3 if settings.adapters == "none" else 2
    return once, (2 * passes + 1) * tokens


def impact_program(module, settings: fit.Settings, values) -> tuple[Callable[[], None], int]:
    """The same of one batch of the impact pass."""
    graphdef, params, frozen = nnx.split(
        fit.with_adapters(module, settings), fit.trainable(settings), ...
    )
    rows = batch(module, values.rows, values.length).rows
    tangents = jax.tree.map(lambda p: 1e-3 * jnp.ones((TANGENTS, *p.shape), p.dtype), params)

    def once() -> None:
        found = impact.response_derivatives(
            params, frozen, tangents, rows, graphdef=graphdef, n_responses=2 * EXAMPLES
        )
        assert np.isfinite(jax.device_get(found)).all()

    a_tangent = 2 if settings.adapters == "none" else 1
    return once, (1 + TANGENTS * a_tangent) * values.rows * values.length


def measure(values: argparse.Namespace) -> dict:
    """Medians over steps after the warm-up."""
    config = importlib.import_module(f"configs.{values.shapes}").get_config("lora")
    config.train.adapters = values.adapters
    settings = fit.Settings.of(config.train, row_length=values.length, seed=0)
    module = model(config, values)
    program = {"train": train_program, "impact": impact_program}[values.program]
    once, passes = program(module, settings, values)
    seconds = []
    for _ in range(WARM_UP + values.steps):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    if values.profile:
        with jax.profiler.trace(values.profile):
            once()
    device = jax.devices()[0]
    chip = hardware.of_device(device)
    median = statistics.median(seconds[WARM_UP:])
    flops = module.config.forward_flops(values.length) * passes
    tokens = values.rows * values.length * (2 if values.program == "train" else 1)
    stats = device.memory_stats() or {}
    return {
        **{k: v for k, v in vars(values).items() if k not in ("out", "profile")},
        "device": device.device_kind,
        "seconds": median,
        "seconds_range": [min(seconds[WARM_UP:]), max(seconds[WARM_UP:])],
        "compile_seconds": seconds[0],
        "tokens_per_second": tokens / median,
        "pairs_per_second": tokens / values.length * EXAMPLES / median,
        "mfu": flops / median / chip.flops if chip.flops else None,
        "peak_flops": chip.flops,
        "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
        **results.machine(),
    }


def main(argv: Sequence[str]) -> int:
    """Prints the figures and adds them to the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="llama8b", help="llama8b, qwen7b, gemma9b or gemma2b")
    parser.add_argument("--program", choices=("train", "impact"), default="train")
    parser.add_argument("--adapters", choices=("lora", "none"), default="lora")
    parser.add_argument("--layers", type=int, default=0, help="so many only; 0: all")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--head_chunk", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--profile", help="folder for a trace of one more step")
    parser.add_argument("--out", type=Path, default=Path("bench/results/accelerator.json"))
    values = parser.parse_args(argv)
    found = measure(values)
    rows = records.read_json(values.out)["rows"] if values.out.exists() else []
    values.out.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(values.out, {"rows": [*rows, found]})
    shown = ("program", "rows", "remat", "head_chunk", "tokens_per_second", "mfu", "peak_gib")
    print({key: found[key] for key in (*shown, "seconds", "compile_seconds")})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
