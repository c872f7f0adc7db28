"""The mesh and what lies where on it. The only file that names mesh axes. Imports jax.

    data     copies of the parameters; different rows
    fsdp     parameters cut in parts, gathered layer by layer; different rows
    tensor   matrices cut by heads and channels; the same rows

Rows of a batch lie over data x fsdp. The vocabulary lies over fsdp x tensor and is never gathered:
the chunked LM head brings the tokens of a chunk to every part of the vocabulary instead.

Functions that constrain do nothing outside `jax.set_mesh`, and leave out an axis that does not
divide a dimension.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trace_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
VOCABULARY = ("fsdp", "tensor")

# Tensor parallelism (arXiv 1909.08053): which dimension of a parameter is cut, from the right.
_TENSOR = {
    "q.kernel": -1, "k.kernel": -1, "v.kernel": -1, "gate.kernel": -1, "up.kernel": -1,
    "q.bias": -1, "k.bias": -1, "v.bias": -1,
    "q.lora_b": -1, "k.lora_b": -1, "v.lora_b": -1, "gate.lora_b": -1, "up.lora_b": -1,
    "o.kernel": -2, "down.kernel": -2, "o.lora_a": -2, "down.lora_a": -2,
}  # fmt: skip
_VOCABULARY = {"embed": 0, "head.kernel": 1}  # the dimension that is the vocabulary


def make_mesh(
    data: int,
    fsdp: int,
    tensor: int,
    *,
    fsdp_limit: int = 0,
    devices: list | None = None,
) -> Mesh:
    """A mesh over the devices; one axis may be -1, which takes what the others leave.

    fsdp_limit: fsdp=-1 takes at most so many, and data the rest: every part of the vocabulary sees
    the tokens of all of fsdp, which takes memory that grows with it. 0: 64; and 1 on CPU, where
    devices share one memory and what they would send each other costs most.

    A mesh smaller than the devices uses the first of them, where all belong to one process.
    """
    devices = jax.devices() if devices is None else devices
    shape, n = [data, fsdp, tensor], len(devices)
    text = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise InputError(f"mesh {text}: sizes are positive, and at most one is -1 (the rest)")
    used = math.prod(size for size in shape if size != -1)
    if n % used:
        raise InputError(
            f"mesh {text} does not divide the {n} devices; choose sizes whose product divides {n}, "
            "or -1 for one of them"
        )
    shape = [n // used if size == -1 else size for size in shape]
    fsdp_limit = fsdp_limit or (1 if devices[0].platform == "cpu" else 64)
    if fsdp == -1 and shape[1] > fsdp_limit:
        copies = next(
            k for k in range(2, n + 1) if shape[1] % k == 0 and shape[1] // k <= fsdp_limit
        )
        shape = [shape[0] * copies, shape[1] // copies, shape[2]]
    used = math.prod(shape)
    if used < n and len({device.process_index for device in devices}) > 1:
        raise InputError(
            f"mesh {text} uses {used} of {n} devices; with several processes it must use them all"
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    if used < n:
        return Mesh(np.asarray(devices[:used]).reshape(shape), AXES, axis_types=kinds)
    return jax.make_mesh(shape, AXES, devices=devices, axis_types=kinds)


def row_shards(mesh: Mesh | None) -> int:
    """In how many parts the rows of a batch are cut."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def current() -> Mesh | None:
    """The mesh of `jax.set_mesh` (outside jit), or None where there is none."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def shards_in_context() -> int:
    """`row_shards` of the mesh in context, inside jit or outside."""
    return row_shards(_mesh())


def check_model(mesh: Mesh, config: Any) -> None:
    """Raises InputError where the tensor axis does not divide the heads of a ModelConfig."""
    size = mesh.shape["tensor"]
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, key) % size:
            raise InputError(
                f"mesh.tensor={size} does not divide {key}={getattr(config, key)}; use a smaller "
                "mesh.tensor and a larger mesh.fsdp"
            )


def spec(path: str, shape: tuple[int, ...], mesh: Mesh | Any) -> PartitionSpec:
    """How a parameter is stored: tensor by the table; fsdp on the dimension that comes first in
    Hugging Face's files (a kernel's last), so that a process reads whole runs of bytes, or where
    that cannot be divided on the largest that can.

    path: dotted, as "layers.q.kernel"; optimizer moments have their parameter's path in theirs.
    """
    parts: list[Any] = [None] * len(shape)
    vocabulary = next((d for p, d in _VOCABULARY.items() if _ends(path, p)), None)
    if vocabulary is not None and len(shape) == 2:
        parts[vocabulary] = _dividing(shape[vocabulary], VOCABULARY, mesh)
        if parts[vocabulary] is not None:
            return PartitionSpec(*parts)
    cut = next((d % len(shape) for p, d in _TENSOR.items() if _ends(path, p)), None)
    if cut is not None and shape[cut] % mesh.shape["tensor"] == 0:
        parts[cut] = ("tensor",)
    order = sorted(range(len(shape)), key=lambda d: (shape[d], d), reverse=True)
    if path.endswith("kernel"):
        order = [len(shape) - 1, *order]
    for d in order:
        with_fsdp = (*(parts[d] or ()), "fsdp")
        if not _is_layer_axis(path, d) and shape[d] % _size(with_fsdp, mesh) == 0:
            parts[d] = with_fsdp
            break
    return PartitionSpec(*parts)


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _is_layer_axis(path: str, dimension: int) -> bool:
    """Layers are scanned one by one, so their axis stays whole."""
    return dimension == 0 and "layers." in path


def of_tree(tree: Any, mesh: Mesh) -> Any:
    """The NamedSharding of every array of a tree of parameters, moments and scalars."""

    def place(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(_dotted(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def constrain_tree(tree: Any) -> Any:
    """A tree of parameters or moments, kept where `of_tree` puts it (inside jit)."""
    mesh = _mesh()
    if mesh is None:
        return tree

    def keep(path: tuple, leaf: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(leaf, spec(_dotted(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(keep, tree)


def _dotted(path: tuple) -> str:
    """ "layers.q.kernel" of a tree path, without the field that nnx variables add."""
    names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    return ".".join(name for name in names if name != "value")


def place_module(module: nnx.Module) -> nnx.Module:
    """The module with every parameter where the mesh in context wants it.

    Those that are there already are shared with the module given.
    """
    mesh = current()
    if mesh is None:
        return module
    graphdef, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    where = jax.tree.leaves(of_tree(state, mesh))
    # What lies right stays the array that it is: jit would make a copy of it.
    moved = [n for n, x in enumerate(leaves) if not _lies(x, where[n])]
    if moved:
        place = jax.jit(lambda xs: xs, out_shardings=[where[n] for n in moved])
        for n, x in zip(moved, place([leaves[n] for n in moved]), strict=True):
            leaves[n] = x
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


def _lies(x: Any, where: NamedSharding) -> bool:
    return isinstance(x, jax.Array) and x.sharding.is_equivalent_to(where, x.ndim)


def rows(x: jax.Array) -> jax.Array:
    """[B, ...] with its rows over data x fsdp, the rest whole."""
    return _constrain(x, ROWS)


def heads(x_BLHC: jax.Array) -> jax.Array:
    """[B, L, H, C] with heads over tensor."""
    return _constrain(x_BLHC, ROWS, None, "tensor")


def on_own_heads(
    function: Callable,
    q_BLHC: jax.Array,
    k_BKCS: jax.Array,
    v_BKCS: jax.Array,
    of_rows: Any,
    everywhere: Any,
) -> jax.Array:
    """function of these arguments, [B, L, H, C], called by every device with its own rows and heads
    of them, so that it may branch on what they hold. of_rows: [B, ...]; everywhere: not cut.
    """
    arguments = q_BLHC, k_BKCS, v_BKCS, of_rows, everywhere
    mesh = _mesh()
    if mesh is None:
        return function(*arguments)
    rows = _dividing(len(k_BKCS), ROWS, mesh)
    tensor = _dividing(k_BKCS.shape[1], "tensor", mesh)
    q, kv = PartitionSpec(rows, None, tensor), PartitionSpec(rows, tensor)
    specs = (q, kv, kv, PartitionSpec(rows), PartitionSpec())
    own = jax.shard_map(function, in_specs=specs, out_specs=q, check_vma=False)
    return own(*arguments)


def keys(x_BKSC: jax.Array) -> jax.Array:
    """[B, K, S, C] of a layer's cache, with heads over tensor."""
    return _constrain(x_BKSC, ROWS, "tensor")


