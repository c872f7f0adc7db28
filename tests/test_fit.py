"""A whole training run on texts: what it changes, what it keeps, what it leaves on disk."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from trace_jax import batches, fit, metrics
from trace_jax.errors import InputError
from trace_jax.models import lora

TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9))
EXAMPLES = tiny.conversations()


@pytest.fixture(scope="module")
def base():
    return tiny.module()


@pytest.fixture(scope="module")
def run_all(base, tmp_path_factory):
    """A run with adapters everywhere: (directory, fitted, the module before the merge)."""
    directory = tmp_path_factory.mktemp("all")
    with pytest.MonkeyPatch.context() as patch:
        seen, merge = [], lora.merge
        patch.setattr(lora, "merge", lambda module: seen.append(module) or merge(module))
        fitted = tiny.fit(base, directory)
    return directory, fitted, seen[0]


def changed(fitted, base) -> set[str]:
    """Names of the projections whose kernels differ, and of other leaves as paths."""
    out = set()
    pairs = zip(
        *(jax.tree_util.tree_leaves_with_path(nnx.state(m)) for m in (fitted, base)), strict=True
    )
    for (path, a), (_, b) in pairs:
        if not np.array_equal(a, b):
            out.add(jax.tree_util.keystr(path))
    return out


def kernels(*names: str) -> set[str]:
    return {f"['layers']['{name}']['kernel'].value" for name in names}


def test_adapters_change_only_what_they_adapt(base, run_all, tmp_path):
    fitted = tiny.fit(base, tmp_path, lora_targets="q, v")
    assert changed(fitted.module, base) == kernels("q", "v")
    assert changed(run_all[1].module, base) == kernels(*lora.TARGETS)


def test_merged_module_predicts_as_with_adapters_on(base, run_all):
    _, fitted, with_adapters = run_all
    assert with_adapters.layers.q.lora_a is not None and fitted.module.layers.q.lora_a is None
    on, merged, before = (
        jax.jit(lambda m: m(TOKENS))(m) for m in (with_adapters, fitted.module, base)
    )
    np.testing.assert_allclose(merged, on, atol=2e-5)
    assert np.abs(on - before).max() > 1e-2


def test_full_fine_tuning_changes_every_kernel_and_not_the_module_given(base, tmp_path):
    before = tiny.leaves(nnx.state(tiny.module()))
    fitted = tiny.fit(base, tmp_path, adapters="none")
    tiny.assert_same(nnx.state(base), before)
    assert len(changed(fitted.module, base)) == len(before)
    tiny.assert_same(
        nnx.state(fit.restore(base, tiny.settings(adapters="none"), tmp_path / "checkpoints")),
        nnx.state(fitted.module),
    )


def test_restore_equals_the_fitted_module(base, run_all):
    directory, fitted, _ = run_all
    restored = fit.restore(base, tiny.settings(), directory / "checkpoints")
    tiny.assert_same(nnx.state(restored), nnx.state(fitted.module))


def test_restore_of_a_run_that_is_not_done_is_refused(base, run_all, tmp_path):
    longer = tiny.settings(total_steps=9)
    with pytest.raises(InputError, match="step 6, not 9"):
        fit.restore(base, longer, run_all[0] / "checkpoints")
    with pytest.raises(InputError, match="step 0, not 6"):
        fit.restore(base, tiny.settings(), tmp_path)


def test_metrics_have_a_line_a_step_and_training_works(run_all):
    directory, fitted, _ = run_all
    rows = metrics.read_metrics(directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and fitted.steps_run == 6
    assert rows[-1]["loss/preference"] < rows[0]["loss/preference"]
    assert rows[0]["train/kl"] < 1e-6 < rows[-1]["train/kl"]  # theta begins at theta_ref
    np.testing.assert_allclose(rows[0]["train/logratio_0"], 0, atol=1e-4)
    assert 0 < fitted.real_token_share < 1


def test_a_finished_run_runs_no_step_again(base, run_all):
    directory, fitted, _ = run_all
    again = tiny.fit(base, directory)
    assert again.steps_run == 0
    tiny.assert_same(nnx.state(again.module), nnx.state(fitted.module))


def test_reference_log_probs_are_kept_and_made_again_for_other_texts(base, tmp_path, monkeypatch):
    encoder = tiny.encoder()
    encoded = batches.encode_examples(encoder, EXAMPLES[:3])[1]
    calls, of_texts = [], fit.logprobs.of_texts
    monkeypatch.setattr(
        fit.logprobs, "of_texts", lambda *a, **k: calls.append(1) or of_texts(*a, **k)
    )

    def compute(texts):
        return fit.reference_logprobs(base, texts, 64, 2, tmp_path / "run", tiny.quiet)

    first = compute(encoded)
    np.testing.assert_allclose(first, tiny.reference(base, encoded), atol=1e-5)
    np.testing.assert_array_equal(compute(encoded), first)
    assert len(calls) == 1
    np.testing.assert_allclose(compute(encoded[::-1]), first[::-1], atol=1e-5)
    skipping = dataclasses.replace(encoded[0], skip=(1, 0))
    assert compute([skipping, *encoded[1:]])[0, 0] > first[0, 0]
    assert len(calls) == 3


def test_nothing_to_train_on_is_refused(base, tmp_path):
    with pytest.raises(InputError, match="no examples to train on"):
        tiny.fit(base, tmp_path, examples=[])


def test_too_long_examples_are_dropped_by_name(base, tmp_path):
    long = dataclasses.replace(EXAMPLES[0], record_id="long", y0="c" * 99)
    dropped = []
    with pytest.raises(InputError, match="no examples to train on"):
        tiny.fit(base, tmp_path, examples=[long], on_drop=dropped.append)
    assert dropped == ["long"]
    with pytest.raises(InputError, match="record long"):
        tiny.fit(base, tmp_path, examples=[long])
