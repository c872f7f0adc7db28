"""How much of what a training step computes is real: padding, buckets, packing, shared prompts.

python -m bench.packing [--quick] [--data ../shared/data] [--out FILE]

Tokens of real pairs (HH, PKU, XSTest) under a byte-level tokenizer of 32,768 entries trained on
them, pairs of at most 1,024 tokens, 32 pairs a step (the default). Real are the tokens of prompt
and response that stand in a row, computed every position of a row. Tokens of which positions are
counted (`computed_per_token`) are those of both rows of a pair, the prompt in each.

padded     a row a response, as long as the longest of its step (TRL's default)
bucketed   the same, of pairs of similar length (group_by_length)
packed     several responses a row, rows as long as the longest pair, every step as many rows
shared     the same with the prompt written once a pair
ours       and examples dealt by length, rows as long as costs least: what trace_jax does

Without --quick the programs of a small run are counted as well.
"""

import argparse
import collections
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench import frontier, real_pairs
from trace_jax import encoding, models, packing, records

LIMIT, PER_STEP, STEPS = 1024, 32, 100
NAMES = ("hh", "pku", "xstest")
LINE = "{data:7} {how:9} {real_token_share:6.1%} real, {computed_per_token:5.2f} computed a token"


def lengths(pairs: Sequence[dict], tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(tokens of both rows of each pair [n, 2], positions of one row with the prompt once [n])."""
    encoder = encoding.Encoder(tokenizer, max_length=LIMIT, end_id=tokenizer.eos_token_id,
                               cut_responses=True)  # fmt: skip
    encoded = [
        encoder.encode(pair["prompt"], [pair["chosen"], pair["rejected"]], "")
        for pair in pairs
        if len(tokenizer(pair["prompt"]).input_ids) < LIMIT // 2
    ]
    alone = [[len(e.prompt) - 1 + len(b) for b in e.branches] for e in encoded]
    return np.array(alone), np.array([e.row_length for e in encoded])


def measure(alone_N2: np.ndarray, shared_N: np.ndarray) -> list[dict]:
    """Rows of the table of one data set."""
    how = dict(per_step=PER_STEP, total_steps=STEPS, seed=0)
    random = packing.draw(shared_N, **how, balanced=False)
    longest = packing.round_row(int(shared_N.max()), "cpu")
    flops = models.scratch(
        real_pairs.SHAPES["16m"] | {"family": "llama", "context": LIMIT}, real_pairs.VOCABULARY
    ).forward_flops

    def padded(members: np.ndarray) -> tuple[np.ndarray, int, int]:
        rows = alone_N2[members].reshape(len(members), -1)
        return members, rows.sum(), (rows.max(axis=1) * rows.shape[1]).sum()

    def packed(of: np.ndarray, drawn: np.ndarray, row_length: int) -> tuple[int, int]:
        (plan,) = packing.lay_out([(of.tolist(), drawn)], row_length=row_length, shards=1,
                                  micro_rows=8, flops=flops, platform="cpu")  # fmt: skip
        return of[drawn].sum(), STEPS * plan.layout.n_rows * plan.layout.row_length

    order = np.argsort(alone_N2.max(axis=1)[random.ravel()], kind="stable")
    both = np.stack([2 * random, 2 * random + 1], axis=2).reshape(STEPS, -1)
    dealt = packing.draw(shared_N, **how)
    found = {
        "padded": padded(random),
        "bucketed": padded(random.ravel()[order].reshape(random.shape)),
        "packed": (random, *packed(alone_N2.ravel(), both, longest)),
        "shared": (random, *packed(shared_N, random, longest)),
        "ours": (dealt, *packed(shared_N, dealt, 0)),
    }
    return [
        {
            "how": name,
            "real_token_share": float(real / computed),
            "computed_per_token": float(computed / alone_N2[members].sum()),
        }
        for name, (members, real, computed) in found.items()
    ]


def programs() -> dict[str, int]:
    """How often each program of a small run was compiled, of those that ran on batches."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trace_jax.launch", f"--workdir={folder}/run"]
        command += ["--config=configs/quickstart.py:smoke"]
        environment = os.environ | {"JAX_LOG_COMPILES": "1", "JAX_PLATFORMS": "cpu"}
        environment["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/cache"
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    names = re.findall(r"Finished XLA compilation of jit\((\w+)\)", done.stderr)
    return dict(collections.Counter(names))


def main(argv: Sequence[str]) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="without the count of programs")
    parser.add_argument("--data", type=Path, default=real_pairs.DATA)
    parser.add_argument("--out", type=Path, default=Path("bench/results/packing.json"))
    values = parser.parse_args(argv)
    rows, headline = [], {}
    for name in NAMES:
        pairs = real_pairs.read(name, values.data)
        tokenizer = real_pairs.tokenizer([text for pair in pairs for text in pair.values()])
        alone_N2, shared_N = lengths(pairs, tokenizer)
        of_data = [{"data": name} | row for row in measure(alone_N2, shared_N)]
        for row in of_data:
            print(LINE.format(**row))
        rows += of_data
        headline[f"real_token_share_{name}"] = of_data[-1]["real_token_share"]
        headline[f"shared_prefix_saving_{name}"] = float(alone_N2.sum() / shared_N.sum())
    result = {"rows": rows, "per_step": PER_STEP, "headline": headline, **frontier.machine()}
    if not values.quick:
        result["programs"] = programs()
        print("compiled:", result["programs"])
    values.out.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(values.out, result)
    print(f"{values.out}: {headline}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
