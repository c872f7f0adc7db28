"""Curvature: squared gradients, Hessian-vector products and conjugate gradients against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import quick_compiles  # noqa: F401

from trace_jax import batches, curvature, impact, packing

EXAMPLES = [tiny.example("a", pref=1.0), tiny.example("b", npo0=1.0, npo1=1.0)]
ROW = 16


@pytest.fixture(scope="module")
def problem():
    """(graphdef, params, frozen, options, a batch of two examples, one a row)."""
    rng = np.random.default_rng(0)
    texts = [tiny.text(rng, 3, 4, 2), tiny.text(rng, 2, 3, 5)]
    model = tiny.module()
    ref = tiny.reference(model, texts) - 0.3  # away from theta_ref
    layout = packing.Layout(2, ROW, 1, 1)
    batch = batches.make_batch([[0], [1]], layout, texts, EXAMPLES, ref)
    return *tiny.split(model), tiny.options(n_conflict=2), batch


def test_squared_gradients_are_those_of_single_examples(problem):
    graphdef, params, frozen, options, batch = problem
    found = curvature.squared_gradients(
        params, frozen, batch, tiny.hyper(), graphdef=graphdef, options=options
    )
    expected = jax.tree.map(np.zeros_like, params)
    for i in range(2):
        one = jax.tree.map(lambda a, i=i: a[0, i : i + 1], batch)
        loss = impact.example_losses(frozen, one, tiny.hyper(), graphdef, options)
        gradient = jax.jit(jax.grad(lambda p, loss=loss: loss(p).sum()))(params)
        expected = jax.tree.map(lambda e, g: e + np.square(g), expected, gradient)
    tiny.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_the_diagonal_divides_and_damps():
    gradient, diagonal = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 1.0])}
    found = curvature.by_diagonal(gradient, diagonal, damping=0.5)
    np.testing.assert_allclose(found["a"], [1 / 4, 2 / 2])


def test_a_hessian_vector_product_is_the_change_of_the_gradient(problem):
    graphdef, params, frozen, options, batch = problem
    step = batches.Step(batch, None)
    rng = np.random.default_rng(1)
    u, v = (
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
        for _ in range(2)
    )

    def product(vector):
        return curvature.hessian_vector_product(
            params, vector, frozen, None, step, tiny.hyper(), graphdef=graphdef, options=options
        )

    def dot(a, b) -> float:
        return sum(np.vdot(x, y) for x, y in zip(tiny.leaves(a), tiny.leaves(b), strict=True))

    hu, hv = product(u), product(v)
    np.testing.assert_allclose(dot(u, hv), dot(v, hu), rtol=1e-3)

    def objective(p) -> jax.Array:
        few = jax.tree.map(lambda a: a[0], batch)
        return impact.example_losses(frozen, few, tiny.hyper(), graphdef, options)(p).sum() / 2

    gradient, h = jax.jit(jax.grad(objective)), 1e-3
    ahead, behind = (
        gradient(jax.tree.map(lambda p, x, s=s: p + s * h * x, params, v)) for s in (1, -1)
    )
    change = jax.tree.map(lambda a, b: (a - b) / (2 * h), ahead, behind)
    scale = np.sqrt(dot(hv, hv))
    assert scale > 0.1
    difference = jax.tree.map(jnp.subtract, hv, change)
    assert np.sqrt(dot(difference, difference)) < 0.05 * scale


def matrix(eigenvalues) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))
    return (q * np.asarray(eigenvalues)) @ q.T


def as_tree(x: np.ndarray) -> dict:
    return {"a": jnp.asarray(x[:2], jnp.float32), "b": jnp.asarray(x[2:], jnp.float32)}


def solve(h: np.ndarray, g: np.ndarray, **changes) -> curvature.Solved:
    def product(v: dict) -> dict:
        return as_tree(h @ np.concatenate([v["a"], v["b"]]))

    values = dict(damping=0.1, iterations=20, tolerance=1e-4) | changes
    return curvature.conjugate_gradients(product, as_tree(g), **values)


def test_conjugate_gradients_solve_the_damped_system():
    h, g = matrix([1, 2, 3, 5, 8, 13]), np.arange(1.0, 7.0)
    found = solve(h, g)
    assert found.restarts == 0 and found.residual <= 1e-4 and found.iterations <= 7
    np.testing.assert_allclose(found.damping, 0.1 * (g @ h @ g) / (g @ g), rtol=1e-4)
    expected = np.linalg.solve(h + found.damping * np.eye(6), g)
    np.testing.assert_allclose(
        np.concatenate([found.tangent["a"], found.tangent["b"]]), expected, rtol=1e-3, atol=1e-4
    )


def test_a_direction_of_negative_curvature_raises_the_damping():
    found = solve(matrix([-2, 1, 2, 3, 5, 8]), np.arange(1.0, 7.0))
    assert found.restarts >= 1 and found.damping > 2 and found.residual <= 1e-4


def test_iterations_are_bounded_and_the_residual_is_told():
    h, g = matrix([1, 2, 3, 5, 8, 13]), np.arange(1.0, 7.0)
    found = solve(h, g, iterations=2)
    x = np.concatenate([found.tangent["a"], found.tangent["b"]])
    left = np.linalg.norm(h @ x + found.damping * x - g) / np.linalg.norm(g)
    assert found.iterations == 2 and found.residual > 1e-4
    np.testing.assert_allclose(found.residual, left, rtol=1e-3)


def test_a_gradient_of_zero_stays_zero():
    found = solve(matrix([1, 2, 3, 5, 8, 13]), np.zeros(6))
    assert found.iterations == 0 and not np.concatenate(tiny.leaves(found.tangent)).any()
    assert isinstance(found.tangent, dict | nnx.State)
