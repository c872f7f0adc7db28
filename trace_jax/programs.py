"""The programs of a run, compiled from shapes alone: what they take of a device's memory.

Nothing is allocated: arguments are ShapeDtypeStructs with the shardings they would have.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from trace_jax import batches, fit, impact, packing, sampling, sharding, train
from trace_jax.models import decoder, model_config


@dataclasses.dataclass(frozen=True)
class Model:
    """What model.* of the config says of a model, in values."""

    config: model_config.ModelConfig
    dtype: str
    remat: str
    head_chunk: int
    layer_rows: int = 0
    attention_block: int = 0  # -1 only for the platform that is here


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a program runs."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Arguments and outputs, those that share memory once, and temporaries."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes


def train_step(
    model: Model,
    settings: fit.Settings,
    conflict: packing.Layout | None,
    retain: packing.Layout | None,
    mesh: jax.sharding.Mesh,
) -> jax.stages.Lowered:
    """The update of `train.train_step` on batches of these layouts."""
    graphdef, params, frozen = _split(model, settings)
    options = settings.options()
    state = jax.eval_shape(lambda p: train.init_state(p, options), params)
    ref = None
    if retain is not None:
        ref = jax.eval_shape(lambda p: fit.reference(p, settings), params)
    step = batches.Step(*(None if x is None else _batch(x, mesh) for x in (conflict, retain)))
    with jax.set_mesh(mesh):
        return train.train_step.lower(
            *(None if tree is None else _placed(tree, mesh) for tree in (state, frozen, ref)),
            step,
            _scalars(train.Hyper, mesh),
            _placed(params, mesh) if settings.drift else None,
            graphdef=graphdef,
            options=options,
        )


def impact_pass(
    model: Model, settings: fit.Settings, layout: packing.Layout, mesh: Any
) -> jax.stages.Lowered:
    """The forward-mode pass of `impact.response_derivatives` along one gradient."""
    graphdef, params, frozen = _split(model, settings)
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), params)
    with jax.set_mesh(mesh):
        return impact.response_derivatives.lower(
            _placed(params, mesh),
            _placed(frozen, mesh),
            _placed(stacked, mesh, leading=1),
            _batch(layout, mesh).rows,
            graphdef=graphdef,
            n_responses=2 * layout.slots,
        )


def sample(
    model: Model, rows: int, prompt_length: int, max_new_tokens: int, mesh: jax.sharding.Mesh
) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """`decoding.prefill` of the longest prompts, and the decoding loop with a full cache."""
    graphdef, state = nnx.split(abstract(model))
    with jax.set_mesh(mesh):
        slots = sampling.most_slots(rows)
        return sampling.lower(graphdef, _placed(state, mesh), slots, prompt_length, max_new_tokens)


def memory(lowered: jax.stages.Lowered) -> Memory:
    """Compiles, and reads what the compiler says of one device.

    Where it refuses for lack of memory, the temporaries are what it says it wants; the rest is 0.
    """
    try:
        found = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        wanted = re.search(r"RESOURCE_EXHAUSTED.*?\(([\d.]+)G\)", str(error), re.DOTALL)
        if wanted is None:
            raise
        return Memory(0, 0, 0, int(float(wanted.group(1)) * 2**30))
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
    )


def parameter_bytes(model: Model, mesh: jax.sharding.Mesh) -> int:
    """Of the model's weights, in its dtype, on one device."""
    state = nnx.state(abstract(model))
    places = sharding.of_tree(state, mesh)
    sizes = jax.tree.map(
        lambda x, where: math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize, state, places
    )
    return sum(jax.tree.leaves(sizes))


def count_parameters(model: Model, settings: fit.Settings) -> tuple[int, int]:
    """(all, trainable)."""
    _, params, frozen = _split(model, settings)
    trained, rest = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (params, frozen))
    return trained + rest, trained


def abstract(model: Model) -> decoder.Decoder:
    """The module with ShapeDtypeStructs for arrays."""
    dtype = jnp.dtype(model.dtype)
    module = nnx.eval_shape(
        lambda: decoder.Decoder(model.config, lambda _, shape: jnp.zeros(shape, dtype), dtype)
    )
    module.dtype, module.remat = dtype, model.remat
    module.head_chunk, module.layer_rows = model.head_chunk, model.layer_rows
    module.attention_block = model.attention_block
    return module


def _split(model: Model, settings: fit.Settings) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graphdef, trainable, frozen) with adapters, as `fit.fit` splits them."""
    module = nnx.eval_shape(lambda m: fit.with_adapters(m, settings), abstract(model))
    return nnx.split(module, fit.trainable(settings), ...)


def _placed(tree: Any, mesh: jax.sharding.Mesh, *, leading: int = 0) -> Any:
    """The tree's shapes with their shardings; `leading` axes in front of a parameter are whole."""

    def place(leaf: jax.ShapeDtypeStruct, where: jax.sharding.NamedSharding):
        spec = jax.P(*[None] * leading, *where.spec)
        where = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    inner = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[leading:], x.dtype), tree)
    return jax.tree.map(place, tree, sharding.of_tree(inner, mesh))


def _batch(layout: packing.Layout, mesh: jax.sharding.Mesh) -> batches.Batch:
    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        shape = (layout.micro_batches, layout.micro_rows, *shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.of_rows(shape, mesh, leading=1))

    names = batches.Rows._fields
    rows = batches.Rows(*(array(jnp.int32, layout.row_length) for _ in names))
    coefficients = {name: array(jnp.float32, layout.slots) for name in batches.COEFFICIENTS}
    return batches.Batch(rows, coefficients, array(jnp.float32, 2 * layout.slots))


def _scalars(kind: type, mesh: jax.sharding.Mesh) -> Any:
    where = jax.sharding.NamedSharding(mesh, jax.P())
    return kind(*(jax.ShapeDtypeStruct((), jnp.float32, sharding=where) for _ in kind._fields))
