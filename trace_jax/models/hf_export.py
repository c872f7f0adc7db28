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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors
from flax import nnx
from jax.experimental import multihost_utils

from trace_jax import errors, model_folder, processes, records
from trace_jax.models import adapters, decoder, hf_weights, tensor_files

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
                _write_json(new / tensor_files.INDEX, _index(names, shards))
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
            if card is not None:
                (new / "README.md").write_text(card)


def save_adapter(
    module: decoder.Decoder,
    path: str | os.PathLike,
    *,
    base: str,
    revision: str | None = None,
    under: Sequence[pathlib.Path] = (),
) -> None:
    """Writes the LoRA factors of a module as PEFT reads them; `base` names the model they adapt.

    revision: which version of a base on the hub.
    under: folders of the adapters that lie between base and module. Their changes are in what is
    written, too: B A + B' A', the product of B beside B' and A above A'.
    """
    factors: dict[str, list[_Pair]] = {}
    for name, pair in _factors(module, scaled=bool(under)).items():
        factors[name] = [pair]
    tensors: dict[str, np.ndarray] = {}
    for folder in under:
        more, others = adapters.contents(folder)
        tensors = others | tensors  # what was put on later stands
        for name, pair in more.items():
            factors.setdefault(name, []).append(pair)
    stored: dict[str, _Source | _Stacked] = {}
    for name, pairs in factors.items():
        for letter, of, axis in zip("AB", zip(*pairs, strict=True), (0, 1), strict=True):
            key = f"{adapters.PREFIX}{name}.lora_{letter}.weight"
            stored[key] = _Stacked(of, axis) if under else of[0]
    stored |= {f"{adapters.PREFIX}{name}": _Stacked([x], 0) for name, x in tensors.items()}
    ranks = {name: sum(a.shape[0] for a, _ in pairs) for name, pairs in factors.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        **_of_ranks(ranks, None if under else _alpha(module)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if tensors:
        config["modules_to_save"] = sorted({name.rpartition(".")[0] for name in tensors})
    with _whole(pathlib.Path(path), model_folder.ADAPTER_CONFIG) as new:
        _write_tensors(new / adapters.WEIGHTS, stored)
        if processes.is_first():
            _write_json(new / model_folder.ADAPTER_CONFIG, config)


_Pair = tuple[Any, Any]  # A [rank, in] and B [out, rank]: `_Source`s, or arrays on the host


def _factors(module: decoder.Decoder, scaled: bool) -> dict[str, _Pair]:
    """The factors of every matrix that has some, by PEFT's names; scaled: B times its scale."""
    found = {}
    for name, theirs in _PEFT_MODULES.items():
        linear = getattr(module.layers, name)
        if linear.lora_a is None:
            continue
        scale = linear.lora_scale if scaled else 1.0
        for n in range(module.config.num_hidden_layers):
            a = _Source(linear.lora_a[...], n, True)
            found[f"model.layers.{n}.{theirs}"] = a, _Source(linear.lora_b[...], n, True, scale)
    if not found:
        raise ValueError("the module has no LoRA factors")
    return found


def _alpha(module: decoder.Decoder) -> float:
    """Scale times rank, the same for every matrix."""
    linears = (getattr(module.layers, name) for name in _PEFT_MODULES)
    return next(x.lora_scale * x.lora_a.shape[-1] for x in linears if x.lora_a is not None)


def _of_ranks(ranks: Mapping[str, int], alpha: float | None) -> dict[str, Any]:
    """What PEFT asks of a module's rank and scale; alpha None: every scale is 1."""
    r = max(ranks.values())
    found = {"r": r, "lora_alpha": r if alpha is None else alpha}
    other = {name: rank for name, rank in ranks.items() if rank != r}
    if other:
        found |= {"rank_pattern": other, "alpha_pattern": other}
    # One name stands for a matrix of every layer, unless adapters had some layers alone.
    names = {name.rpartition(".")[2] for name in ranks}
    layers = {name.partition(".layers.")[2].partition(".")[0] for name in ranks}
    uniform = len(ranks) == len(names) * len(layers)
    return found | {"target_modules": sorted(names if uniform else ranks)}


class _Source:
    """A tensor as Hugging Face has it, times `scale`, still on the devices."""

    def __init__(self, array: jax.Array, layer: int | None, transposed: bool, scale: float = 1.0):
        self._array, self._layer, self._transposed = array, layer, transposed
        self._scale = scale
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
        host = host * np.asarray(self._scale, host.dtype) if self._scale != 1 else host
        return np.ascontiguousarray(host.T if self._transposed else host)


class _Stacked:
    """Matrices side by side along an axis, in float32: some on the devices, some on the host."""

    def __init__(self, parts: Sequence[_Source | np.ndarray], axis: int):
        self._parts, self._axis = parts, axis
        size = sum(part.shape[axis] for part in parts)
        self.shape = (*parts[0].shape[:axis], size, *parts[0].shape[axis + 1 :])
        self.dtype = np.dtype(np.float32)
        self.nbytes = int(np.prod(self.shape)) * self.dtype.itemsize

    def fetch(self) -> np.ndarray:
        """On the host, contiguous; every process must call it."""
        found = [part.fetch() if isinstance(part, _Source) else part for part in self._parts]
        return np.ascontiguousarray(np.concatenate(found, self._axis))


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
        return [tensor_files.WEIGHTS]
    return [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]


def _index(names: list[str], shards: list[dict[str, _Source]]) -> dict[str, Any]:
    where = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
    return {"metadata": {"total_size": sum(map(_bytes, shards))}, "weight_map": where}


def _write_tensors(file: pathlib.Path, tensors: Mapping[str, _Source | _Stacked]) -> None:
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
            _clear(path, new, old)
            new.mkdir(parents=True)
        yield new
        if processes.is_first():
            for file in filter(pathlib.Path.is_file, new.rglob("*")):
                records.sync(file)
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
            with contextlib.suppress(OSError):  # the next call does it
                _clear(path, new, old)
    processes.wait(f"{path} written")


def _clear(path: pathlib.Path, new: pathlib.Path, old: pathlib.Path) -> None:
    """Removes what a call leaves; one that ended between two renames has its model put back."""
    if old.exists() and not path.exists():
        old.rename(path)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)


def _write_json(file: pathlib.Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
