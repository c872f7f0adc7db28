"""Impact scores against what a user has today: one backward pass a record in PyTorch.

python -m bench.impact [--quick] [--out FILE.json]

Pairs of PKU-SafeRLHF, cut to a length, all those of a prompt together as in the data; the same g_J,
full parameters or LoRA (rank 16); the order alternates, medians are given.

torch_loop       the paper's procedure: transformers' model, a record's loss, backward, dotted
lax_map_grad     the same by jax.grad, one example after the other
vmap_grad        8 examples at once, and with layers recomputed in the backward pass (_remat)
jvp              8 examples at once in forward mode, one a row
stage            as stage impact does it: texts in, rows packed, every response once, scores out
                 (without the sample along half of the gold batch, whose size is fixed)
stage_each       the same with every response of every record

Temporary memory is what the compiler says (memory_analysis), so it does not depend on the machine's
load; of PyTorch it is not known. Headlines are of 128 tokens and full parameters.
"""

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx

from bench import frontier, real_pairs
from trace_jax import (
    batches,
    config,
    encoding,
    fit,
    impact,
    logprobs,
    methods,
    models,
    packing,
    records,
    sharding,
    train,
)
from trace_jax.models import lora
from trace_jax.stages import scoring

BATCH, BETA = 8, 0.1
PAIRS, OF_STAGE = 32, 256  # that slow paths score, and the stage
HYPER = train.Hyper(*(jnp.float32(v) for v in (1e-4, BETA, 0.1)))
LINE = "{path:<16} {pairs_per_second:8.1f} pairs/s {mebibytes:>10} MiB  error {max_error:.1e}"


class Case(NamedTuple):
    """What is scored: shape of the model, entries of its vocabulary, tokens, what trains."""

    model: str
    vocabulary: int
    length: int
    adapters: str = "none"
    torch: bool = True


SMALL = Case("stories260k", 512, 128)
CASES = [
    SMALL,
    Case("16m", 32_768, 128),
    Case("stories260k", 512, 512),
    Case("16m", 32_768, 512),
    Case("16m", 131_072, 128, torch=False),
    Case("stories260k", 512, 128, "lora", torch=False),
    Case("16m", 32_768, 128, "lora", torch=False),
    Case("stories260k", 512, 1024, torch=False),
]


class Problem(NamedTuple):
    """A case's model, pairs (slow paths take the first) and global gradient."""

    folder: Path
    module: models.Decoder
    encoder: Callable[[], encoding.Encoder]
    graphdef: nnx.GraphDef
    params: nnx.State
    frozen: nnx.State
    examples: list[methods.Example]
    encoded: list[encoding.Encoded]
    gold: nnx.State
    options: train.Options


