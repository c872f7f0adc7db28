"""Hugging Face checkpoints: one table says which tensor is which parameter; and reading them.

Every process reads the bytes of its own shards and nothing else, one parameter at a time, straight
into the memory where the parameter stays. Writing is in `hf_export.py`.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trace_jax import errors, model_folder, sharding
from trace_jax.models import adapters, decoder, model_config, tensor_files

Row = tuple[str, str, bool]  # (Hugging Face tensor, our parameter, transposed)

# `{}` is the layer, which we stack on axis 0.
_TABLE = (
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
_QWEN2 = tuple(
    (f"model.layers.{{}}.self_attn.{name}_proj.bias", f"layers.{name}.bias", False)
    for name in ("q", "k", "v")
)
_GEMMA2 = (  # its second norm comes after the attention, and two frame the MLP
    (
        "model.layers.{}.post_attention_layernorm.weight",
        "layers.post_attention_norm.weight",
        False,
    ),
    ("model.layers.{}.pre_feedforward_layernorm.weight", "layers.mlp_norm.weight", False),
    ("model.layers.{}.post_feedforward_layernorm.weight", "layers.post_mlp_norm.weight", False),
)
_DERIVED = "rotary_emb.inv_freq"  # old checkpoints store the RoPE frequencies, which we compute
_CHECKED_ROWS = 64
_BLOCK_BYTES = 2**24  # of two tensors compared at once


def table(config: model_config.ModelConfig) -> tuple[Row, ...]:
    """The rows of a family."""
    if config.is_gemma:
        return tuple(row for row in _TABLE if "post_attention" not in row[0]) + _GEMMA2
    return _TABLE + (_QWEN2 if config.has_qkv_bias else ())


def load(
    path: str | os.PathLike,
    *,
    dtype: jnp.dtype | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> decoder.Decoder:
    """The model in a Hugging Face directory or of the hub, parameters and activations in `dtype`.

    Without a dtype they keep the stored one. With a mesh they lie as `sharding.spec` says. A PEFT
    adapter is read as the model that it makes of another one (`adapters.py`).
    Raises InputError where the directory is incomplete, damaged or not a model we support.

    Damage is found where it shows: a file or shard that is missing, cut off or longer than its
    header says; a header or index that does not fit the architecture; numbers that are not finite.
    safetensors has no checksums, so a flipped bit that leaves a finite number is NOT found here:
    artefacts of a run have hashes of their own, and for a model of the hub compare `sha256sum`.
    """
    path = model_folder.resolve(path)
    config = read_config(path)
    graphdef, state = nnx.split(_empty(config))
    with contextlib.ExitStack() as files:
        tensors = _open(path, files)
        _check_names(path, tensors, state, config)
        dtype = jnp.dtype(dtype or tensors["model.embed_tokens.weight"].dtype)
        rows = {ours: (theirs, transposed) for theirs, ours, transposed in table(config)}
        leaves = []
        for keys, leaf in nnx.to_flat_state(state):
            name = ".".join(keys)
            array = _read_parameter(*rows[name], name, leaf.shape, tensors, dtype, mesh)
            leaves.append((keys, leaf.replace(array)))
        if config.tie_word_embeddings and "lm_head.weight" in tensors:
            _check_tied(path, tensors)
    module = nnx.merge(graphdef, nnx.from_flat_state(leaves))
    module.dtype = dtype
    return module


def check(path: pathlib.Path) -> model_config.ModelConfig:
    """The config of the model in a directory, whose files were found complete by their headers.

    Reads no weights, so it costs nothing to ask before anything else is spent. Raises as `load`.
    """
    config = read_config(path)
    with contextlib.ExitStack() as files:
        _check_names(path, _open(path, files), nnx.state(_empty(config)), config)
    return config


def _empty(config: model_config.ModelConfig) -> decoder.Decoder:
    return nnx.eval_shape(lambda: decoder.Decoder(config, lambda _, shape: jnp.zeros(shape)))


def read_config(path: pathlib.Path) -> model_config.ModelConfig:
    """config.json, with the end-of-sequence ids of generation_config.json where it has any.

    Of an adapter it is that of its model.
    """
    path = model_folder.chain(path)[-1]
    config = model_config.ModelConfig.from_hf(model_folder.read_json(path / model_folder.CONFIG))
    generation = path / "generation_config.json"
    if generation.exists():
        eos = model_config.id_tuple(model_folder.read_json(generation).get("eos_token_id"))
        config = dataclasses.replace(config, eos_token_ids=eos or config.eos_token_ids)
    return config


def check_tokenizer(config: model_config.ModelConfig, tokenizer: Any) -> None:
    """Raises InputError where the tokenizer has ids that the embedding does not.

    Fewer are fine: Qwen2.5 pads its embedding.
    """
    if len(tokenizer) > config.vocab_size:
        raise errors.InputError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding "
            f"{config.vocab_size}; use the tokenizer that belongs to the model"
        )


def layer_names(theirs: str, layers: int) -> Iterator[str]:
    """The tensors of one row of the table: one a layer, or the row's own name."""
    return (theirs.format(n) for n in range(layers)) if "{}" in theirs else iter([theirs])


