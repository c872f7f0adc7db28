"""DPO training against TRL's DPOTrainer: pairs a second, memory, tokens computed, the same losses.

python -m bench.trl [--pairs hh] [--model DIR | --shape 16m] [--steps 32] [--batch 8] [--quick] \\
    [--out FILE]

Needs `pip install trl` (PyTorch, CPU). The same pairs, float32, full parameters, AdamW without
warm-up, pairs of at most 512 tokens; every run is a process of its own, and they alternate. `ours`
deals pairs to steps as `trace_jax` does, by length; `ours_in_order` takes them in TRL's order, so
that losses can be compared step by step. `trl_default` is DPOTrainer as it comes, `trl_best` with
the reference precomputed and without recomputed layers (padding_free needs a GPU). Seconds are from
the loaded model to the last step: tokenising, reference log-probs, compiling; `steady` is the
median step. --shape draws a larger Llama with random weights and a
byte-level tokenizer of 32,768 entries trained on the pairs.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

MAX_LENGTH, RATE, BETA = 512, 1e-5, 0.1
KINDS = ("ours", "ours_in_order", "trl_default", "trl_best")


def ours(model: Path, rows: list[dict], batch: int, *, balanced: bool) -> dict:
    """Trains with `train.train_step`; balanced: steps of about as many tokens, the default."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from trace_jax import batches, encoding, logprobs, methods, models, packing, sharding, train

    mesh = sharding.make_mesh(1, -1, 1)
    jax.set_mesh(mesh)  # for the rest of the process
    module = models.load(model, mesh=mesh)
    tokenizer = encoding.load_tokenizer(model)
    start = time.perf_counter()
    encoder = encoding.Encoder(tokenizer, max_length=2 * MAX_LENGTH, end_id=tokenizer.eos_token_id)
    examples = [
        methods.Example(str(i), "INVERT", r["prompt"], r["chosen"], r["rejected"], pref=1.0)
        for i, r in enumerate(rows)
    ]
    examples, encoded = batches.encode_examples(encoder, examples)
    ref = logprobs.of_texts(module, encoded, row_length=batches.longest_row(encoded), micro_rows=4)
    lengths = [e.row_length for e in encoded]
    n_steps = len(rows) // batch
    members = np.arange(len(rows)).reshape(n_steps, batch)
    if balanced:
        members = packing.draw(lengths, per_step=batch, total_steps=n_steps, seed=0)
    (plan,) = packing.lay_out(
        [(lengths, members)], row_length=0, micro_rows=4, shards=sharding.shards_in_context(),
        flops=module.config.forward_flops,
    )  # fmt: skip
    plans, layout = plan.rows, plan.layout
    graphdef, params, frozen = nnx.split(module, nnx.Param, ...)
    options = train.Options(
        "logistic", "plain", False, batch, 1, len(plans) + 1, 0, 1.0, 0.0, 1.0, 0.9, 0.999
    )
    hyper = train.Hyper(*(jnp.float32(v) for v in (RATE, BETA, 0.1)))
    state = train.init_state(params, options)
    losses, seconds = [], []
    for plan in plans:
        began = time.perf_counter()
        step = batches.Step(batches.make_batch(plan, layout, encoded, examples, ref), None)
        step = sharding.place_rows(step)
        state, metrics = train.train_step(
            state, frozen, None, step, hyper, None, graphdef=graphdef, options=options
        )
        losses.append(float(jax.device_get(metrics["loss/total"])))
        seconds.append(time.perf_counter() - began)
    real = sum(len(e.prompt) * 2 + sum(map(len, e.branches)) - 2 for e in encoded)
    return {
        "seconds": time.perf_counter() - start,
        "steady": statistics.median(seconds[1:]),
        "losses": losses,
        "tokens_computed": len(plans) * layout.n_rows * layout.row_length,
        "tokens_real": real,
    }


