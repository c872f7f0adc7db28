"""Hugging Face checkpoints: one table says which tensor is which parameter, and reads both ways."""

import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from trace_jax import errors
from trace_jax.models import decoder, model_config

# (Hugging Face tensor, our parameter, transposed): `{}` is the layer, which we stack on axis 0.
TABLE = (
    ("model.embed_tokens.weight", "embed", False),
    ("model.layers.{}.input_layernorm.weight", "layers.attention_norm.weight", False),
    ("model.layers.{}.self_attn.q_proj.weight", "layers.q.kernel", True),
    ("model.layers.{}.self_attn.k_proj.weight", "layers.k.kernel", True),
    ("model.layers.{}.self_attn.v_proj.weight", "layers.v.kernel", True),
    ("model.layers.{}.self_attn.o_proj.weight", "layers.o.kernel", True),
    ("model.layers.{}.post_attention_layernorm.weight", "layers.mlp_norm.weight", False),
    ("model.layers.{}.mlp.gate_proj.weight", "layers.gate.kernel", True),
    ("model.layers.{}.mlp.up_proj.weight", "layers.up.kernel", True),
    ("model.layers.{}.mlp.down_proj.weight", "layers.down.kernel", True),
    ("model.norm.weight", "norm.weight", False),
    ("lm_head.weight", "head.kernel", True),
)
_DERIVED = "rotary_emb.inv_freq"  # old checkpoints store the RoPE frequencies, which we compute
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load(
    path: str | os.PathLike,
    *,
    dtype: jnp.dtype | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> decoder.Decoder:
    """The model in a Hugging Face directory, its parameters and activations in `dtype`.

    Without a dtype they keep the stored one. With a mesh every device holds a copy.
    Raises InputError where the directory is incomplete, damaged or not a model we support.
    """
    path = pathlib.Path(path)
    config = read_config(path)
    empty = nnx.eval_shape(lambda: decoder.Decoder(config, lambda _, shape: jnp.zeros(shape)))
    graphdef, state = nnx.split(empty)
    shapes = {".".join(keys): leaf.shape for keys, leaf in nnx.to_flat_state(state)}
    with contextlib.ExitStack() as files:
        tensors = _open(path, files)
        _check_names(path, tensors, shapes, config)
        dtype = jnp.dtype(dtype or tensors["model.embed_tokens.weight"].dtype)
        arrays = {
            ours: _read(theirs, transposed, shapes[ours], tensors, dtype)
            for theirs, ours, transposed in TABLE
            if ours in shapes
        }
        if config.tie_word_embeddings and "lm_head.weight" in tensors:
            if not np.array_equal(tensors["lm_head.weight"].read().astype(dtype), arrays["embed"]):
                raise errors.InputError(
                    f"{path}: lm_head.weight differs from the embedding though "
                    "tie_word_embeddings is true; set it to false in config.json"
                )
    place = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.P())
    leaves = [
        (keys, leaf.replace(jax.device_put(arrays[".".join(keys)], place)))
        for keys, leaf in nnx.to_flat_state(state)
    ]
    module = nnx.merge(graphdef, nnx.from_flat_state(leaves))
    module.dtype = dtype
    return module