def _open(path: pathlib.Path, files: contextlib.ExitStack) -> dict[str, adapters.Tensor]:
    """Every tensor by name, of a model or an adapter on top of one."""
    *changes, base = model_folder.chain(path)
    tied = bool(changes) and read_config(base).tie_word_embeddings
    tensors: dict[str, adapters.Tensor] = tensor_files.opened(
        base, tensor_files.of_model(base), files
    )
    for folder in reversed(changes):
        tensors = adapters.apply(folder, tensors, files, tied=tied)
    return tensors


def _check_names(
    path: pathlib.Path,
    tensors: Mapping[str, adapters.Tensor],
    state: nnx.State,
    config: model_config.ModelConfig,
) -> None:
    """InputError that names missing, extra and misshapen tensors."""
    shapes = {".".join(keys): leaf.shape for keys, leaf in nnx.to_flat_state(state)}
    expected = {}
    for theirs, ours, transposed in table(config):
        if ours in shapes:
            shape = shapes[ours][1:] if "{}" in theirs else shapes[ours]
            for name in layer_names(theirs, config.num_hidden_layers):
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


def _check_tied(path: pathlib.Path, tensors: Mapping[str, adapters.Tensor]) -> None:
    head, embed = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    step = max(1, _BLOCK_BYTES // max(1, embed.shape[1] * 4))
    blocks = [slice(n, n + step) for n in range(0, embed.shape[0], step)]
    if head.shape == embed.shape and all(
        np.array_equal(head.read(b), embed.read(b)) for b in blocks
    ):
        return
    raise errors.InputError(
        f"{path}: lm_head.weight differs from the embedding though tie_word_embeddings is true; "
        "set it to false in config.json"
    )


def _read_parameter(
    theirs: str,
    transposed: bool,
    ours: str,
    shape: tuple[int, ...],
    tensors: Mapping[str, adapters.Tensor],
    dtype: jnp.dtype,
    mesh: jax.sharding.Mesh | None,
) -> jax.Array:
    """One parameter of ours, stacked where the row of the table is per layer."""
    names = list(layer_names(theirs, shape[0]))
    stacked = "{}" in theirs
    made: dict[tuple, np.ndarray] = {}  # copies of one part share their memory until they move

    def part(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if key not in made:
            made[key] = out = _aligned([last - first for first, last in key], dtype)
            inner = index[1:] if stacked else index
            wanted = inner[::-1] if transposed else inner
            layers = range(*key[0]) if stacked else range(1)
            for into, n in zip(out if stacked else out[None], layers, strict=True):
                tensor = tensors[names[n]].read(*wanted)
                _check_finite(names[n], tensor)
                into[...] = tensor.T if transposed else tensor
        return made[key]

    if mesh is None:
        where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    else:
        where = jax.sharding.NamedSharding(mesh, sharding.spec(ours, shape, mesh))
    return jax.make_array_from_callback(shape, where, part)


def _check_finite(name: str, tensor: np.ndarray) -> None:
    """In bits, and in blocks that stay in the cache: seven times as fast as `isfinite`."""
    bits = tensor.view(f"u{tensor.itemsize}")
    infinity = np.asarray(np.inf, tensor.dtype).view(bits.dtype)
    sign_off = np.iinfo(bits.dtype).max >> 1
    for n in range(0, len(bits), _CHECKED_ROWS):
        if np.max(bits[n : n + _CHECKED_ROWS] & sign_off, initial=0) >= infinity:
            raise errors.InputError(
                f"{name} has numbers that are not finite: its file is damaged, copy it again, or "
                "the model was broken when it was saved"
            )


def _aligned(shape: list[int], dtype: jnp.dtype) -> np.ndarray:
    """Empty memory that starts where XLA wants it on CPU, so that it is used as it is."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
