"""What README's first screen shows is what the quickstart gives.

`.ci/run` does the quickstart before the tests; without it only what needs no run is looked at.
"""

import collections
import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "runs" / "ci-quickstart"
SCREEN = (ROOT / "README.md").read_text().split("\n## Your own model")[0]
ACTIONS = ("INVERT", "PUNISH", "RETAIN", "UNRESOLVED")
MODELS = {"base": "base", "M_ref": "ref", "re-aligned": None}

needs_run = pytest.mark.skipif(
    not (RUN / "eval.json").exists(), reason="runs/ci-quickstart is made by .ci/run"
)


def shown() -> dict[str, list[str]]:
    """First cell of a table's row -> the others."""
    rows = [line.strip("│").split("│") for line in SCREEN.splitlines() if line.startswith("│")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}


def read(name: str) -> dict:
    return json.loads((RUN / name).read_text())


def test_both_tables_are_there():
    assert {*ACTIONS, *MODELS} <= set(shown())


def test_every_record_of_the_config_is_counted():
    config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    assert sum(int(shown()[action][0]) for action in ACTIONS) == config.data.pairs


@needs_run
def test_triage_and_weights_are_those_of_the_run():
    lines = (RUN / "triage.jsonl").read_text().splitlines()
    counts = collections.Counter(json.loads(line)["action"] for line in lines)
    weighed = read("impact_summary.json")["per_action"]
    for action in ACTIONS:
        n, scored, clamped, weight, stability = shown()[action]
        assert int(n) == counts[action]
        if action in weighed:
            figures = weighed[action]
            assert int(scored) == figures["n"]
            assert int(clamped.strip("%")) == pytest.approx(100 * figures["clamped_share"], abs=2)
            assert float(weight) == pytest.approx(figures["mean_weight"], abs=0.03)
            assert float(stability) == pytest.approx(figures["stability"], abs=0.05)


@needs_run
def test_figures_are_those_of_the_run():
    found = read("eval.json")
    columns = ("compliance_guarded", "compliance", "compliance_greedy")
    for name, key in MODELS.items():
        of = found if key is None else found[key]
        *cells, perplexity = shown()[name]
        for cell, column in zip(cells, columns, strict=True):
            rate, low, high = map(float, re.findall(r"[\d.]+", cell))
            assert low < rate < high
            assert rate == pytest.approx(100 * of[column]["rate"], abs=4), (name, column)
        assert float(perplexity) == pytest.approx(of["perplexity"], abs=0.1)
    assert found["compliance_guarded"]["low"] > found["ref"]["compliance_guarded"]["high"]


@needs_run
def test_the_run_ends_with_a_report_and_a_model_in_hugging_face_layout():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    network = transformers.AutoModelForCausalLM.from_pretrained(RUN / "model")
    said = float(re.search(r"a ([\d.]+)M-parameter decoder", SCREEN).group(1))
    assert round(network.num_parameters() / 1e6, 1) == said
    report = (RUN / "report.html").read_text()
    found = read("eval.json")["compliance_guarded"]
    assert f"{100 * found['low']:.1f}–{100 * found['high']:.1f} %" in report
