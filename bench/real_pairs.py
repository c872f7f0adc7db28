"""What benchmarks work on: real pairs as plain text, tokenizers trained on them, Llamas to run."""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from trace_jax import records, sources

DATA = Path("../shared/data")
FILES = {
    "hh": ("hh_harmless/pairs.jsonl.gz", sources.Reading(malformed="drop")),
    "pku": (
        "pku/pairs.jsonl.gz",
        sources.Reading(malformed="drop", columns={"chosen": "safer", "rejected": "worse"}),
    ),
    "xstest": (
        "xstest/xstest_v2_completions_*.csv",
        sources.Reading(malformed="drop", form="xstest"),
    ),
}
SHAPES = {
    "16m": dict(hidden_size=256, intermediate_size=768, layers=8, heads=4, kv_heads=4),
}
VOCABULARY = 32_768
SMALL = 2**24  # bytes of weights, below which every core of a CPU is a device


def read(name: str, data: Path = DATA) -> list[dict[str, str]]:
    """Pairs of a data set by its name, as {prompt, chosen, rejected} in plain text."""
    file, reading = FILES[name]
    found, _ = sources.read_records(str(data / file), reading)
    return [as_text(record) for record in found]


def as_text(record: records.PreferenceRecord) -> dict[str, str]:
    """A pair with its chat, if it is one, written as base models read it."""
    prompt = record.prompt
    if not isinstance(prompt, str):
        turns = "".join(f"\n\n{m['role'].title()}: {m['content']}" for m in prompt)
        prompt = turns + "\n\nAssistant: "
    return {"prompt": prompt, "chosen": record.chosen, "rejected": record.rejected}


def fitting(pairs: Sequence[dict], tokenizer, *, limit: int, n: int) -> list[dict[str, str]]:
    """The first n pairs of which prompt and response are below `limit` tokens."""
    found = []
    for pair in pairs:
        both = tokenizer([pair["prompt"] + pair[key] for key in ("chosen", "rejected")]).input_ids
        if max(map(len, both)) < limit and all(text.strip() for text in pair.values()):
            found.append(pair)
        if len(found) == n:
            return found
    raise SystemExit(f"{len(found)} pairs fit, not {n}; ask for fewer steps")


def tokenizer(texts: Sequence[str], vocabulary: int = VOCABULARY):
    """A byte-level BPE tokenizer trained on the texts; a text begins with <s>."""
    import tokenizers
    import transformers

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=["<s>", "</s>"])
    backend = tokenizers.Tokenizer.from_str(bpe.to_str())
    begin = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[begin]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )


def cpu_devices(model: Path) -> int:
    """Devices that a CPU is for a checkpoint: one a core (at most 4) for a small model, else one.

    What `config.cpu_devices` advises: two copies of a larger one cost more than they bring.
    """
    if (model / "model.safetensors").stat().st_size >= SMALL:
        return 1
    return min(4, len(os.sched_getaffinity(0)))


def spread(values: Sequence[float]) -> list[float]:
    """Smallest, median and largest."""
    return [min(values), statistics.median(values), max(values)]


def write_llama(
    folder: Path, texts: Sequence[str], *, shape: str, context: int, vocabulary: int = VOCABULARY
) -> None:
    """A Llama of a shape with random weights, and a tokenizer of these texts, as a checkpoint."""
    from trace_jax import models

    values = SHAPES[shape] | {"family": "llama", "context": context}
    models.save(models.init(models.scratch(values, vocabulary), seed=0), folder)
    tokenizer(texts, min(vocabulary, VOCABULARY)).save_pretrained(folder)
