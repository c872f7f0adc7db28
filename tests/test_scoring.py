"""Scores of a run's conflicts, and how their reliability is sampled."""

import runpy

import numpy as np
import pytest

from trace_jax import config as config_lib
from trace_jax import impact, workdir
from trace_jax.stages import context, scoring
from trace_jax.stages import impact as impact_stage

FEW = 5


@pytest.fixture(scope="module")
def run(straight, config):
    """Settings -> a context over the finished run."""
    settings = runpy.run_path(str(config))["get_config"]()

    def make(**changes) -> context.Context:
        own = {f"impact.{key}": value for key, value in changes.items()}
        of_run = config_lib.resolved(config_lib.with_overrides(settings, own))
        return context.Context(of_run, workdir.Workdir(straight[0]))

    return make


def scored(run: context.Context, gold=None) -> tuple[scoring.Scores, list]:
    examples, encoded, drawn, _ = impact_stage.objective(run)
    gold = drawn[: len(drawn) // 4 * 4] if gold is None else gold
    return scoring.scores(run, examples, encoded, gold), gold


@pytest.mark.parametrize("path", impact.PATHS)
def test_reliability_takes_some_conflicts_and_no_other_program(run, path):
    everything, gold = scored(run(path=path, reliability_examples=0))
    program = scoring._BY_LOSS.get(path, impact.response_derivatives)
    compiled = program._cache_size()
    few, _ = scored(run(path=path, reliability_examples=FEW))
    assert program._cache_size() == compiled
    n = len(everything.along_J)
    assert n > FEW == len(few.checked) == len(few.halves)
    assert everything.checked.tolist() == list(range(n))
    np.testing.assert_array_equal(few.along_J, everything.along_J)
    scale = np.abs(everything.halves).max()
    np.testing.assert_allclose(
        few.halves, everything.halves[few.checked], rtol=1e-4, atol=1e-5 * scale
    )
    for half in (0, 1):  # the gold batch's halves, each as a gold batch of its own
        alone, _ = scored(run(path=path, reliability_examples=1), gold[half::2])
        np.testing.assert_allclose(
            everything.halves[:, half], alone.along_J, rtol=1e-4, atol=1e-4 * scale
        )


def test_stability_is_of_the_examples_asked_for():
    halves = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [5.0, 7.0], [6.0, 6.5], [7.0, 6.0]])
    scores = scoring.Scores(np.zeros(8), np.array([0, 1, 2, 5, 6, 7]), halves, [])
    assert scores.stability(np.arange(8) < 4) == pytest.approx(1.0)
    assert scores.stability(np.arange(8) >= 4) == pytest.approx(-1.0)
