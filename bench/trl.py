"""DPO training against TRL's DPOTrainer: pairs a second, memory, tokens computed, the same losses.

python -m bench.trl [--data hh|pku] [--model DIR | --shape 16m] [--steps N] [--batch 8] \\
    [--repeats 3] [--quick] [--out FILE]

Needs `pip install trl` (PyTorch, CPU). The same pairs, float32, full parameters, AdamW without
warm-up, pairs of at most 512 tokens. Every run is a process of its own; they go by rounds, every
other round in the opposite order. Both sides have all cores: PyTorch as threads, ours as devices
where `real_pairs.cpu_devices` says so.

ours           `feed.Steps` through `train.loop`, as `fit` does it; the compilation cache is empty
ours_again     the same with the cache that a run before left
ours_in_order  the same on pairs in TRL's order, to compare losses step by step (once)
trl_default    DPOTrainer as it comes: layers recomputed, the reference computed at every step
trl_best       reference precomputed, layers not recomputed, padding_free asked for. (TRL 1.16 says
               that padding_free "is temporarily unavailable after a refactor and is currently
               disabled" and pads; a row has what the trainer made of it, and what it said.)

Seconds are from the loaded model to the last step: tokenising, reference log-probs, compiling;
`steady` is the median time from step to step. Tokens are positions that the trained model computes;
real ones are those of prompt and response of both texts of a pair, so that a prompt computed once
counts below 1. imports_gib is what of the peak is there before a model is loaded. starved: steps
that the host dispatched after the step before had ended, so that the device waited for it. --shape
draws a larger Llama with random weights and a byte-level tokenizer of 32,768 entries trained on the
pairs.
"""

import argparse
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

MAX_LENGTH, RATE, BETA = 512, 1e-5, 0.1  # as training.py has them
KINDS = ("ours", "ours_again", "ours_in_order", "trl_default", "trl_best")
STEPS = {None: 48, "16m": 16}  # by shape, so that a run takes a minute or three
LINE = (
    "{kind:14} {pairs_per_second:7.2f} pairs/s, steady {pairs_per_second_steady:7.2f}, "
    "{peak_gib:5.2f} GiB, {computed_per_real:.2f} tokens computed per real one"
)


def theirs(model: Path, rows: list[dict], batch: int, *, best: bool) -> dict:
    """Trains with TRL's DPOTrainer."""
    import datasets
    import torch
    import transformers
    import trl

    imports = peak_gib()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokens, ends, losses, said = [0, 0], [], [], []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("trl").addHandler(listener)

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, model, inputs, *args, **kwargs):
            tokens[0] += inputs["input_ids"].numel()
            tokens[1] += int(inputs["attention_mask"].sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Notes(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in (logs or {}):
                losses.append(logs["loss"])

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        own = {}
        if best:
            own = dict(precompute_ref_log_probs=True, gradient_checkpointing=False,
                       padding_free=True)  # fmt: skip
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
        "steady": statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False)),
        "losses": losses,
        "tokens_computed": tokens[0],
        "tokens_real": tokens[1],
        "imports_gib": imports,
        "padding_free": bool(trainer.padding_free),
        "said": [message for message in said if "padding_free" in message],
        "version": trl.__version__,
    }


def worker(kind: str, model: Path, rows: list[dict], batch: int) -> None:
    """One run; prints its figures as the last line."""
    if kind.startswith("ours"):
        from bench import training

        imports = peak_gib()
        made = training.ours(model, rows, batch, balanced=kind != "ours_in_order")
        made["imports_gib"] = imports
    else:
        made = theirs(model, rows, batch, best=kind == "trl_best")
    made["peak_gib"] = peak_gib()
    print(json.dumps(made))


