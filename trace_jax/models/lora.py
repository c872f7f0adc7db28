"""Low-rank adapters (arXiv 2106.09685): y = x W + (alpha / rank) x A B, stacked over layers like W.

The factors are `nnx.LoRAParam`, so `nnx.split(module, nnx.LoRAParam, ...)` gives what is trained
and the rest. Functions return a new module that shares the arrays of the old; none changes that.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trace_jax import errors
from trace_jax.models import decoder

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def add(
    module: decoder.Decoder,
    *,
    rank: int,
    alpha: float,
    targets: tuple[str, ...] | str = "all",
    seed: int,
) -> decoder.Decoder:
    """With factors that change nothing yet: A as PEFT draws it (uniform, bound in^-0.5), B zero.

    Targets are names from `TARGETS`, or "all". Factors are float32 whatever the kernels are. A
    matrix's draw depends on the seed and its name only, not on which other targets there are.
    """
    targets = TARGETS if targets == "all" else targets
    unknown = [name for name in targets if name not in TARGETS]
    if unknown or not targets or isinstance(targets, str):
        raise errors.InputError(
            f'LoRA targets {targets!r} must be "all" or some of {", ".join(TARGETS)}'
        )
    if rank < 1:
        raise errors.InputError(f"LoRA rank={rank} must be at least 1")
    if any(linear.lora_a is not None for linear in _linears(module)):
        raise ValueError("the module has LoRA factors; call lora.merge first")
    module = _copy(module)
    for index, name in enumerate(TARGETS):
        if name in targets:
            linear = getattr(module.layers, name)
            layers, rows, columns = linear.kernel.shape
            bound = 1 / math.sqrt(rows)
            a = np.random.default_rng([seed, index]).uniform(-bound, bound, (layers, rows, rank))
            linear.lora_a = nnx.LoRAParam(jnp.asarray(a, jnp.float32))
            linear.lora_b = nnx.LoRAParam(jnp.zeros((layers, rank, columns), jnp.float32))
            linear.lora_scale = alpha / rank
    return module


def merge(module: decoder.Decoder) -> decoder.Decoder:
    """With the factors folded into the kernels, and gone."""
    merged = _copy(module)
    for linear in _linears(merged):
        if linear.lora_a is not None:
            before, kernels = linear.kernel[...], jnp.copy(linear.kernel[...])
            fold = jax.jit(_fold, donate_argnums=0, out_shardings=kernels.sharding)
            for n in range(len(before)):
                factors = (linear.lora_a[...][n], linear.lora_b[...][n])
                kernels = fold(kernels, before[n], *factors, linear.lora_scale, n)
            linear.kernel[...] = kernels
        linear.lora_a, linear.lora_b = nnx.data(None), nnx.data(None)
        linear.lora_scale = 0.0
    return merged


def _fold(
    kernels_NIO: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float, n: int
) -> jax.Array:
    """W + scale A B in layer n; all layers at once would take the kernels in float32, three times.

    The donated kernels are written in place, so the layer's own comes beside them.
    """
    folded = (kernel.astype(jnp.float32) + jnp.matmul(a, b) * scale).astype(kernel.dtype)
    return jax.lax.dynamic_update_index_in_dim(kernels_NIO, folded, n, 0)


def disabled(trainable: nnx.State) -> nnx.State:
    """The trainable tree with all factors zero: merged with the frozen rest, it is the base model.

    So the reference of a KL term needs no second copy of the kernels.
    """
    return jax.tree.map(jnp.zeros_like, trainable)


def _linears(module: decoder.Decoder) -> list[decoder.Linear]:
    return [getattr(module.layers, name) for name in TARGETS]


def _copy(module: decoder.Decoder) -> decoder.Decoder:
    """New variables around the same arrays (`nnx.merge` alone would share the variables too)."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
