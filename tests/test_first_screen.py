"""What README's first screen says is so, and what it shows is what the quickstart gives.

`.ci/run` does the quickstart before the tests, and a user may have done so by `make quickstart`;
without a run of the config as it is only what needs none is looked at.
"""

import collections
import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from trace_jax import config as config_lib
from trace_jax import triage

ROOT = Path(__file__).resolve().parents[1]
SCREEN = (ROOT / "README.md").read_text().split("\n## Your own model")[0]
ACTIONS = ("INVERT", "PUNISH", "RETAIN", "UNRESOLVED")
MODELS = {"base": "base", "M_ref": "ref", "re-aligned": None}

CONFIG = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
# What it says of the program, and who checks that.
CLAIMS = {
    "INVERT (swap chosen and rejected), PUNISH (both violate it) or RETAIN": "test_triage.py",
    "weighted by how well its gradient\naligns with a global objective": "test_impact.py",
    "one jitted train step minimises": "test_train.py"
    "::test_steps_equal_an_independent_implementation",
    "a model in Hugging Face layout": "test_launch.py"
    "::test_the_exported_model_is_the_trained_one_in_transformers_too",
    "a report of what changed, with intervals": "test_report.py::test_sections_and_their_figures",
    "generates SynthValueBench": "test_synth.py",
    "with any key of": "test_launch.py::test_bad_flags_are_one_line",
    "A finished stage is skipped": "test_launch.py"
    "::test_a_second_run_skips_everything_and_changes_no_file",
    "an interrupted one resumes": "test_launch.py::test_a_killed_training_goes_on_to_the_same_end",
    "is refused with the difference shown": "test_launch.py"
    "::test_a_changed_config_is_refused_with_the_difference",
    "`--redo` does it again, with what depends on it": "test_launch.py"
    "::test_redo_does_that_stage_and_what_depends_on_it",
    "what is done, what runs, and when it will end": "test_status.py"
    "::test_a_training_at_work_has_a_speed_and_an_end",
}


def _run() -> Path | None:
    """CI's finished run, or a user's of configs/quickstart.py as it is now."""
    if (ROOT / "runs" / "ci-quickstart" / "eval.json").exists():
        return ROOT / "runs" / "ci-quickstart"
    path = ROOT / "runs" / "quickstart"
    wanted = json.loads(json.dumps(config_lib.resolved(CONFIG).to_dict()))
    same = (path / "report.html").exists() and wanted == json.loads(
        (path / "config.json").read_text()
    )
    return path if same else None


RUN = _run()
needs_run = pytest.mark.skipif(RUN is None, reason="needs a quickstart: .ci/run, make quickstart")


def shown() -> dict[str, list[str]]:
    """First cell of a table's row -> the others."""
    rows = [line.strip("│").split("│") for line in SCREEN.splitlines() if line.startswith("│")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}


def read(name: str) -> dict:
    return json.loads((RUN / name).read_text())


def test_both_tables_are_there():
    assert {*ACTIONS, *MODELS} <= set(shown())


def test_every_record_of_the_config_is_counted():
    assert sum(int(shown()[action][0]) for action in ACTIONS) == CONFIG.data.pairs


def test_every_claim_is_there_and_has_a_test():
    for claim, test in CLAIMS.items():
        assert claim in SCREEN, claim
        file, _, name = test.partition("::")
        assert f"def {name or 'test_'}" in (ROOT / "tests" / file).read_text(), test


def test_the_tables_have_the_columns_that_a_run_prints(straight):
    def columns(text: str) -> list[list[str]]:
        lines = [line for line in text.splitlines() if line.startswith("┃")]
        return [[cell.strip() for cell in line.strip("┃").split("┃")] for line in lines]

    printed = straight[1].stdout
    assert columns(SCREEN) == columns(printed)[:2]
    for title in ("Triage and weights", "Compliance with the new policy, held-out prompts (test)"):
        assert title in SCREEN and title in printed
    assert set(shown()) <= {
        line.split("│")[1].strip() for line in printed.splitlines() if "│" in line
    }


def test_triage_jsonl_says_of_every_pair_what_and_by_which_clauses(straight):
    for item in triage.read(straight[0] / "triage.jsonl"):
        sides = (item.chosen_verdict, item.rejected_verdict)
        assert item.action == triage.action(*(v.compliant for v in sides))
        for verdict in sides:
            assert verdict.clauses
            by_clause = "violating" in {clause.status for clause in verdict.clauses.values()}
            assert (verdict.status == "violating") == by_clause


def test_how_long_it_takes_is_said_in_one_way():
    pages = ("README.md", "docs/index.md", "docs/getting_started.md", "configs/quickstart.py")
    for page in pages:
        text = (ROOT / page).read_text().split("\n## Your own")[0]
        assert re.findall(r"\w+(?: to \w+)? minutes on \w+ cores", text) == [
            "2 to 5 minutes on 2 cores"
        ], page


PYTHON = """#!/bin/sh
echo "$@" >>{told}
case "$1" in
  -c) exit {old} ;;
  -m) if [ "$2" = venv ]; then /bin/mkdir -p "$3/bin"; /bin/cp "$0" "$3/bin/python"; fi ;;
esac
"""


@pytest.fixture
def bare(tmp_path):
    """A checkout on a machine with a shell, make and one Python, which writes down its orders."""
    if (make := shutil.which("make")) is None:
        pytest.skip("needs make")
    for name in ("Makefile", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    programs, told = tmp_path / "bin", tmp_path / "told"
    programs.mkdir()
    for program in (make, "/bin/sh", *map(shutil.which, ("echo", "touch"))):
        (programs / Path(program).name).symlink_to(program)

    def run(target: str, python: str = "python3.11", old: int = 0):
        for path in programs.glob("python*"):
            path.unlink()
        (programs / python).write_text(PYTHON.format(told=told, old=old))
        (programs / python).chmod(0o755)
        told.write_text("")
        environment = {"PATH": str(programs), "HOME": str(tmp_path)}
        done = subprocess.run(
            [make, target], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done, [line for line in told.read_text().splitlines() if line[:2] != "-c"]

    return run


@pytest.mark.parametrize("python", ["python3.11", "python3.12", "python3.13", "python3"])
def test_python_and_make_are_enough(bare, python):
    done, told = bare("quickstart", python)
    assert done.returncode == 0, done.stderr
    by_hand = re.search(r"^python (-m trace_jax.launch .*)$", SCREEN, re.MULTILINE)[1]
    assert told == ["-m venv .venv", "-m pip install -qq -c constraints.txt -e .[test]", by_hand]
    _, again = bare("quickstart", python)
    assert again == [by_hand]  # .venv is there
    _, tests = bare("test", python)
    assert [line.split()[1] for line in tests] == ["ruff", "ruff", "pytest"]


def test_an_older_python_is_told(bare):
    done, told = bare("quickstart", "python3", old=1)
    assert done.returncode and told == []
    assert "trace_jax needs Python 3.11 or newer" in done.stderr


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