def problem(case: Case, stories: Path, folder: Path) -> Problem:
    """The first pairs of PKU, prompt by prompt, and g_J of those that all paths score."""
    found = real_pairs.read("pku")
    prompts = list(dict.fromkeys(pair["prompt"] for pair in found))
    found.sort(key=lambda pair: prompts.index(pair["prompt"]))
    if case.model != "stories260k":
        texts = [text for pair in found for text in pair.values()]
        real_pairs.write_llama(
            folder, texts, shape=case.model, context=2 * case.length, vocabulary=case.vocabulary
        )
    else:
        folder = stories
    module = models.load(folder)
    if case.adapters == "lora":
        module = lora.add(module, rank=16, alpha=32.0, targets="all", seed=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = functools.partial(
        encoding.Encoder, tokenizer, max_length=case.length, end_id=None, cut_responses=True
    )
    examples, encoded = batches.encode_examples(
        encoder(),
        [
            methods.Example(str(i), "INVERT", *(pair[k] for k in ("prompt", "chosen", "rejected")),
                            pref=1.0)
            for i, pair in enumerate(found[:OF_STAGE])
        ],
    )  # fmt: skip
    module.remat, module.attention_block = "none", 0  # vmap would compute every choice of keys
    graphdef, params, frozen = nnx.split(module, trained(case), ...)
    options = train.Options("logistic", "plain", False, PAIRS, 1, 2, 1, 0.1, 0.0, 1.0, 0.9, 0.999)
    one = Problem(
        folder, module, encoder, graphdef, params, frozen, examples, encoded, None, options
    )
    step = batches.Step(one_a_row(one, 1), None)
    gold = impact.objective_gradient(
        params, frozen, step, HYPER, graphdef=graphdef, options=options
    )
    return one._replace(gold=gold)


def one_a_row(p: Problem, at_once: int) -> batches.Batch:
    """The first pairs, one a row, `at_once` of them a micro-batch."""
    encoded = p.encoded[:PAIRS]
    length = batches.longest_row(encoded)
    layout = packing.Layout(at_once, length, 1, PAIRS // at_once)
    ref = logprobs.of_texts(p.module, encoded, row_length=length, micro_rows=4)
    rows = [[i] for i in range(PAIRS)]
    return batches.make_batch(rows, layout, encoded, p.examples, ref)


def trained(case: Case) -> type:
    """Type of the leaves that train."""
    return nnx.LoRAParam if case.adapters == "lora" else nnx.Param


def paths(p: Problem, case: Case) -> dict[str, tuple[Callable[[], np.ndarray], int | None]]:
    """Path -> (what computes scores, bytes of temporaries)."""
    fixed = {"graphdef": p.graphdef, "options": p.options}
    p.module.remat = "layer"
    recomputed = nnx.split(p.module, trained(case), ...)[0]
    p.module.remat, p.module.attention_block = "none", -1
    of_stage = nnx.split(p.module, trained(case), ...)[0]
    p.module.attention_block = 0
    single, eight = one_a_row(p, 1), one_a_row(p, BATCH)
    tangents = jax.tree.map(lambda g: g[None], p.gold)
    settings = fit.Settings.of(config.base_config().train, row_length=0, seed=0)
    mesh = sharding.make_mesh(1, -1, 1)
    everywhere = jax.NamedSharding(mesh, jax.P())
    placed = (of_stage, *jax.device_put((p.params, p.frozen, tangents), everywhere))

    def by_loss(batch: batches.Batch, **changes: Any) -> tuple[Callable[[], np.ndarray], int]:
        arguments = (p.params, p.frozen, p.gold, batch, HYPER)
        program = impact.per_example_gradient_dots.lower(*arguments, **fixed | changes).compile()
        temporary = program.memory_analysis().temp_size_in_bytes
        return lambda: np.asarray(program(*arguments)).reshape(-1), temporary

    arguments = (p.params, p.frozen, tangents, eight.rows)
    jvp = impact.response_derivatives.lower(
        *arguments, graphdef=p.graphdef, n_responses=2
    ).compile()

    def by_row() -> np.ndarray:
        d_N2 = np.asarray(jvp(*arguments)).reshape(-1, 2)
        scored = [
            impact.score(e, d[0], d[1], options=p.options, beta=BETA, tau=0.1)
            for e, d in zip(p.examples, d_N2, strict=False)
        ]
        return np.array(scored)

    def stage(*, once: bool) -> np.ndarray:
        encoder = p.encoder()  # one that has kept no tokens yet
        if once:
            keys, encoded = scoring.unique_responses(encoder, p.examples)
        else:
            found = [scoring.unique_responses(encoder, [e]) for e in p.examples]
            keys, encoded = ([rows[0] for rows in of] for of in zip(*found, strict=True))
        with jax.set_mesh(mesh):
            packed = logprobs.packed_groups(
                encoded, row_length=batches.longest_row(encoded), micro_rows=4
            )
            return scoring.by_response(p.examples, keys, encoded, packed, placed, settings)

    return {
        "lax_map_grad": by_loss(single),
        "vmap_grad": by_loss(eight),
        "vmap_grad_remat": by_loss(eight, graphdef=recomputed),
        "jvp": (by_row, jvp.memory_analysis().temp_size_in_bytes),
        "stage": (lambda: stage(once=True), None),
        "stage_each": (lambda: stage(once=False), None),
    }


def torch_loop(p: Problem, folder: Path) -> Callable[[], np.ndarray]:
    """The paper's procedure: both responses of a record as one batch, backward, dot with g_J."""
    import safetensors.torch
    import torch

    torch.set_num_threads(2)
    models.save(nnx.merge(p.graphdef, p.gold, p.frozen), folder)  # g_J under the names of weights
    gold = safetensors.torch.load_file(folder / "model.safetensors")
    network = transformers.AutoModelForCausalLM.from_pretrained(p.folder, dtype=torch.float32)
    inputs = []
    for e in p.encoded[:PAIRS]:
        whole = [[*e.prompt, *branch] for branch in e.branches]
        ids = torch.zeros(2, max(map(len, whole)), dtype=torch.long)
        counted = torch.zeros(ids.shape)
        for b, tokens in enumerate(whole):
            ids[b, : len(tokens)] = torch.tensor(tokens)
            counted[b, len(e.prompt) + e.skip[b] : len(tokens)] = 1
        inputs.append((ids, counted))

    def logps(ids: Any, counted: Any) -> Any:
        logits = network(input_ids=ids).logits[:, :-1]
        token = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0]
        return (token * counted[:, 1:]).sum(1)

    with torch.no_grad():
        references = [logps(*one) for one in inputs]

    def run() -> np.ndarray:
        found = []
        for one, reference in zip(inputs, references, strict=True):
            network.zero_grad()
            ratio = logps(*one) - reference
            loss = -torch.nn.functional.logsigmoid(BETA * (ratio[0] - ratio[1]))
            loss.backward()
            found.append(
                sum(float((w.grad * gold[name]).sum()) for name, w in network.named_parameters())
            )
        return np.array(found)

    return run


def measure(case: Case, stories: Path, repeats: int) -> list[dict]:
    """A row a path."""
    with tempfile.TemporaryDirectory() as folder:
        p = problem(case, stories, Path(folder, "model"))
        found = paths(p, case)
        if case.torch:
            found = {"torch_loop": (torch_loop(p, Path(folder, "gold")), None)} | found
        seconds: dict[str, list[float]] = {name: [] for name in found}
        scores = {}
        for repeat in range(repeats + 1):
            for name in list(found)[:: 1 if repeat % 2 else -1]:
                start = time.perf_counter()
                scores[name] = found[name][0]()
                if repeat:  # the first round compiles and warms up
                    seconds[name].append(time.perf_counter() - start)
    truth = scores["torch_loop" if case.torch else "vmap_grad"]
    scale = float(np.sqrt(np.mean(np.square(truth))))
    return [
        case._asdict()
        | {
            "path": name,
            "pairs": len(scores[name]),
            "pairs_per_second": len(scores[name]) / statistics.median(took),
            "seconds": [min(took), statistics.median(took), max(took)],
            "temp_bytes": found[name][1],
            "max_error_over_rms": float(np.max(np.abs(scores[name][:PAIRS] - truth))) / scale,
        }
        for name, took in seconds.items()
    ]


def headline(rows: Sequence[dict]) -> dict[str, float]:
    """Named ratios of the small model, and of the larger one with its name."""
    found = {}
    full = [r for r in rows if r["length"] == 128 and r["adapters"] == "none" and r["torch"]]
    for model in dict.fromkeys(r["model"] for r in full):
        of = {r["path"]: r for r in full if r["model"] == model}
        end = "" if model == SMALL.model else f"_{model}"
        speed = {path: row["pairs_per_second"] for path, row in of.items()}
        found |= {
            f"speedup_vs_torch_loop{end}": speed["stage"] / speed["torch_loop"],
            f"speedup_vs_torch_loop_each{end}": speed["stage_each"] / speed["torch_loop"],
            f"speedup_vs_lax_map_grad{end}": speed["stage"] / speed["lax_map_grad"],
            f"speedup_vs_vmap_grad{end}": speed["jvp"] / speed["vmap_grad"],
            f"temp_vs_vmap_grad{end}": of["jvp"]["temp_bytes"] / of["vmap_grad"]["temp_bytes"],
            f"temp_vs_vmap_grad_remat{end}": of["jvp"]["temp_bytes"]
            / of["vmap_grad_remat"]["temp_bytes"],
        }
    return found | {"max_relative_error": max(r["max_error_over_rms"] for r in rows)}


def main(argv: Sequence[str]) -> int:
    """Prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("../shared/models/stories260k"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/impact.json"))
    parser.add_argument("--quick", action="store_true", help="the headline's cases, fewer repeats")
    values = parser.parse_args(argv)
    rows = []
    for case in CASES[:2] if values.quick else CASES:
        print(f"{case.model}, {case.vocabulary} entries, {case.length} tokens, {case.adapters}")
        for row in measure(case, values.model, 2 if values.quick else 5):
            rows.append(row)
            memory = "" if row["temp_bytes"] is None else f"{row['temp_bytes'] / 2**20:.1f}"
            print(LINE.format(mebibytes=memory, max_error=row["max_error_over_rms"], **row))
    found = {"headline": headline(rows), "rows": rows, "batch": BATCH, **frontier.machine()}
    values.out.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(values.out, found)
    print(", ".join(f"{k} {v:.3g}" for k, v in found["headline"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
