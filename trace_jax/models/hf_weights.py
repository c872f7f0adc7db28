"""Hugging Face checkpoints: one table says which tensor is which parameter; and reading them.

Every process reads the bytes of its own shards and nothing else, one parameter at a time, straight
into the memory where the parameter stays. Writing is in `hf_export.py`.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trace_jax import errors, remote, sharding
from trace_jax.models import decoder, model_config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
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
_DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}
_CHECKED_ROWS = 64
_BLOCK_BYTES = 2**24  # read at once where only a part of every row of a tensor is wanted


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

    Without a dtype they keep the stored one. With a mesh they lie as `sharding.spec` says.
    Raises InputError where the directory is incomplete, damaged or not a model we support.

    Damage is found where it shows: a file or shard that is missing, cut off or longer than its
    header says; a header or index that does not fit the architecture; numbers that are not finite.
    safetensors has no checksums, so a flipped bit that leaves a finite number is NOT found here:
    artefacts of a run have hashes of their own, and for a model of the hub compare `sha256sum`.
    """
    path = resolve(path)
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


def resolve(path: str | os.PathLike) -> pathlib.Path:
    """A folder as it is; gs://bucket/name or organisation/name as a local copy, fetched if need be.

    Raises InputError where the hub has no such model, or does not give it to this user.
    """
    name = os.fspath(path)
    if remote.is_remote(name):
        return remote.local(name)
    if pathlib.Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return pathlib.Path(name)
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    patterns = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except hub_errors.GatedRepoError as error:
        raise errors.InputError(
            f"{name} is gated: accept its licence on the hub, and set HF_TOKEN to a token of that "
            "account"
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise errors.InputError(
            f"{name}: neither a folder here nor a model of the hub that this user can see"
        ) from error
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, OSError) as error:
        what = str(error).strip().splitlines()[0]
        raise errors.InputError(
            f"{name} could not be downloaded ({what}); try again, or give a local folder"
        ) from error


def read_config(path: pathlib.Path) -> model_config.ModelConfig:
    """config.json, with the end-of-sequence ids of generation_config.json where it has any."""
    config = model_config.ModelConfig.from_hf(read_json(path / "config.json"))
    generation = path / "generation_config.json"
    if generation.exists():
        eos = model_config.id_tuple(read_json(generation).get("eos_token_id"))
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


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object; anything else is an InputError."""
    try:
        content = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise errors.InputError(
            f"{file} does not exist; give a Hugging Face model directory"
        ) from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, numbers without end
        raise errors.InputError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise errors.InputError(f"{file} is not a JSON object")
    return content


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of one or two axes in an open safetensors file, not read yet."""

    descriptor: int
    begin: int  # its first byte in the file
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, *index: slice) -> np.ndarray:
        """The part that `index` selects; in one run of bytes where it takes whole rows."""
        first, last, _ = index[0].indices(self.shape[0])
        inner = math.prod(self.shape[1:])
        if len(index) == 1 or index[1].indices(inner)[:2] == (0, inner):
            return self._rows(first, last)
        step = max(1, _BLOCK_BYTES // (inner * self.dtype.itemsize))
        blocks = ((n, min(n + step, last)) for n in range(first, last, step))
        return np.concatenate([self._rows(*block)[:, index[1]] for block in blocks])

    def _rows(self, first: int, last: int) -> np.ndarray:
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        out = np.empty((last - first) * row_bytes, np.uint8)
        done = 0
        while done < out.size:
            at = self.begin + first * row_bytes + done
            got = os.preadv(self.descriptor, [out[done:]], at)
            if not got:
                raise errors.InputError("a weights file became shorter while it was read")
            done += got
        return out.view(self.dtype).reshape(last - first, *self.shape[1:])


def _open(path: pathlib.Path, files: contextlib.ExitStack) -> dict[str, _Tensor]:
    """Every tensor by name, out of one file or of the shards that an index lists."""
    names = [WEIGHTS]
    if not (path / WEIGHTS).exists() and (path / INDEX).exists():
        names = read_json(path / INDEX).get("weight_map")
        if not isinstance(names, dict):
            raise errors.InputError(f"{path / INDEX} has no weight_map; copy it again")
        names = sorted(set(names.values()))
    tensors = {}
    for name in names:
        if pathlib.Path(name).name != name or not (path / name).exists():
            raise errors.InputError(f"{path} has no {name}; only safetensors weights are read")
        descriptor = os.open(path / name, os.O_RDONLY)
        files.callback(os.close, descriptor)
        tensors |= _header(path / name, descriptor)
    return tensors


def _header(file: pathlib.Path, descriptor: int) -> dict[str, _Tensor]:
    """The tensors that a safetensors file says it has, checked against its size."""
    size = os.fstat(descriptor).st_size
    start = os.pread(descriptor, 8, 0)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if length > size - 8:
        raise errors.InputError(f"{file} is damaged (no header); copy it again")
    try:
        header = json.loads(os.pread(descriptor, length, 8))
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        spans = {k: _span(v) for k, v in entries.items()}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise errors.InputError(f"{file} is damaged (bad header); copy it again") from error
    end = 8 + length + max((span[3] for span in spans.values()), default=0)
    if end != size:
        raise errors.InputError(
            f"{file} is damaged ({size} bytes, its header says {end}); copy it again"
        )
    found = {}
    for key, (kind, shape, begin, stop) in spans.items():
        if kind not in _DTYPES:
            raise errors.InputError(f"{file}: {key} is {kind}, only {', '.join(_DTYPES)} work")
        dtype = np.dtype(_DTYPES[kind])
        if stop - begin != math.prod(shape) * dtype.itemsize:
            raise errors.InputError(f"{file} is damaged ({key} has a wrong size); copy it again")
        found[key] = _Tensor(descriptor, 8 + length + begin, tuple(shape), dtype)
    return found


def _span(entry: dict[str, Any]) -> tuple[str, list[int], int, int]:
    """(dtype, shape, first byte, byte behind) of an entry of a header; ValueError for any other."""
    (begin, stop), shape = entry["data_offsets"], entry["shape"]
    if not isinstance(shape, list) or not isinstance(entry["dtype"], str):
        raise ValueError("no shape or no dtype")
    if any(type(n) is not int or n < 0 for n in (begin, stop, *shape)) or begin > stop:
        raise ValueError("sizes that are none")
    return entry["dtype"], shape, begin, stop


def _check_names(
    path: pathlib.Path,
    tensors: Mapping[str, _Tensor],
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


def _check_tied(path: pathlib.Path, tensors: Mapping[str, _Tensor]) -> None:
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
    tensors: Mapping[str, _Tensor],
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
