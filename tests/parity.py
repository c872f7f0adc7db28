"""Tiny random checkpoints of each family, and what transformers makes of them.

python -m tests.parity    writes tests/golden/*.npz anew (needs PyTorch)

Weights are a function of their names, so the golden files hold transformers' answers alone.
"""

import dataclasses
import sys
import zlib
from pathlib import Path

import numpy as np
from flax import nnx

from trace_jax import models
from trace_jax.models import hf_weights, model_config

GOLDEN = Path(__file__).with_name("golden")
LLAMA = models.ModelConfig(61, 32, 40, 3, 4, 2, 8, 1024)
GEMMA = dataclasses.replace(
    LLAMA, family="gemma2", head_dim=12, tie_word_embeddings=True, sliding_window=8,
    query_pre_attn_scalar=24, attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
)  # fmt: skip
CONFIGS = {
    "llama": dataclasses.replace(LLAMA, rope_theta=500.0),
    "llama_scaled": dataclasses.replace(
        LLAMA, rope_theta=50.0, rope_scaling=model_config.Llama3Scaling(8.0, 1.0, 4.0, 32)
    ),
    "qwen2": dataclasses.replace(LLAMA, family="qwen2"),
    "qwen2_tied": dataclasses.replace(LLAMA, family="qwen2", tie_word_embeddings=True),
    "gemma2": GEMMA,
}
NEW_TOKENS = 14  # of greedy decoding, past Gemma's window


def module(name: str) -> models.Decoder:
    """Weights large enough that a wrong one shows in the logits."""
    graphdef, state = nnx.split(models.init(CONFIGS[name], seed=0))
    leaves = []
    for keys, leaf in nnx.to_flat_state(state):
        path = ".".join(keys)
        rng = np.random.default_rng(zlib.crc32(path.encode()))
        if "norm" in path:
            low = -0.5 if CONFIGS[name].is_gemma else 0.5
            value = rng.uniform(low, low + 1.0, leaf.shape)
        else:
            value = rng.normal(0, 0.3, leaf.shape)
        leaves.append((keys, leaf.replace(value.astype(np.float32))))
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 61, shape)


PLAIN = tokens(0, 2, 40)
PADDED = tokens(1, 3, 12)
PADS = (0, 3, 7)
PARTS = [tokens(2 + i, 1, n) for i, n in enumerate((10, 9, 15, 20))]  # prompt, y0, y1, another
LONG = tokens(7, 1, 640)
PROMPTS = [tokens(8 + i, n) for i, n in enumerate((3, 9, 14))]


def padded(side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, positions, mask) of PADDED with PADS at one side."""
    mask = np.ones(PADDED.shape, int)
    for row, pad in enumerate(PADS):
        mask[row, slice(0, pad) if side == "left" else slice(12 - pad, 12)] = 0
    return PADDED * mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0), mask


def expected(checkpoint: Path) -> dict[str, np.ndarray]:
    """What transformers gives, each text in a row of its own."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype="float32", attn_implementation="eager"
    ).eval()

    def logits(ids, positions=None, mask=None) -> np.ndarray:
        as_tensor = [None if x is None else torch.tensor(x) for x in (ids, mask, positions)]
        with torch.no_grad():
            return model(as_tensor[0], attention_mask=as_tensor[1], position_ids=as_tensor[2])[
                0
            ].numpy()

    found = {"plain": logits(PLAIN)}
    for side in ("left", "right"):
        ids, positions, mask = padded(side)
        found[side] = logits(ids, positions, mask)[mask == 1]
    prompt, y0, y1, other = PARTS
    found["packed"] = np.concatenate([logits(prompt), logits(other)], axis=1)
    rows = [logits(np.concatenate([prompt, y], axis=1)) for y in (y0, y1)]
    found["shared"] = np.concatenate([rows[0], rows[1][:, 10:], logits(other)], axis=1)
    found["long"] = logits(LONG)[:, ::16]
    found["greedy"] = np.stack([_greedy(logits, prompt) for prompt in PROMPTS])
    return found


def _greedy(logits, prompt: np.ndarray) -> np.ndarray:
    row = list(prompt)
    for _ in range(NEW_TOKENS):
        row.append(int(np.argmax(logits(np.array([row]))[0, -1])))
    return np.array(row[len(prompt) :])


def golden(name: str) -> dict[str, np.ndarray]:
    """The committed answers."""
    with np.load(GOLDEN / f"{name}.npz") as stored:
        return dict(stored)


def main() -> None:
    """Writes the golden files."""
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            models.save(module(name), Path(folder) / "model")
            assert hf_weights.read_config(Path(folder) / "model") == CONFIGS[name]
            np.savez_compressed(GOLDEN / f"{name}.npz", **expected(Path(folder) / "model"))


if __name__ == "__main__":
    sys.exit(main())
