"""Every loss against numbers worked out by hand, and the chunked head against the whole one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax import losses


def test_logistic_preference_by_hand():
    # beta (r0 - r1) = 0.5 * (1 - 3) = -1: -log sigma(-1) = log(1 + e)
    loss_B = losses.logistic_preference(jnp.array([1.0, 0.0]), jnp.array([3.0, 0.0]), 0.5)
    np.testing.assert_allclose(loss_B, [math.log(1 + math.e), math.log(2)], rtol=1e-6)


def test_squared_preference_by_hand():
    # (r0 - r1 - 1 / (2 tau))^2 with tau = 0.25: (2 - 2)^2 = 0 and (-1 - 2)^2 = 9
    loss_B = losses.squared_preference(jnp.array([3.0, 0.0]), jnp.array([1.0, 1.0]), 0.25)
    np.testing.assert_allclose(loss_B, [0.0, 9.0], atol=1e-6)


@pytest.mark.parametrize(("scale", "factor"), [("plain", 1.0), ("two_over_beta", 4.0)])
def test_npo_by_hand(scale, factor):
    # -log sigma(-0.5 * 2) = log(1 + e); the NPO paper's scale multiplies by 2 / 0.5 = 4
    loss_B = losses.npo(jnp.array([2.0]), 0.5, scale)
    np.testing.assert_allclose(loss_B, [factor * math.log(1 + math.e)], rtol=1e-6)


def test_npo_of_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="two_over_beta"):
        losses.npo(jnp.zeros(1), 0.1, "half")


def test_losses_stay_finite_far_out():
    far = jnp.array([1e4, -1e4])
    for loss_B in (losses.logistic_preference(far, -far, 1.0), losses.npo(far, 1.0)):
        assert np.isfinite(loss_B).all()
    gradient = jax.grad(lambda r: losses.logistic_preference(r, -r, 1.0).sum())(far)
    np.testing.assert_allclose(gradient, [0.0, -2.0], atol=1e-6)


def test_forward_kl_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): KL(p || q) = 0.5 log 2 + 0.5 log(2/3)
    ref = jnp.log(jnp.array([[[0.5, 0.5], [0.5, 0.5]]]))
    logits = jnp.log(jnp.array([[[0.25, 0.75], [0.5, 0.5]]]))
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    np.testing.assert_allclose(
        losses.forward_kl(ref, logits, jnp.array([[1, 1]])), [expected / 2], rtol=1e-5
    )
    np.testing.assert_allclose(
        losses.forward_kl(ref, logits, jnp.array([[1, 0]])), [expected], rtol=1e-5
    )
    np.testing.assert_allclose(losses.forward_kl(ref, logits, jnp.array([[0, 0]])), [0.0])


@pytest.mark.parametrize("share", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("chunk_bytes", [4 * 50 * 128, 2**30])
def test_chunked_head_equals_whole_head(monkeypatch, chunk_bytes, share):
    """Values, gradients and jvp through hidden states and kernel, with an uneven last chunk."""
    monkeypatch.setattr(losses, "_CHUNK_BYTES", chunk_bytes)
    keys = jax.random.split(jax.random.key(0), 5)
    B, L, D, V = 3, 71, 8, 50  # 213 tokens: two chunks of 107 where a chunk is at most 128
    hidden, ref = jax.random.normal(keys[0], (B, L, D)), jax.random.normal(keys[1], (B, L, D))
    kernel, targets = jax.random.normal(keys[2], (D, V)), jax.random.randint(keys[3], (B, L), 0, V)
    counts = jax.random.uniform(keys[4], (B, L)) < share

    def chunked(hidden, kernel):
        head = lambda h: h @ kernel  # noqa: E731
        kl = losses.token_kl(lambda h: h @ kernel * 0.5, ref, head, hidden, counts)
        return losses.token_logprobs(head, hidden, targets, counts) + kl

    def whole(hidden, kernel):
        logp = jax.nn.log_softmax(hidden @ kernel)
        ref_logp = jax.lax.stop_gradient(jax.nn.log_softmax(ref @ kernel * 0.5))
        kl = jnp.sum(jnp.exp(ref_logp) * (ref_logp - logp), axis=-1)
        both = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0] + kl
        return jnp.where(counts, both, 0.0)

    args = (hidden, kernel)
    np.testing.assert_allclose(chunked(*args), whole(*args), rtol=2e-5, atol=2e-5)
    for a, b in zip(
        *(jax.grad(lambda *x, f=f: f(*x).sum(), (0, 1))(*args) for f in (chunked, whole)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    tangent = jax.tree.map(jnp.ones_like, args)
    for a, b in zip(*(jax.jvp(f, args, tangent) for f in (chunked, whole)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_reference_of_kl_has_no_gradient():
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 8))
    kernel = jax.random.normal(jax.random.key(1), (8, 50))

    def kl(ref, hidden):
        return losses.token_kl(lambda h: h @ kernel, ref, lambda h: h @ kernel, hidden,
                               jnp.ones((2, 3), bool)).sum()  # fmt: skip

    of_ref, of_model = jax.grad(kl, (0, 1))(hidden, hidden[::-1])
    assert not np.any(of_ref) and np.abs(of_model).max() > 0.1


def test_chunks_of_prompts_and_padding_have_no_logits(monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_BYTES", 4 * 50 * 128)
    made = []

    def head(hidden):
        jax.debug.callback(lambda: made.append(1))
        return hidden @ jnp.ones((8, 50))

    hidden, targets = jnp.ones((4, 256, 8)), jnp.zeros((4, 256), jnp.int32)
    for share, chunks in ((1.0, 8), (0.3, 3), (0.0, 0)):
        made.clear()
        counts = jnp.broadcast_to(jnp.arange(256)[None] >= 256 * (1 - share), (4, 256))
        jax.block_until_ready(losses.token_logprobs(head, hidden, targets, counts))
        jax.effects_barrier()
        assert len(made) == chunks


def test_chunked_head_never_holds_all_logits():
    """2,048 tokens, 32,768 words: the gradient needs far less than one [B, L, V] array (268 MB)."""
    hidden, kernel = jnp.zeros((1, 2048, 8)), jnp.zeros((8, 32768))
    targets = jnp.zeros((1, 2048), jnp.int32)

    def loss(hidden, kernel):
        return losses.token_logprobs(lambda h: h @ kernel, hidden, targets, targets == 0).sum()

    memory = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, kernel).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2048 * 32768 * 4 / 3
