"""Stage train between its steps: weights taken anew, evaluation, early stop, U2A's rounds."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from trace_jax import launch, records

STAGES = "--stages=baseline,correct,impact,train"


@pytest.fixture
def run(straight, config, tmp_path):
    """Stage train and what it needs, anew, with flags; returns (exit code, the workdir)."""
    path = Path(shutil.copytree(straight[0], tmp_path / "run"))

    def go(*flags: str, redo: bool = True) -> tuple[int, Path]:
        command = ["launch", f"--config={config}", f"--workdir={path}", STAGES, *flags]
        return launch.main(command + ["--redo"] * redo), path

    return go


def _rows(path: Path, kind: str) -> list[dict]:
    return [row for _, row in records.read_jsonl(path / "pauses.jsonl") if row["kind"] == kind]


def _trained_ids(path: Path) -> dict[str, float]:
    return {r["id"]: r["weight"] for _, r in records.read_jsonl(path / "impact.jsonl")}


def test_u2a_selects_once_and_moves_its_weights_every_round(run):
    code, path = run(
        "--config.train.method=u2a", "--config.u2a.rounds=2", "--config.u2a.top=9",
        "--config.u2a.eta=5.0",
    )  # fmt: skip
    assert code == 0
    first = {i: w for i, w in _trained_ids(path).items() if w}
    assert len(first) == 9 and sum(first.values()) == pytest.approx(9)
    (row,) = _rows(path, "weights")
    second = {i: w for i, _, w in row["weights"]}
    assert row["step"] == 2 and second.keys() == first.keys()
    assert sum(second.values()) == pytest.approx(9) and second != pytest.approx(first)
    gold = {p["id"] for p in records.read_json(path / "gold.json")["pairs"]}
    assert not gold & first.keys()


def test_weights_are_taken_anew_and_the_model_is_evaluated_on_validation(run, capsys):
    flags = (
        "--config.train.refresh_every=3", "--config.train.evaluate_every=2",
        "--config.train.evaluate_prompts=5", "--config.evaluate.splits=test,validation",
    )  # fmt: skip
    code, path = run(*flags)
    assert code == 0
    (weights,), (evaluation,) = _rows(path, "weights"), _rows(path, "evaluation")
    assert weights["step"] == 3 and evaluation["step"] == 2 and evaluation["prompts"] == 5
    again = {i: w for i, _, w in weights["weights"]}
    before = _trained_ids(path)
    assert again.keys() == before.keys() and again != pytest.approx(before)
    for name in ("compliance_guarded", "compliance", "kept", "kept_ref"):
        assert 0 <= evaluation[name] <= 1
    assert evaluation["perplexity"] > 1
    capsys.readouterr()
    assert run(*flags, redo=False)[0] == 0
    assert "[train] done before, skipped" in capsys.readouterr().err


def test_training_that_breaks_what_is_kept_ends_at_the_evaluation_before(run, capsys, monkeypatch):
    """A step size that destroys the model between the first and the second evaluation."""
    from trace_jax.stages import pauses

    kept = iter([1.0, 0.0])
    of = pauses._Evaluation.of
    monkeypatch.setattr(
        pauses._Evaluation, "of",
        lambda *args: of(*args) | {"kept": next(kept), "kept_ref": 1.0},
    )  # fmt: skip
    code, path = run(
        "--config.train.evaluate_every=1", "--config.evaluate.splits=test,validation",
        "--config.train.stop_below=0.5",
    )  # fmt: skip
    assert code == 0
    assert "step 2: 0% of the samples keep what does not change" in capsys.readouterr().err
    mark = records.read_json(path / ".stages" / "train.json")
    assert mark["summary"]["stopped_at"] == 2
    assert [r["step"] for r in _rows(path, "evaluation")] == [1, 2]


BEST = (
    "--config.train.evaluate_every=1", "--config.evaluate.splits=test,validation",
    "--config.train.keep_best=True", "--config.train.save_every=1",
)  # fmt: skip


def _scripted(monkeypatch, guarded: dict[int, float], perplexity: dict[int, float]) -> None:
    """Evaluations of these figures instead of the model's own, by step."""
    from trace_jax.stages import pauses

    of = pauses._Evaluation.of
    monkeypatch.setattr(
        pauses._Evaluation, "of",
        lambda self, module, step: of(self, module, step) | {
            "compliance_guarded": guarded[step], "perplexity": perplexity[step],
            "perplexity_ref": 2.0,
        },
    )  # fmt: skip


def _weights(path: Path) -> dict[str, np.ndarray]:
    return load_file(path / "model" / "model.safetensors")


def test_the_best_evaluation_within_the_limit_is_what_a_run_ends_with(run, monkeypatch, capsys):
    """Step 2 is the best of those whose perplexity is at most 1.1 times M_ref's."""
    _scripted(monkeypatch, {1: 0.5, 2: 0.7, 3: 0.9, 4: 0.6}, {1: 2, 2: 2.1, 3: 2.5, 4: 2})
    code, path = run(*BEST, "--config.train.total_steps=4", f"{STAGES},evaluate,export")
    assert code == 0
    summary = records.read_json(path / ".stages" / "train.json")["summary"]
    assert summary["kept_step"] == 2 and "kept: step 2 of 4" in capsys.readouterr().err
    kept = _weights(path)
    # Another process takes it from disk.
    shutil.rmtree(path / "model")
    assert run(*BEST, "--config.train.total_steps=4", "--stages=export", redo=True)[0] == 0
    again = _weights(path)
    assert all(np.array_equal(kept[k], again[k]) for k in kept)
    assert (path / "checkpoints" / "stopped.json").exists()
    _scripted(monkeypatch, {1: 0.5, 2: 0.7, 3: 0.9}, {1: 2, 2: 2.1, 3: 2})
    assert run(*BEST, "--config.train.total_steps=3")[0] == 0
    assert records.read_json(path / ".stages" / "train.json")["summary"]["kept_step"] == 3
    assert not (path / "checkpoints" / "stopped.json").exists()