def product(x_BLD: jax.Array, kernel: jax.Array, cut: int) -> jax.Array:
    """x @ kernel. Many tokens gather the kernel over fsdp; one token a row is gathered itself, and
    the kernel stays where it is stored, as moving that would take most of a decoding step. Tokens
    of all rows are one dimension, as XLA's CPU compiler copies a factor of the gradient otherwise.

    cut: the dimension of the kernel that tensor parallelism cuts, -1 or -2.
    """
    inner, outer = (None, "tensor") if cut == -1 else ("tensor", None)
    if x_BLD.shape[1] > 1:
        tokens = x_BLD.reshape(-1, x_BLD.shape[-1])
        return (tokens @ _constrain(kernel, inner, outer)).reshape(*x_BLD.shape[:-1], -1)
    stored = "fsdp" if outer is None else (outer, "fsdp")
    y_BLD = _constrain(x_BLD, "data", None, inner) @ _constrain(kernel, inner, stored)
    return _constrain(_constrain(y_BLD, "data", None, stored), ROWS, None, outer)


def gathered_layer(layer: Any, dtype: Any) -> Any:
    """Parameters of one layer gathered over fsdp, cut over tensor alone, matrices in `dtype`."""
    mesh = _mesh()
    if mesh is None:
        return layer

    def gather(path: tuple, leaf: jax.Array) -> jax.Array:
        *_, module, name = _dotted(path).split(".")
        cut = _TENSOR.get(f"{module}.{name}")
        leaf = leaf if name == "weight" else leaf.astype(dtype)  # norms compute in float32
        dimensions = range(-leaf.ndim, 0)
        return _constrain(leaf, *("tensor" if d == cut else None for d in dimensions))

    return jax.tree_util.tree_map_with_path(gather, layer)