def peak_gib() -> float:
    """The most memory that this process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def order(round_: int) -> list[str]:
    """Kinds of a round: forth and back by turns; losses are compared in the first alone."""
    kinds = [kind for kind in KINDS if kind != "ours_in_order" or round_ == 0]
    return kinds[:: -1 if round_ % 2 else 1]


def runs(model: Path, rows: list[dict], batch: int, repeats: int) -> dict[str, list[dict]]:
    """What every process said, by kind."""
    from bench import real_pairs

    found: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "pairs.json")
        data.write_text(json.dumps(rows))
        for i in range(repeats):
            for kind in order(i):
                filled = kind == "ours_again" or i == 0  # the first round begins with ours
                cache = Path(folder, "filled" if filled else f"empty{i}")
                environment = {
                    "JAX_NUM_CPU_DEVICES": str(real_pairs.cpu_devices(model)),
                    "JAX_COMPILATION_CACHE_DIR": str(cache),
                }
                done = subprocess.run(
                    [sys.executable, "-m", "bench.trl", "--worker", kind, "--model", str(model),
                     "--rows", str(data), "--batch", str(batch)],
                    check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment,
                )  # fmt: skip
                found[kind].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def table(found: dict[str, list[dict]], batch: int) -> list[dict]:
    """A row a kind: medians, ranges and every run."""
    from bench import real_pairs

    rows = []
    real = found["ours"][0]["tokens_real"]
    for kind, of in found.items():
        seconds, steady, peak = (
            real_pairs.spread([run[key] for run in of]) for key in ("seconds", "steady", "peak_gib")
        )
        pairs = batch * len(of[0]["losses"])
        figures = ("starved", "dispatch_seconds", "devices", "padding_free", "said",
                   "imports_gib")  # fmt: skip
        rows.append(
            {
                "kind": kind,
                "pairs_per_second": pairs / seconds[1],
                "pairs_per_second_steady": batch / steady[1],
                "seconds": seconds,
                "steady_seconds": steady,
                "peak_gib": peak[1],
                "peak_gib_range": [peak[0], peak[2]],
                "tokens_computed": of[0]["tokens_computed"],
                "tokens_real": of[0]["tokens_real"],
                "computed_per_real": of[0]["tokens_computed"] / real,
                **{key: of[-1][key] for key in figures if key in of[-1]},
                "losses": of[0]["losses"],
                "runs": [{k: run[k] for k in ("seconds", "steady", "peak_gib")} for run in of],
            }
        )
    return rows


def headline(rows: Sequence[dict]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Named ratios, medians of those of each round, and their ranges."""
    from bench import real_pairs

    by_kind = {row["kind"]: row for row in rows}

    def by_round(kind: str, key: str, other: str) -> list[float]:
        both = zip(by_kind[kind]["runs"], by_kind[other]["runs"], strict=True)
        return [mine[key] / other[key] for mine, other in both]

    ratios = {}
    for name in ("default", "best"):
        other = f"trl_{name}"
        ratios[f"speedup_vs_trl_{name}"] = by_round(other, "seconds", "ours")
        ratios[f"speedup_vs_trl_{name}_again"] = by_round(other, "seconds", "ours_again")
        ratios[f"speedup_vs_trl_{name}_steady"] = by_round(other, "steady", "ours")
    lighter = min(("trl_default", "trl_best"), key=lambda kind: by_kind[kind]["peak_gib"])
    ratios["memory_vs_trl"] = by_round("ours", "peak_gib", lighter)
    spreads = {name: real_pairs.spread(values) for name, values in ratios.items()}
    losses = (by_kind[kind]["losses"] for kind in ("ours_in_order", "trl_default"))
    found = {name: median for name, (_, median, _) in spreads.items()}
    found["loss_difference"] = max(abs(a - b) for a, b in zip(*losses, strict=True))
    found["computed_per_real"] = by_kind["ours"]["computed_per_real"]
    found["computed_per_real_trl"] = by_kind["trl_default"]["computed_per_real"]
    found["starved_steps"] = by_kind["ours"]["starved"]
    return found, {name: [low, high] for name, (low, _, high) in spreads.items()}


def main(argv: Sequence[str]) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("../shared/models/stories260k"))
    parser.add_argument("--data", choices=("hh", "pku", "xstest"), default="hh")
    parser.add_argument("--shape", choices=("16m",))
    parser.add_argument("--steps", type=int, help="default 48, with --shape 16m 16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="8 steps (16m: 3), once")
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="default bench/results/trl[_16m][_pku].json")
    values = parser.parse_args(argv)
    if values.worker:
        rows = json.loads(values.rows.read_text())
        worker(values.worker, values.model, rows, values.batch)
        return 0
    import transformers

    from bench import real_pairs, results
    from trace_jax import records

    steps, repeats = values.steps or STEPS[values.shape], values.repeats
    if values.quick:
        steps, repeats = 3 if values.shape else 8, 1
    pairs = real_pairs.read(values.data)
    with tempfile.TemporaryDirectory() as folder:
        model = values.model
        if values.shape:
            model = Path(folder, "model")
            texts = [text for pair in pairs for text in pair.values()]
            real_pairs.write_llama(model, texts, shape=values.shape, context=2 * MAX_LENGTH)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        fitting = real_pairs.fitting(pairs, tokenizer, limit=MAX_LENGTH, n=steps * values.batch)
        found = runs(model, fitting, values.batch, repeats)
    rows = table(found, values.batch)
    ratios, ranges = headline(rows)
    for row in rows:
        print(LINE.format(**row))
    named = ["trl", *([values.shape] if values.shape else [])]
    named += [values.data] if values.data != "hh" else []
    out = values.out or Path("bench/results", "_".join(named) + ".json")
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "model": values.shape or values.model.name,
        "data": values.data,
        "pairs": len(fitting),
        "batch": values.batch,
        "repeats": repeats,
        "trl": found["trl_best"][0]["version"],
    }
    records.write_json(
        out, {"headline": ratios, "ranges": ranges, "rows": rows, **about, **results.machine()}
    )
    print(f"{out}: {ratios}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
