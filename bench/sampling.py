"""Tokens a second of sampling against transformers' generate, and what refilled slots give.

python -m bench.sampling [--quick] [--model DIR] [--shapes llama8b] [--out FILE]

The same model, prompts and stop tokens at temperature 1, 64 rows at once; counted are the tokens up
to a row's stop. `refill` refills a slot once a quarter of them are free (what trace_jax does),
`whole_batches` waits for the last row of a batch, `transformers` is generate with its cache in
float32 on CPU, prompts sorted by length. Runs alternate; ratios are per round. --shapes takes the
shape of a config (configs/llama8b.py) with random weights, for an accelerator, and ours alone.
"""

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

from bench import real_pairs, results
from trace_jax import models, programs, sampling, sharding

PROMPTS, NEW_TOKENS, BATCH_ROWS = 192, 256, 64


def load(path: str, shapes: str | None, mesh: jax.sharding.Mesh) -> models.Decoder:
    """A checkpoint, or random weights of a config's shape, drawn on the devices."""
    if shapes is None:
        return models.load(path, mesh=mesh)
    hf = importlib.import_module(f"configs.{shapes}").get_config("lora").model.hf_config
    config = models.ModelConfig.from_hf(hf.to_dict())
    empty = programs.abstract(programs.Model(config, "bfloat16", "layer", 128))
    graphdef, state = nnx.split(empty)
    key = jax.random.key(0)
    draw = jax.jit(
        lambda shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=0
    )
    with jax.set_mesh(mesh):
        module = nnx.merge(graphdef, jax.tree.map(lambda x: draw(x.shape), state))
        return sharding.place_module(module)


def stops_of(vocabulary: int) -> tuple[int, ...]:
    """Tokens that end a row.

    A story ends after more than 256 tokens, and random weights stop nowhere: paragraphs end rows,
    or one token in a hundred.
    """
    return (1, 2, 13) if vocabulary < 1000 else tuple(range(0, vocabulary, 100))


def ours(module: models.Decoder, prompts: list[list[int]], refills: int) -> int:
    """Tokens made."""
    made = sampling.generate(
        module,
        prompts,
        ids=[str(i) for i in range(len(prompts))],
        seed=0,
        max_new_tokens=NEW_TOKENS,
        temperature=1.0,
        stop_ids=stops_of(module.config.vocab_size),
        batch_rows=BATCH_ROWS,
        refills=refills,
    )
    return sum(len(s.tokens) for (s,) in made)


def theirs(path: str, prompts: list[list[int]]) -> Callable[[], int]:
    """generate of transformers, whole batches of prompts of like length."""
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    stops = stops_of(network.config.vocab_size)
    ordered = sorted(prompts, key=len)

    def run() -> int:
        torch.manual_seed(0)
        n_tokens = 0
        for at in range(0, len(ordered), BATCH_ROWS):
            batch = ordered[at : at + BATCH_ROWS]
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in batch])
            seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
            with torch.no_grad():
                made = network.generate(
                    input_ids=ids, attention_mask=seen, do_sample=True, temperature=1.0, top_k=0,
                    top_p=1.0, max_new_tokens=NEW_TOKENS, eos_token_id=list(stops), pad_token_id=0,
                )[:, longest:]  # fmt: skip
            ended = torch.isin(made, torch.tensor(stops)).int().cumsum(1) > 0
            n_tokens += int((~ended).sum())
        return n_tokens

    return run


def measure(module: models.Decoder, path: str | None, repeats: int) -> list[dict]:
    """Tokens a second of each scheme, alternating, on the same prompts."""
    rng = np.random.default_rng(0)
    vocabulary = module.config.vocab_size
    prompts = [[1, *rng.integers(3, vocabulary, n).tolist()] for n in rng.integers(8, 64, PROMPTS)]
    schemes = {
        "refill": lambda: ours(module, prompts, 4),
        "whole_batches": lambda: ours(module, prompts, 1),
    }
    if path is not None:
        schemes["transformers"] = theirs(path, prompts)
    speeds: dict[str, list[float]] = {name: [] for name in schemes}
    tokens = {name: run() for name, run in schemes.items()}  # compiles
    for repeat in range(repeats):
        for name in list(schemes)[:: 1 if repeat % 2 else -1]:
            start = time.perf_counter()
            made = schemes[name]()
            speeds[name].append(made / (time.perf_counter() - start))

    return [
        {
            "what": name,
            "mean_new_tokens": tokens[name] / PROMPTS,
            "tokens_per_second": statistics.median(of),
            "range": [min(of), max(of)],
            "refill_over_it": [a / b for a, b in zip(speeds["refill"], of, strict=True)],
        }
        for name, of in speeds.items()
    ]


def main(argv: Sequence[str]) -> int:
    """Prints the figures and writes the JSON."""
    values = results.flags(
        argv, "sampling", __doc__, "two rounds",
        model={"default": "../shared/models/stories260k", "metavar": "DIR"},
        shapes={"help": "llama8b, qwen7b, gemma9b or gemma2b"},
        repeats={"type": int, "default": 5},
    )  # fmt: skip
    if values.shapes is None:
        jax.config.update("jax_num_cpu_devices", real_pairs.cpu_devices(Path(values.model)))
    mesh = sharding.make_mesh(1, -1, 1)
    module = load(values.model, values.shapes, mesh)
    repeats = 2 if values.quick else values.repeats
    with jax.set_mesh(mesh):
        rows = measure(module, None if values.shapes else values.model, repeats)
    for row in rows:
        print(f"{row['what']:14} {row['tokens_per_second']:8.0f} tokens/s")
    spread = {
        f"speedup_vs_{row['what']}": row["refill_over_it"]
        for row in rows
        if row["what"] != "refill"
    }
    results.write(
        values.out,
        rows=rows,
        headline={name: statistics.median(of) for name, of in spread.items()},
        spread=spread,
        packages=() if values.shapes else ("torch",),
        model=values.shapes or Path(values.model).name,
        device=jax.devices()[0].device_kind,
        devices=jax.device_count(),
        batch_rows=BATCH_ROWS,
        max_new_tokens=NEW_TOKENS,
        repeats=repeats,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
