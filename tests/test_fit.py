"""A whole training run on texts: what it changes, what it keeps, what it leaves on disk."""

import dataclasses
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from orbax.checkpoint import v1 as ocp

from trace_jax import batches, best, checkpoints, feed, fit, metrics, train
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
    calls, of_texts = [], feed.logprobs.of_texts
    monkeypatch.setattr(
        feed.logprobs, "of_texts", lambda *a, **k: calls.append(1) or of_texts(*a, **k)
    )

    def compute(texts, of=""):
        kept = feed.Kept(tmp_path / "run", of)
        return feed.reference_logprobs(base, texts, 64, 2, kept, tiny.quiet)

    first = compute(encoded)
    np.testing.assert_allclose(first, tiny.reference(base, encoded), atol=1e-5)
    np.testing.assert_array_equal(compute(encoded), first)
    assert len(calls) == 1
    np.testing.assert_allclose(compute(encoded[::-1]), first[::-1], atol=1e-5)
    skipping = dataclasses.replace(encoded[0], skip=(1, 0))
    assert compute([skipping, *encoded[1:]])[0, 0] > first[0, 0]
    assert len(calls) == 3
    for texts in (encoded, encoded[::-1], encoded):  # a folder that runs share has room for each
        compute(texts, of="one M_ref")
    assert len(calls) == 5
    compute(encoded, of="another")
    assert len(calls) == 6