def test_a_run_ends_after_evaluations_over_the_limit_in_a_row(run, monkeypatch, capsys):
    figures = {1: 0.5, 2: 0.7, 3: 0.8, 4: 0.6, 5: 0.9}
    _scripted(monkeypatch, figures, {1: 2.5, 2: 2.0, 3: 2.5, 4: 2.5, 5: 2.0})
    flags = (*BEST, "--config.train.total_steps=6", "--config.train.patience=2")
    code, path = run(*flags)
    assert code == 0 and "step 4: perplexity over the limit 2 times" in capsys.readouterr().err
    summary = records.read_json(path / ".stages" / "train.json")["summary"]
    assert (summary["stopped_at"], summary["kept_step"]) == (4, 2)
    assert [row["step"] for row in _rows(path, "evaluation")] == [1, 2, 3, 4]


def test_a_run_that_never_keeps_the_limit_goes_on_to_the_least_perplexity(run, monkeypatch):
    _scripted(monkeypatch, dict.fromkeys((1, 2, 3), 0.5), {1: 4.0, 2: 3.0, 3: 2.5})
    code, path = run(*BEST, "--config.train.total_steps=3", "--config.train.patience=1")
    assert code == 0
    assert records.read_json(path / ".stages" / "train.json")["summary"]["kept_step"] == 3


def test_the_best_of_evaluations():
    from trace_jax.stages import pauses

    def row(step, guarded, perplexity):
        return {"step": step, "compliance_guarded": guarded, "perplexity": perplexity,
                "perplexity_ref": 2.0}  # fmt: skip

    rows = [row(1, 0.3, 2.0), row(2, 0.6, 2.2), row(3, 0.6, 2.0), row(4, 0.9, 2.3)]
    assert pauses.best(rows, 1.1)["step"] == 2
    assert pauses.best(rows, 1.2)["step"] == 4
    assert pauses.best(rows, 0.5)["step"] == 1  # all are over: the least perplexity, the first


def test_a_run_killed_after_its_best_step_still_ends_with_it(run, monkeypatch):
    """The state that was kept outlives the process, and so does why."""
    from trace_jax.stages import pauses

    figures = {1: 0.5, 2: 0.7, 3: 0.6, 4: 0.6}, dict.fromkeys((1, 2, 3, 4), 2.0)
    _scripted(monkeypatch, *figures)
    call = pauses.Pauses.__call__

    def killed(self, step, module, examples):
        if step == 3 and module is not None:
            raise KeyboardInterrupt
        return call(self, step, module, examples)

    with monkeypatch.context() as once:
        once.setattr(pauses.Pauses, "__call__", killed)
        run(*BEST, "--config.train.total_steps=4")
    code, path = run(*BEST, "--config.train.total_steps=4", redo=False)
    assert code == 0
    assert records.read_json(path / ".stages" / "train.json")["summary"]["kept_step"] == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--config.train.evaluate_every=2",), "evaluate.splits=test,validation"),
        (("--config.train.stop_below=0.5",), "set train.evaluate_every=N"),
        (("--config.train.keep_best=True",), "set train.evaluate_every=N"),
        (("--config.train.perplexity_limit=0",), "greater than 0"),
        (("--config.train.refresh_every=-1",), "is a number of steps"),
        (("--config.u2a.inner=sgd",), "one of npo, ga, graddiff"),
        (("--config.impact.curvature=kfac",), "one of identity, fisher_diag, cg"),
        (("--config.impact.reliability_examples=-1",), "is a number of conflicts; 0: all"),
        (("--config.impact.damping=0",), "greater than 0"),
    ],
)
def test_bad_settings_are_one_line(run, capsys, flags, said):
    code, _ = run(*flags)
    err = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(err) == 1 and said in err[0]


@pytest.mark.parametrize("kind", ["fisher_diag", "cg"])
def test_scores_along_another_curvature(run, straight, kind):
    code, path = run(f"--config.impact.curvature={kind}", "--config.impact.curvature_examples=8")
    assert code == 0
    summary = records.read_json(path / "impact_summary.json")
    assert summary["curvature"]["kind"] == kind
    assert len(summary["curvature"]["solved"]) == (2 if kind == "cg" else 0)
    assert _trained_ids(path) != pytest.approx(_trained_ids(straight[0]))


def test_a_preset_is_its_method_with_its_settings(run):
    code, path = run("--config.train.method=trace_paper")
    assert code == 0
    scored = [r for _, r in records.read_jsonl(path / "impact.jsonl") if not r["gold"]]
    assert sum(r["weight"] for r in scored) == pytest.approx(1)
    assert records.read_json(path / ".stages" / "train.json")["inputs"]["train.beta"] == 0.3