def save(module: decoder.Decoder, path: str | os.PathLike, tokenizer=None) -> None:
    """Writes config.json, generation_config.json and model.safetensors, reads them back, renames.

    Nothing half-written ever carries the name `path`. A model already there is replaced as a whole;
    any other directory there is an InputError. LoRA factors must have been merged (`lora.merge`).
    """
    path = pathlib.Path(path)
    if path.exists() and not (path / "config.json").exists() and any(path.iterdir()):
        raise errors.InputError(f"{path} exists and holds no model; name another directory")
    tensors = _to_hf(module)
    config = module.config.to_hf() | {"torch_dtype": str(module.embed[...].dtype)}
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        new = pathlib.Path(scratch) / "new"
        new.mkdir()
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if generation["eos_token_id"] is not None:
            (new / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        safetensors.numpy.save_file(tensors, new / _WEIGHTS, metadata={"format": "pt"})
        _verify(new / _WEIGHTS, tensors)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if path.exists():
            path.rename(pathlib.Path(scratch) / "old")
        new.rename(path)


def read_config(path: pathlib.Path) -> model_config.ModelConfig:
    """config.json, with the end-of-sequence ids of generation_config.json where it has any."""
    config = model_config.ModelConfig.from_hf(_read_json(path / "config.json"))
    generation = path / "generation_config.json"
    if generation.exists():
        eos = model_config.id_tuple(_read_json(generation).get("eos_token_id"))
        config = dataclasses.replace(config, eos_token_ids=eos or config.eos_token_ids)
    return config


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of an open file, not read yet."""

    file: Any  # safetensors.safe_open
    name: str
    shape: tuple[int, ...]
    dtype: jnp.dtype

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.name)


_DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}


def _open(path: pathlib.Path, files: contextlib.ExitStack) -> dict[str, _Tensor]:
    """Every tensor by name, out of one file or of the shards that an index lists."""
    names = [_WEIGHTS]
    if not (path / _WEIGHTS).exists() and (path / _INDEX).exists():
        names = _read_json(path / _INDEX).get("weight_map")
        if not isinstance(names, dict):
            raise errors.InputError(f"{path / _INDEX} has no weight_map; copy it again")
        names = sorted(set(names.values()))
    tensors = {}
    for name in names:
        if not (path / name).exists():
            raise errors.InputError(f"{path} has no {name}; only safetensors weights are read")
        try:
            file = files.enter_context(safetensors.safe_open(path / name, framework="np"))
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise errors.InputError(f"{path / name} is damaged ({error}); copy it again") from error
        for key, part in slices.items():
            if part.get_dtype() not in _DTYPES:
                raise errors.InputError(
                    f"{path / name}: {key} is {part.get_dtype()}, only {', '.join(_DTYPES)} work"
                )
            shape, dtype = tuple(part.get_shape()), jnp.dtype(_DTYPES[part.get_dtype()])
            tensors[key] = _Tensor(file, key, shape, dtype)
    return tensors


def _check_names(
    path: pathlib.Path,
    tensors: dict[str, _Tensor],
    shapes: dict[str, tuple[int, ...]],
    config: model_config.ModelConfig,
) -> None:
    """InputError that names missing, extra and misshapen tensors."""
    expected = {}
    for theirs, ours, transposed in TABLE:
        if ours in shapes:
            stacked = "{}" in theirs
            shape = shapes[ours][1:] if stacked else shapes[ours]
            for name in _layer_names(theirs, config.num_hidden_layers):
                expected[name] = shape[::-1] if transposed else shape
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    extra = {name for name in tensors if not name.endswith(_DERIVED)} - set(expected) - optional
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not part of the architecture" for name in sorted(extra)]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, config.json implies {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise errors.InputError(f"{path}: {'; '.join(problems[:3])}{more}")


def _layer_names(theirs: str, layers: int) -> Iterator[str]:
    """The tensors of one row of the table: one a layer, or the row's own name."""
    return (theirs.format(n) for n in range(layers)) if "{}" in theirs else iter([theirs])


def _read(
    theirs: str,
    transposed: bool,
    shape: tuple[int, ...],
    tensors: dict[str, _Tensor],
    dtype: jnp.dtype,
) -> np.ndarray:
    """One parameter of ours, stacked where the row of the table is per layer."""
    out = np.empty(shape, dtype)
    parts = out if "{}" in theirs else out[None]
    for part, name in zip(parts, _layer_names(theirs, len(parts)), strict=True):
        tensor = tensors[name].read()
        part[...] = tensor.T if transposed else tensor
    return out


def _to_hf(module: decoder.Decoder) -> dict[str, np.ndarray]:
    """Our parameters under Hugging Face's names."""
    rows = {ours: (theirs, transposed) for theirs, ours, transposed in TABLE}
    tensors = {}
    for keys, leaf in nnx.to_flat_state(nnx.state(module)):
        ours = ".".join(keys)
        if ours not in rows:
            raise ValueError(f"{ours} has no Hugging Face name; call lora.merge before saving")
        theirs, transposed = rows[ours]
        value = np.asarray(leaf[...])
        parts = value if "{}" in theirs else value[None]
        for part, name in zip(parts, _layer_names(theirs, len(parts)), strict=True):
            # safetensors writes the bytes of a transposed view in the wrong order.
            tensors[name] = np.ascontiguousarray(part.T if transposed else part)
    return tensors


def _verify(file: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    with safetensors.safe_open(file, framework="np") as written:
        for name, tensor in tensors.items():
            if written.get_tensor(name).tobytes() != tensor.tobytes():
                raise OSError(
                    f"{file}: {name} was not written as it is; is the disk full or failing?"
                )


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise errors.InputError(
            f"{file} does not exist; give a Hugging Face model directory"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise errors.InputError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise errors.InputError(f"{file} is not a JSON object")
    return content
