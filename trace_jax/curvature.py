"""Scores beyond H ~ gamma I: the tangent (H + damping)^-1 g_J instead of g_J.

fisher_diag   H by the mean of squared per-example gradients, one number a parameter
cg            H by Hessian-vector products of the step's loss, solved by conjugate gradients

Method: arXiv 2511.02623 takes the identity; the others follow influence functions (arXiv
1703.04730). A tangent's length does not matter, for weights are normalised.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from trace_jax import batches, impact, sharding, train

Array = jax.Array
KINDS = ("identity", "fisher_diag", "cg")
_MOST_RESTARTS = 6


@dataclasses.dataclass(frozen=True)
class Solved:
    """A solution of (H + damping) x = g and how it was reached.

    Attributes:
      tangent: x.
      iterations: Hessian-vector products of the last try.
      residual: |(H + damping) x - g| / |g|.
      damping: what was added to H in the end.
      restarts: how often a direction of negative curvature made the damping ten times larger.
    """

    tangent: nnx.State
    iterations: int
    residual: float
    damping: float
    restarts: int


@functools.partial(jax.jit, static_argnames=("graphdef", "options"))
def squared_gradients(
    params: nnx.State,
    frozen: nnx.State,
    batch: batches.Batch,
    hyper: train.Hyper,
    *,
    graphdef: nnx.GraphDef,
    options: train.Options,
) -> nnx.State:
    """Sum over the rows of batch [M, R, ...], one example each, of its squared gradient, float32.

    One gradient at a time, so it needs the memory of two.
    """

    def add(total: nnx.State, row: batches.Batch) -> tuple[nnx.State, None]:
        one = jax.tree.map(lambda a: a[None], row)
        loss_fn = impact.example_losses(frozen, one, hyper, graphdef, options)
        gradient = jax.grad(lambda p: jnp.sum(loss_fn(p)))(params)
        squares = jax.tree.map(lambda t, g: t + jnp.square(g.astype(t.dtype)), total, gradient)
        return sharding.constrain_tree(squares), None

    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), batch)
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    return jax.lax.scan(add, sharding.constrain_tree(zeros), flat)[0]


@functools.partial(jax.jit, static_argnames=("damping",))
def by_diagonal(gradient: nnx.State, diagonal: nnx.State, *, damping: float) -> nnx.State:
    """gradient / (diagonal + damping * the mean of the diagonal), in the gradient's dtype."""
    n = sum(d.size for d in jax.tree.leaves(diagonal))
    added = damping * sum(jnp.sum(d) for d in jax.tree.leaves(diagonal)) / n
    return jax.tree.map(lambda g, d: (g / (d + added)).astype(g.dtype), gradient, diagonal)


@functools.partial(jax.jit, static_argnames=("graphdef", "options"))
def hessian_vector_product(
    params: nnx.State,
    vector: nnx.State,
    frozen: nnx.State,
    ref_params: nnx.State | None,
    step: batches.Step,
    hyper: train.Hyper,
    *,
    graphdef: nnx.GraphDef,
    options: train.Options,
) -> nnx.State:
    """H v for the loss of `step` (forward over reverse); params and vector in one dtype."""

    def gradient(p: nnx.State) -> nnx.State:
        return train.gradient(
            p, frozen, ref_params, step, hyper, graphdef=graphdef, options=options
        )[0]

    return jax.jvp(gradient, (params,), (vector,))[1]


def conjugate_gradients(
    product, gradient: nnx.State, *, damping: float, iterations: int, tolerance: float
) -> Solved:
    """Solves (H + lambda) x = g for `product`(v) = H v; lambda = damping * |g.Hg| / g.g at first.

    H may be indefinite: a direction of negative curvature starts anew with ten times the lambda.
    """
    g2 = float(_dot(gradient, gradient))
    if not g2:
        return Solved(gradient, 0, 0.0, 0.0, 0)
    added = damping * abs(float(_dot(gradient, product(gradient)))) / g2
    added = max(added, 1e-12)
    for restarts in range(_MOST_RESTARTS + 1):
        found = _solve(product, gradient, g2, added, iterations, tolerance)
        if found is not None:
            return Solved(*found, damping=added, restarts=restarts)
        added *= 10
    return Solved(gradient, 0, 1.0, added, _MOST_RESTARTS)


def _solve(product, g: nnx.State, g2: float, added: float, iterations: int, tolerance: float):
    """(x, products used, relative residual), or None where the curvature is not positive."""
    x = jax.tree.map(jnp.zeros_like, g)
    r, p, r2 = g, g, g2
    for n in range(iterations):
        hp = _add(product(p), p, added)
        curvature = float(_dot(p, hp))
        if not curvature > 0:
            return None
        step = r2 / curvature
        x, r = _add(x, p, step), _add(r, hp, -step)
        new = float(_dot(r, r))
        if new <= tolerance**2 * g2:
            return x, n + 1, (new / g2) ** 0.5
        p, r2 = _add(r, p, new / r2), new
    return x, iterations, (r2 / g2) ** 0.5


@jax.jit
def _dot(a: nnx.State, b: nnx.State) -> Array:
    products = jax.tree.map(lambda x, y: jnp.sum(x * y, dtype=jnp.float32), a, b)
    return sharding.replicated(sum(jax.tree.leaves(products)))


@jax.jit
def _add(a: nnx.State, b: nnx.State, scale: Array) -> nnx.State:
    """a + scale * b."""
    return jax.tree.map(lambda x, y: (x + scale * y).astype(x.dtype), a, b)