def groups_of_rows(n_rows: int, of_a_shard: int) -> int:
    """The fewest equal groups with at most `of_a_shard` rows of every data shard; 0: one group."""
    each, uneven = divmod(n_rows, shards_in_context())
    if uneven or not of_a_shard or each <= of_a_shard:
        return 1
    return each // max(size for size in range(1, of_a_shard + 1) if each % size == 0)


def grouped(tree: Any, n_groups: int) -> Any:
    """[B, ...] -> [groups, B / groups, ...], every group with rows of all data shards."""
    shards = shards_in_context()

    def group(a: jax.Array) -> jax.Array:
        cut = a.reshape(shards, n_groups, -1, *a.shape[1:]).swapaxes(0, 1)
        return _constrain(cut.reshape(n_groups, -1, *a.shape[1:]), None, ROWS)

    return jax.tree.map(group, tree)


def ungrouped(x: jax.Array) -> jax.Array:
    """What `grouped` cut, in its order."""
    n_groups, size = x.shape[:2]
    shards = shards_in_context()
    cut = x.reshape(n_groups, shards, size // shards, *x.shape[2:]).swapaxes(0, 1)
    return rows(cut.reshape(n_groups * size, *x.shape[2:]))


def gathered(x: jax.Array) -> jax.Array:
    """[B, ...] with rows over data only: every part of the vocabulary sees the tokens."""
    return _constrain(x, "data")


def logits(x: jax.Array) -> jax.Array:
    """[B, ..., V] with its vocabulary cut like the LM head."""
    return _constrain(x, "data", *[None] * (x.ndim - 2), VOCABULARY)


def replicated(tree: Any) -> Any:
    """Arrays that every process can read (inside jit)."""
    return jax.tree.map(lambda x: _constrain(x, *[None] * x.ndim), tree)


def place_rows(tree: Any, mesh: Mesh | None = None, *, leading: int = 1) -> Any:
    """Host arrays [M, R, ...] (leading=1) or [R, ...] (0) on the mesh, R over data x fsdp.

    Every process has the whole arrays and puts only its own part on its devices. Without a mesh it
    is that of the context, and without that the arrays stay as they are.
    """
    mesh = current() if mesh is None else mesh
    if mesh is None:
        return tree

    def place(a: np.ndarray) -> jax.Array:
        where = of_rows(a.shape, mesh, leading=leading)
        return jax.make_array_from_callback(a.shape, where, lambda index: a[index])

    return jax.tree.map(place, tree)


def of_keys(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where `keys` has a layer of a cache."""
    parts = _dividing(shape[0], ROWS, mesh), _dividing(shape[1], "tensor", mesh)
    return NamedSharding(mesh, PartitionSpec(*parts))


def of_rows(shape: tuple[int, ...], mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Where `place_rows` puts an array of that shape."""
    parts = [None] * leading + [_dividing(shape[leading], ROWS, mesh)]
    return NamedSharding(mesh, PartitionSpec(*parts))


def _mesh() -> Any:
    """The mesh in context, or None where there is none or it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def _constrain(x: jax.Array, *parts: Any) -> jax.Array:
    mesh = _mesh()
    if mesh is None:
        return x
    kept = [None if p is None else _dividing(x.shape[d], p, mesh) for d, p in enumerate(parts)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*kept))


def _dividing(size: int, axes: str | tuple[str, ...], mesh: Any) -> Any:
    """`axes` without the last ones until their product divides `size`; None for none."""
    axes = (axes,) if isinstance(axes, str) else axes
    while axes and size % _size(axes, mesh):
        axes = axes[:-1]
    return axes or None


def _size(axes: tuple[str, ...], mesh: Any) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
