"""Tokens a second of sampling with slots refilled as rows finish, against whole batches.

python -m bench.sampling [--model DIR] [--shapes llama8b] [--out FILE]

Both schemes are the same programs: `refills=4` refills a slot once a quarter of them are free,
`refills=1` waits for the last row of a batch. Runs alternate; the ratio is per pair of runs.
--shapes takes the shape of a config (configs/llama8b.py) with random weights, for an accelerator.
"""

import argparse
import importlib
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench import frontier
from trace_jax import models, programs, records, sampling

PROMPTS, NEW_TOKENS, BATCH_ROWS = 192, 256, 64


def load(path: str, shapes: str | None) -> models.Decoder:
    """A checkpoint, or random weights of a config's shape, drawn on the device."""
    if shapes is None:
        return models.load(path)
    hf = importlib.import_module(f"configs.{shapes}").get_config("lora").model.hf_config
    config = models.ModelConfig.from_hf(hf.to_dict())
    empty = programs.abstract(programs.Model(config, "bfloat16", "layer", 128))
    graphdef, state = nnx.split(empty)
    key = jax.random.key(0)
    draw = jax.jit(
        lambda shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=0
    )
    return nnx.merge(graphdef, jax.tree.map(lambda x: draw(x.shape), state))


def measure(module: models.Decoder, repeats: int) -> dict:
    """Seconds of each scheme, alternating, on the same rows."""
    rng = np.random.default_rng(0)
    vocabulary = module.config.vocab_size
    lengths = rng.integers(8, 64, PROMPTS)
    prompts = [[1, *rng.integers(3, vocabulary, n).tolist()] for n in lengths]
    # A story ends after more than 256 tokens, and random weights stop nowhere: paragraphs end rows,
    # or one token in a hundred.
    stops = (1, 2, 13) if vocabulary < 1000 else tuple(range(0, vocabulary, 100))

    def run(refills: int) -> tuple[float, int]:
        start = time.perf_counter()
        made = sampling.generate(
            module,
            prompts,
            ids=[str(i) for i in range(PROMPTS)],
            seed=0,
            max_new_tokens=NEW_TOKENS,
            temperature=1.0,
            stop_ids=stops,
            batch_rows=BATCH_ROWS,
            refills=refills,
        )
        return time.perf_counter() - start, sum(len(s.tokens) for (s,) in made)

    seconds, tokens = {1: [], 4: []}, 0
    for refills in seconds:
        tokens = run(refills)[1]  # compiles
    for _ in range(repeats):
        for refills, found in seconds.items():
            found.append(run(refills)[0])
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    return {
        "tokens": tokens,
        "mean_new_tokens": tokens / PROMPTS,
        "tokens_per_second": {
            "refill": tokens / statistics.median(seconds[4]),
            "whole_batches": tokens / statistics.median(seconds[1]),
        },
        "speedup": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "batch_rows": BATCH_ROWS,
        "max_new_tokens": NEW_TOKENS,
        "repeats": repeats,
        **frontier.machine(),
    }


def main(argv: list[str]) -> int:
    """Prints the figures and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="../shared/models/stories260k")
    parser.add_argument("--shapes", default=None, help="llama8b, qwen7b, gemma9b or gemma2b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="docs/results/sampling.json")
    args = parser.parse_args(argv[1:])
    found = measure(load(args.model, args.shapes), args.repeats)
    found |= {"model": args.shapes or Path(args.model).name, "device": jax.devices()[0].device_kind}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    records.write_json(args.out, found)
    print({key: found[key] for key in ("model", "tokens_per_second", "speedup", "mean_new_tokens")})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
