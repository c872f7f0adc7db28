"""safetensors files: their headers, checked against their sizes, and any part of any tensor."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import struct
from typing import Any

import jax.numpy as jnp
import numpy as np

from trace_jax import errors, model_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}
_BLOCK_BYTES = 2**24  # read at once where only a part of every row of a tensor is wanted


@dataclasses.dataclass(frozen=True)
class Tensor:
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


def of_model(path: pathlib.Path) -> list[str]:
    """The names of a model's files: one, or the shards that an index lists."""
    if (path / WEIGHTS).exists() or not (path / INDEX).exists():
        return [WEIGHTS]
    names = model_folder.read_json(path / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise errors.InputError(f"{path / INDEX} has no weight_map; copy it again")
    return sorted(set(names.values()))


def opened(path: pathlib.Path, names: list[str], files: contextlib.ExitStack) -> dict[str, Tensor]:
    """Every tensor of some files of a folder by name; they are closed with `files`."""
    tensors = {}
    for name in names:
        if pathlib.Path(name).name != name or not (path / name).exists():
            raise errors.InputError(f"{path} has no {name}; only safetensors weights are read")
        descriptor = os.open(path / name, os.O_RDONLY)
        files.callback(os.close, descriptor)
        tensors |= _header(path / name, descriptor)
    return tensors


def _header(file: pathlib.Path, descriptor: int) -> dict[str, Tensor]:
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
        found[key] = Tensor(descriptor, 8 + length + begin, tuple(shape), dtype)
    return found


def _span(entry: dict[str, Any]) -> tuple[str, list[int], int, int]:
    """(dtype, shape, first byte, byte behind) of an entry of a header; ValueError for any other."""
    (begin, stop), shape = entry["data_offsets"], entry["shape"]
    if not isinstance(shape, list) or not isinstance(entry["dtype"], str):
        raise ValueError("no shape or no dtype")
    if any(type(n) is not int or n < 0 for n in (begin, stop, *shape)) or begin > stop:
        raise ValueError("sizes that are none")
    return entry["dtype"], shape, begin, stop