@pytest.mark.fault
@pytest.mark.parametrize("damage", [
    lambda whole: b"",
    lambda whole: whole[: len(whole) // 2],
    lambda whole: bytes(len(whole)),
    lambda whole: whole.replace(b"key.npy", b"kex.npy"),
    lambda whole: whole.replace(b"NUMPY", b"NUMPZ"),
])  # fmt: skip
def test_reference_log_probs_that_a_power_cut_damaged_are_made_again(
    base, tmp_path, capsys, damage
):
    encoded = batches.encode_examples(tiny.encoder(), EXAMPLES[:3])[1]
    path = tmp_path / "reference_logprobs.npz"

    def compute():
        return feed.reference_logprobs(base, encoded, 64, 2, feed.Kept(tmp_path), tiny.quiet)

    first, whole = compute(), path.read_bytes()
    path.write_bytes(damage(whole))
    np.testing.assert_array_equal(compute(), first)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"  warning: {path} is damaged; its log-probs are computed anew"
    np.testing.assert_array_equal(compute(), first)
    assert capsys.readouterr().err == ""


@pytest.mark.fault
def test_what_belongs_to_a_checkpoint_is_on_the_disk_before_it(base, tmp_path, monkeypatch):
    """Metrics of its steps, and log-probs of theta_ref."""
    synced, fsync, seen = {}, os.fsync, []

    def watched_fsync(descriptor):
        fsync(descriptor)
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        synced[name] = os.fstat(descriptor).st_size

    def watched_save(self, step, *arguments, do=checkpoints.Checkpoints.save):
        rows = tmp_path / "metrics.jsonl"
        assert rows.read_text().count("\n") == step
        assert synced["metrics.jsonl"] == rows.stat().st_size
        (kept,) = (tmp_path / "checkpoints").glob("*.npz")
        assert synced[f"reference_logprobs.{os.getpid()}.tmp.npz"] == kept.stat().st_size
        seen.append(step)
        do(self, step, *arguments)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(checkpoints.Checkpoints, "save", watched_save)
    tiny.fit(base, tmp_path)
    assert seen and seen[-1] == 6


@pytest.mark.fault
def test_what_a_pause_told_is_written_before_the_run_goes_on(base, tmp_path, monkeypatch):
    order = []

    class Telling(Pauses):
        def __call__(self, step, module, examples):
            order.append(f"pause {step}")
            return super().__call__(step, module, examples)

        def keeps(self, step):
            order.append("goes on")
            return super().keeps(step)

    monkeypatch.setattr(fit.tracking, "flush", lambda: order.append("flush"))
    tiny.fit(base, tmp_path, pauses=Telling(3))
    at = order.index("pause 3")
    assert order[at : at + 3] == ["pause 3", "flush", "goes on"]


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


class Pauses:
    """Doubles every coefficient at each pause; stops at `stop`; tells what it was asked."""

    def __init__(self, *steps: int, stop: int | None = None, good: tuple[int, ...] = ()):
        self.steps, self.stop, self.good, self.asked = steps, stop, good, []

    def __call__(self, step, module, examples):
        self.asked.append((step, module is not None))
        if step == self.stop:
            return None
        return [dataclasses.replace(e, pref=2 * e.pref, npo0=2 * e.npo0) for e in examples]

    def keeps(self, step):
        return step in self.good


def losses(directory) -> list[float]:
    return [row["loss/preference"] for row in metrics.read_metrics(directory / "metrics.jsonl")]


def test_a_pause_changes_the_coefficients_from_there_on(base, run_all, tmp_path):
    pauses = Pauses(3)
    tiny.fit(base, tmp_path, pauses=pauses)
    straight, found = losses(run_all[0]), losses(tmp_path)
    assert pauses.asked == [(3, True)]
    assert found[:3] == straight[:3] and found[3] == pytest.approx(2 * straight[3], rel=1e-5)


@pytest.mark.fault
@pytest.mark.parametrize("killed_at", [1, 3, 4])
def test_a_run_with_pauses_goes_on_as_it_would_have(base, tmp_path, monkeypatch, killed_at):
    straight = tiny.fit(base, tmp_path / "straight", pauses=Pauses(2, 4))
    step, calls = train.train_step, []

    def dies(*args, **kwargs):
        calls.append(None)
        if len(calls) > killed_at:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        tiny.fit(base, tmp_path / "killed", pauses=Pauses(2, 4))
    monkeypatch.undo()
    again = Pauses(2, 4)
    found = tiny.fit(base, tmp_path / "killed", pauses=again)
    past = {1: [], 3: [(2, True)], 4: [(2, False)]}[killed_at]
    assert again.asked == (past or [(2, True)]) + [(4, True)]
    tiny.assert_same(nnx.state(found.module), nnx.state(straight.module))
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")


def test_a_pause_that_stops_gives_the_model_of_the_one_before(base, tmp_path):
    fitted = tiny.fit(base, tmp_path, pauses=Pauses(2, 4, stop=4, good=(2, 4)))
    assert fitted.stopped_at == 4 and fitted.steps_run == 4
    # A pause between that was not found good does not count.
    shorter = tiny.fit(base, tmp_path / "other", pauses=Pauses(2, 3, 5, stop=5, good=(2, 5)))
    assert shorter.stopped_at == 5
    tiny.assert_same(nnx.state(fitted.module), nnx.state(shorter.module))
    restored = fit.restore(base, tiny.settings(), tmp_path / "checkpoints")
    tiny.assert_same(nnx.state(restored), nnx.state(fitted.module))
    with checkpoints.Checkpoints(tmp_path / "checkpoints" / best.FOLDER, keep=1) as good:
        assert good.latest_step == 2
    about = ocp.metadata(tmp_path / "checkpoints" / best.FOLDER / "2", "state").custom_metadata
    assert about["shapes"] and not [k for k in about["shapes"] if "opt_state" in k]
    shutil.rmtree(tmp_path / "checkpoints" / best.FOLDER)
    with pytest.raises(InputError, match="best is missing: .*train anew with --redo"):
        fit.restore(base, tiny.settings(), tmp_path / "checkpoints")


def test_a_first_pause_that_stops_leaves_nothing_to_go_back_to(base, tmp_path):
    with pytest.raises(InputError, match="before its first evaluation .step 2."):
        tiny.fit(base, tmp_path, pauses=Pauses(2, stop=2, good=(2,)))


@pytest.mark.fault
def test_steps_with_nan_gradients_are_left_out_and_counted_or_end_the_run(base, tmp_path):
    """One record gives a gradient that is not a number whenever its turn comes."""
    examples = list(EXAMPLES)
    examples[1] = dataclasses.replace(examples[1], pref=float("nan"))
    fitted = tiny.fit(base, tmp_path / "all", examples=examples, skip_steps=99)
    rows = metrics.read_metrics(tmp_path / "all" / "metrics.jsonl")
    skipped = [row["step"] for row in rows if row["train/skipped"]]
    assert len(rows) == 6 and len(skipped) == 2
    assert all(np.isfinite(leaf).all() for leaf in tiny.leaves(nnx.state(fitted.module)))
    for _ in range(2):  # a second try counts those of the first
        with pytest.raises(InputError, match=f"step {skipped[1]}: .*let train.skip_steps be more"):
            tiny.fit(base, tmp_path / "one", examples=examples, skip_steps=1)
    again = tiny.fit(base, tmp_path / "one", examples=examples, skip_steps=99)
    tiny.assert_same(nnx.state(again.module), nnx.state(fitted.module))
