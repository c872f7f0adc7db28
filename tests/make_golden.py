"""Writes tests/golden anew: python -m tests.make_golden (needs PyTorch).

Beside the answers of `parity`, checkpoints.json holds what transformers writes for each model: its
config.json, and a checksum of every tensor under its Hugging Face name. The default tests compare
our files with it, so that they need no PyTorch to see a swapped or transposed tensor.
"""

import json
import tempfile
import zlib
from pathlib import Path

import safetensors.numpy

from tests import parity
from trace_jax import models

CHECKPOINTS = parity.GOLDEN / "checkpoints.json"


def rewritten(checkpoint: Path, target: Path) -> Path:
    """The checkpoint, read and written by transformers."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
    model.save_pretrained(target)
    return target


def checksums(checkpoint: Path) -> dict[str, int]:
    """CRC-32 of every tensor's bytes."""
    tensors = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    return {name: zlib.crc32(tensors[name].tobytes()) for name in sorted(tensors)}


def described(checkpoint: Path) -> dict:
    """What checkpoints.json says of a checkpoint."""
    config = json.loads((checkpoint / "config.json").read_text())
    del config["transformers_version"]
    return {"config": config, "tensors": checksums(checkpoint)}


def main() -> None:
    """Writes the golden files."""
    parity.main()
    found = {}
    for name in parity.CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            models.save(parity.module(name), Path(folder) / "ours")
            found[name] = described(rewritten(Path(folder) / "ours", Path(folder) / "theirs"))
    CHECKPOINTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
