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

Without --quick the programs of a small run of the quickstart (all stages in one process, an empty
compilation cache) are counted, stage by stage. Headlines: those of the training step in stage
train, of the pass in stage impact, of the sampler in the whole run (a prompt's and a token's), and
all that were compiled.
"""

import collections
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bench import real_pairs, results
from trace_jax import encoding, models, packing

LIMIT, PER_STEP, STEPS = 1024, 32, 100
NAMES = ("hh", "pku", "xstest")
SMALL_RUN = (
    "--config=configs/quickstart.py",
    "--config.data.pairs=300",
    "--config.data.validation_prompts=20",
    "--config.data.test_prompts=20",
    "--config.model.scratch.layers=1",
    "--config.model.scratch.documents=1000",
    "--config.model.scratch.training.total_steps=40",
    "--config.align.total_steps=15",
    "--config.train.total_steps=20",
)
# Programs of a run, and what they are for.
PURPOSES = {
    "train_step": "the step",
    "response_derivatives": "the impact pass",
    "prefill": "the sampler's prompts",
    "advance": "the sampler's tokens",
    "_empty": "the sampler's slots and cache, before the first prompt",
    "_packed_logprobs": "log-probs of rows of texts: the reference's, perplexity, choices",
    "objective_gradient": "g_J of the gold batch",
    "init_state": "the optimizer's state, before the first step",
}
SINGLE = "one operation outside a program, milliseconds each"
AGAIN = "; one for every shape: other numbers or lengths of texts, or laid on the devices otherwise"
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


def programs() -> list[dict]:
    """What a small run compiles: a row a stage, how often by name and why."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trace_jax.launch", f"--workdir={folder}/run", *SMALL_RUN]
        environment = os.environ | {"JAX_LOG_COMPILES": "1", "JAX_PLATFORMS": "cpu"}
        environment["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/cache"
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [
        {"what": "programs", "stage": stage, "compiled": dict(found), "why": _reasons(found)}
        for stage, found in by_stage(done.stderr).items()
    ]


def by_stage(told: str) -> dict[str, collections.Counter[str]]:
    """Programs that jax's log says were compiled, by the stage that the run had told before.

    What the compilation cache had is not compiled.
    """
    found: dict[str, collections.Counter[str]] = {}
    stage, cached = "before", ""
    for line in told.splitlines():
        begins = re.match(r"\[(\w+)\]\s*$", line)
        stage = begins[1] if begins else stage
        hit = re.search(r"compilation cache hit for 'jit_(\w+)'", line)
        cached = hit[1] if hit else cached
        done = re.search(r"Finished XLA compilation of jit\((.+?)\) in", line)
        if done and re.sub(r"\W", "_", done[1]) == cached:
            cached = ""
        elif done:
            found.setdefault(stage, collections.Counter())[done[1]] += 1
    return found


def _reasons(found: Mapping[str, int]) -> dict[str, str]:
    """What each program is for, and why there are several of one."""
    return {
        name: PURPOSES.get(name, SINGLE) + AGAIN * (n > 1 and name in PURPOSES)
        for name, n in found.items()
    }


def counts(rows: Sequence[dict]) -> dict[str, int]:
    """Headlines of a run's programs."""
    of = {row["stage"]: collections.Counter(row["compiled"]) for row in rows}
    whole = sum(of.values(), collections.Counter())
    return {
        "train_programs": of["train"]["train_step"],
        "impact_programs": of["impact"]["response_derivatives"],
        "sampling_programs": whole["prefill"] + whole["advance"],
        "programs_in_all": whole.total(),
    }


def main(argv: Sequence[str]) -> int:
    """Measures, prints and writes."""
    values = results.flags(
        argv, "packing", __doc__, "without the count of programs",
        data={"type": Path, "default": real_pairs.DATA},
    )  # fmt: skip
    rows, headline = [], {}
    for name in NAMES:
        pairs = real_pairs.read(name, values.data)
        tokenizer = real_pairs.tokenizer([text for pair in pairs for text in pair.values()])
        alone_N2, shared_N = lengths(pairs, tokenizer)
        of_data = [{"what": "tokens", "data": name} | row for row in measure(alone_N2, shared_N)]
        for row in of_data:
            print(LINE.format(**row))
        rows += of_data
        headline[f"real_token_share_{name}"] = of_data[-1]["real_token_share"]
        headline[f"shared_prefix_saving_{name}"] = float(alone_N2.sum() / shared_N.sum())
    if not values.quick:
        compiled = programs()
        for row in compiled:
            print(f"{row['stage']:9} compiled {row['compiled']}")
        rows += compiled
        headline |= counts(compiled)
    results.write(values.out, rows=rows, headline=headline, per_step=PER_STEP)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
