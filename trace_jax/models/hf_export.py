"""Writing Hugging Face checkpoints: weights in shards, a PEFT adapter, all of it or nothing.

One matrix of one layer is fetched from the devices at a time; the first process writes.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
from flax import nnx
from jax.experimental import multihost_utils

from trace_jax import errors, processes
from trace_jax.models import decoder, hf_weights

_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_PEFT_MODULES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


def save(
    module: decoder.Decoder,
    path: str | os.PathLike,
    *,
    tokenizer: Any = None,
    card: str | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes a model directory that transformers loads, reads its tensors back, and renames it.

    Nothing half-written ever carries the name `path`. A model already there is replaced as a whole;
    any other directory there is an InputError. LoRA factors must have been merged (`lora.merge`).
    tokenizer: saved beside the weights, with its chat template. card: text of README.md.
    """
    config = module.config.to_hf() | {"torch_dtype": str(module.embed[...].dtype)}
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with _whole(pathlib.Path(path), "config.json") as new:
        shards = _shards(module, max_shard_bytes)
        names = _file_names(len(shards))
        for name, tensors in zip(names, shards, strict=True):
            _write_tensors(new / name, tensors)
        if processes.is_first():
            _write_json(new / "config.json", config)
            if generation["eos_token_id"] is not None:
                _write_json(new / "generation_config.json", generation)
            if len(shards) > 1:
                _write_json(new / hf_weights.INDEX, _index(names, shards))
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
            if card is not None:
                (new / "README.md").write_text(card)


def save_adapter(module: decoder.Decoder, path: str | os.PathLike, *, base: str) -> None:
    """Writes the LoRA factors of a module as PEFT reads them; `base` names the model they adapt."""
    tensors, ranks, alphas = {}, set(), set()
    for name, theirs in _PEFT_MODULES.items():
        linear = getattr(module.layers, name)
        if linear.lora_a is None:
            continue
        rank = linear.lora_a.shape[-1]
        ranks.add(rank)
        alphas.add(linear.lora_scale * rank)
        for n in range(module.config.num_hidden_layers):
            key = f"base_model.model.model.layers.{n}.{theirs}"
            tensors[f"{key}.lora_A.weight"] = _Source(linear.lora_a[...], n, True)
            tensors[f"{key}.lora_B.weight"] = _Source(linear.lora_b[...], n, True)
    if not tensors:
        raise ValueError("the module has no LoRA factors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": ranks.pop(),
        "lora_alpha": alphas.pop(),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({key.split(".")[-3] for key in tensors}),
    }
    with _whole(pathlib.Path(path), "adapter_config.json") as new:
        _write_tensors(new / "adapter_model.safetensors", tensors)
        if processes.is_first():
            _write_json(new / "adapter_config.json", config)


class _Source:
    """A tensor as Hugging Face has it, still on the devices."""

    def __init__(self, array: jax.Array, layer: int | None, transposed: bool):
        self._array, self._layer, self._transposed = array, layer, transposed
        shape = array.shape if layer is None else array.shape[1:]
        self.shape = shape[::-1] if transposed else shape
        self.dtype = np.dtype(array.dtype)
        self.nbytes = int(np.prod(self.shape)) * self.dtype.itemsize

    def fetch(self) -> np.ndarray:
        """On the host, contiguous; every process must call it."""
        part = self._array if self._layer is None else self._array[self._layer]
        if processes.count() > 1:
            part = multihost_utils.process_allgather(part, tiled=True)
        host = np.asarray(part)
        return np.ascontiguousarray(host.T if self._transposed else host)


def _shards(module: decoder.Decoder, most_bytes: int) -> list[dict[str, _Source]]:
    """Our parameters under Hugging Face's names, in files of at most `most_bytes`."""
    rows = {ours: (theirs, cut) for theirs, ours, cut in hf_weights.table(module.config)}
    sources = {}
    for keys, leaf in nnx.to_flat_state(nnx.state(module)):
        ours = ".".join(keys)
        if ours not in rows:
            raise ValueError(f"{ours} has no Hugging Face name; call lora.merge before saving")
        theirs, transposed = rows[ours]
        array = leaf[...]
        for n, name in enumerate(hf_weights.layer_names(theirs, array.shape[0])):
            sources[name] = _Source(array, n if "{}" in theirs else None, transposed)
    shards: list[dict[str, _Source]] = [{}]
    for name, source in sources.items():
        if shards[-1] and _bytes(shards[-1]) + source.nbytes > most_bytes:
            shards.append({})
        shards[-1][name] = source
    return shards


def _bytes(tensors: Mapping[str, _Source]) -> int:
    return sum(source.nbytes for source in tensors.values())


def _file_names(n: int) -> list[str]:
    if n == 1:
        return [hf_weights.WEIGHTS]
    return [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]


def _index(names: list[str], shards: list[dict[str, _Source]]) -> dict[str, Any]:
    where = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
    return {"metadata": {"total_size": sum(map(_bytes, shards))}, "weight_map": where}


def _write_tensors(file: pathlib.Path, tensors: Mapping[str, _Source]) -> None:
    """One safetensors file, tensor by tensor; then what it holds is read and compared by hash."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, source in tensors.items():
        span = [at, at + source.nbytes]
        header[name] = {
            "dtype": _NAMES[source.dtype.name], "shape": list(source.shape), "data_offsets": span,
        }  # fmt: skip
        at = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    hashes = {}
    with open(file if processes.is_first() else os.devnull, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, source in tensors.items():
            data = source.fetch().tobytes()
            hashes[name] = hashlib.sha256(data).digest()
            stream.write(data)
        stream.flush()
        if processes.is_first():
            os.fsync(stream.fileno())
    if processes.is_first():
        _verify(file, hashes)


def _verify(file: pathlib.Path, hashes: Mapping[str, bytes]) -> None:
    with safetensors.safe_open(file, framework="np") as written:
        for name, digest in hashes.items():
            if hashlib.sha256(written.get_tensor(name).tobytes()).digest() != digest:
                raise errors.InputError(
                    f"{file}: {name} reads back other than it was written; the disk is failing"
                )


@contextlib.contextmanager
def _whole(path: pathlib.Path, mark: str) -> Iterator[pathlib.Path]:
    """A folder to write in, which becomes `path` once all is written, or goes if anything fails.

    mark: the file that shows that what is at `path` is a model, which may be replaced.
    """
    if path.exists() and not (path / mark).exists() and any(path.iterdir()):
        raise errors.InputError(f"{path} exists and holds no model; name another directory")
    new, old = (path.with_name(f".{path.name}.{kind}") for kind in ("new", "old"))
    processes.wait(f"{path} is free")
    try:
        if processes.is_first():
            for leftover in (new, old):
                shutil.rmtree(leftover, ignore_errors=True)
            new.mkdir(parents=True)
        yield new
        if processes.is_first():
            if path.exists():
                path.rename(old)
            new.rename(path)
    except OSError as error:
        raise errors.InputError(
            f"{path}: could not be written ({error.strerror or error}); free space there, or name "
            "another directory, and run the same command again"
        ) from error
    finally:
        if processes.is_first():
            for leftover in (new, old):
                shutil.rmtree(leftover, ignore_errors=True)
    processes.wait(f"{path} written")


def _write_json(file: pathlib.Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