def theirs(model: Path, rows: list[dict], batch: int, *, best: bool) -> dict:
    """Trains with TRL's DPOTrainer."""
    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(2)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    computed, marks, losses = [0], [], []

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, model, inputs, *args, **kwargs):
            computed[0] += inputs["input_ids"].numel()
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Notes(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            marks.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in (logs or {}):
                losses.append(logs["loss"])

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        own = dict(precompute_ref_log_probs=True, gradient_checkpointing=False) if best else {}
        config = trl.DPOConfig(
            output_dir=folder, per_device_train_batch_size=batch, num_train_epochs=1,
            learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, beta=BETA,
            max_length=2 * MAX_LENGTH, logging_steps=1, save_strategy="no", report_to=[],
            use_cpu=True, bf16=False, weight_decay=0.0, max_grad_norm=1.0, disable_tqdm=True,
            dataloader_pin_memory=False, **own,
        )  # fmt: skip
        trainer = InOrder(
            model=network, args=config, processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(rows), callbacks=[Notes()],
        )  # fmt: skip
        trainer.train()
    return {
        "seconds": time.perf_counter() - start,
        "steady": statistics.median(b - a for a, b in zip(marks, marks[1:], strict=False)),
        "losses": losses,
        "tokens_computed": computed[0],
        "tokens_real": 0,
        "version": trl.__version__,
    }


def worker(kind: str, model: Path, data: Path, batch: int) -> None:
    """One run; prints its figures as the last line."""
    rows = json.loads(data.read_text())
    if kind.startswith("ours"):
        made = ours(model, rows, batch, balanced=kind == "ours")
    else:
        made = theirs(model, rows, batch, best=kind == "trl_best")
    made["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(made))


def measure(model: Path, rows: list[dict], batch: int, repeats: int) -> dict:
    """Figures of every kind, medians over alternating runs, and their ratios."""
    found: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    # What config.cpu_devices advises: every core a device for a small model, one device for others.
    small = (model / "model.safetensors").stat().st_size < 2**24
    environment = dict(os.environ) if small else os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "pairs.json")
        data.write_text(json.dumps(rows))
        for _ in range(repeats):
            for kind in KINDS:
                command = [sys.executable, "-m", "bench.trl", "--worker", kind]
                command += ["--model", str(model), "--data", str(data), "--batch", str(batch)]
                done = subprocess.run(
                    command, check=True, stdout=subprocess.PIPE, text=True, env=environment
                )
                found[kind].append(json.loads(done.stdout.splitlines()[-1]))

    def median(kind: str, figure: str) -> float:
        return statistics.median(run[figure] for run in found[kind])

    kinds = {
        kind: {
            "pairs_per_second": len(rows) / median(kind, "seconds"),
            "pairs_per_second_steady": batch / median(kind, "steady"),
            "peak_gib": median(kind, "peak_gib"),
            "tokens_computed": runs[0]["tokens_computed"],
            "losses": runs[0]["losses"],
        }
        for kind, runs in found.items()
    }
    mine = kinds["ours"]
    in_order = [kinds[kind]["losses"] for kind in ("ours_in_order", "trl_default")]
    differences = [abs(a - b) for a, b in zip(*in_order, strict=True)]
    return {
        "pairs": len(rows),
        "batch": batch,
        "repeats": repeats,
        "kinds": kinds,
        "trl": found["trl_best"][0]["version"],
        "tokens_real": found["ours"][0]["tokens_real"],
        "headline": {
            "speedup_vs_trl_default": mine["pairs_per_second"]
            / kinds["trl_default"]["pairs_per_second"],
            "speedup_vs_trl_best": mine["pairs_per_second"] / kinds["trl_best"]["pairs_per_second"],
            "memory_vs_trl": mine["peak_gib"]
            / min(kinds[k]["peak_gib"] for k in ("trl_default", "trl_best")),
            "loss_difference": max(differences),
        },
    }


def main(argv: Sequence[str]) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("../shared/models/stories260k"))
    parser.add_argument("--pairs", choices=("hh", "pku", "xstest"), default="hh")
    parser.add_argument("--shape", choices=("16m",))
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="8 steps, once")
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("bench/results/trl.json"))
    values = parser.parse_args(argv)
    if values.worker:
        worker(values.worker, values.model, values.data, values.batch)
        return 0
    import transformers

    from bench import frontier, real_pairs
    from trace_jax import records

    steps, repeats = (8, 1) if values.quick else (values.steps, values.repeats)
    found = real_pairs.read(values.pairs)
    with tempfile.TemporaryDirectory() as folder:
        model = values.model
        if values.shape:
            model = Path(folder, "model")
            texts = [text for pair in found for text in pair.values()]
            real_pairs.write_llama(model, texts, shape=values.shape, context=2 * MAX_LENGTH)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        rows = real_pairs.fitting(found, tokenizer, limit=MAX_LENGTH, n=steps * values.batch)
        result = measure(model, rows, values.batch, repeats)
    result |= {
        "model": values.shape or values.model.name,
        "data": values.pairs,
        **frontier.machine(),
    }
    for kind, row in result["kinds"].items():
        print(f"{kind:12} {row['pairs_per_second']:7.2f} pairs/s, steady "
              f"{row['pairs_per_second_steady']:7.2f}, {row['peak_gib']:5.2f} GiB, "
              f"{row['tokens_computed']} tokens computed")  # fmt: skip
    values.out.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(values.out, result)
    print(f"{values.out}: {result['headline']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
