"""Gemini through the programs that people run, against a server on loopback."""

import json
import shutil
from pathlib import Path

import gemini_client
import pytest

from trace_jax import launch, records, stages, workdir
from trace_jax.judges import __main__ as commands


@pytest.fixture
def server(monkeypatch):
    with gemini_client.running() as address:
        for name, value in gemini_client.environment(address).items():
            monkeypatch.setenv(name, value)
        yield address


@pytest.fixture
def run(straight, tmp_path):
    folder = Path(shutil.copytree(straight[0], tmp_path / "run"))
    _forget(folder)
    return folder


def _forget(folder):
    stage = next(s for s in stages.STAGES if s.name == "triage")
    workdir.Workdir(folder).forget("triage", stage.artefacts)


def triage(config, folder, *flags):
    judge = ["--config.judge.name=gemini", "--config.asking.backoff_seconds=0.01"]
    where = [f"--config={config}", f"--workdir={folder}", "--stages=triage"]
    return launch.main(["launch", *where, *judge, *flags])


def assert_secret(key, folder, told):
    assert key not in told
    for file in folder.rglob("*"):
        assert not file.is_file() or key.encode() not in file.read_bytes(), file


def test_triage_by_gemini_keeps_its_key_to_itself(run, config, server, capfd):
    assert triage(config, run) == 0
    rows = [row for _, row in records.read_jsonl(run / "triage.jsonl")]
    assert {row["action"] for row in rows} <= set(records.ACTIONS) and len(rows) == 60
    asked = gemini_client.get(server)["requests"]
    assert 0 < asked <= 120
    first = (run / "triage.jsonl").read_bytes()
    _forget(run)
    assert triage(config, run) == 0
    assert gemini_client.get(server)["requests"] == asked  # the store knows everything
    assert (run / "triage.jsonl").read_bytes() == first
    captured = capfd.readouterr()
    assert_secret(gemini_client.KEY, run, captured.out + captured.err)
    assert commands.main(["spent", f"--store={run / 'judgements.sqlite'}"]) == 0
    assert f"{asked} calls" in capfd.readouterr().out


def test_a_wrong_key_is_one_line_and_kept_secret(run, config, server, monkeypatch, capfd):
    monkeypatch.setenv("GEMINI_API_KEY", "AIzaAnotherKeyThatIsWrong")
    assert triage(config, run) == 2
    told = capfd.readouterr().err
    last = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(last) == 1 and "refuses the key in GEMINI_API_KEY" in last[0]
    assert_secret("AIzaAnotherKeyThatIsWrong", run, told)


def test_a_spent_budget_is_one_line_and_a_rerun_goes_on(run, config, server, capfd):
    assert triage(config, run, "--config.asking.budget_calls=20") == 2
    assert "budget is spent (20 calls" in capfd.readouterr().err
    assert triage(config, run) == 0
    counts = gemini_client.get(server)
    assert set(counts["good"].values()) == {1}  # nothing was asked twice


def test_a_store_that_is_set_is_used(server, tmp_path, capsys):
    """Otherwise what it has would be bought again."""
    records.write_jsonl(tmp_path / "d.jsonl", [{"prompt": "Tell", "response": "calm"}])
    where = ["judge", "--judge=gemini", "--policy=answers", f"--data={tmp_path / 'd.jsonl'}"]
    kept = f"--set=asking.store={tmp_path / 'kept.sqlite'}"
    for name in ("a", "b"):
        assert commands.main([*where, f"--out={tmp_path / name}.jsonl", kept]) == 0
        assert gemini_client.get(server)["requests"] == 1
    assert not (tmp_path / "a.sqlite").exists()
    flag = f"--store={tmp_path / 'flag.sqlite'}"  # says it more directly
    assert commands.main([*where, f"--out={tmp_path / 'c.jsonl'}", kept, flag]) == 0
    assert gemini_client.get(server)["requests"] == 2


def test_runs_with_other_prompts_are_not_compared(tmp_path, capsys):
    row = {"id": "1", "model": "trained", "split": "test", "mode": "greedy", "response": "So."}
    for side, prompts in (("a", "pq"), ("b", "pr")):
        (tmp_path / side).mkdir()
        rows = [row | {"id": str(i), "prompt": text} for i, text in enumerate(prompts)]
        records.write_jsonl(tmp_path / side / "samples.jsonl", rows)
    sides = [f"--{side}={tmp_path / side}" for side in "ab"]
    out = ["--judge=rules", "--policy=answers", f"--out={tmp_path / 'w.json'}"]
    assert commands.main(["winrate", *sides, *out]) == 2
    told = capsys.readouterr().err.strip()
    assert (
        told.count("\n") == 0 and "other prompts under the same ids (1 of 2, such as '1')" in told
    )
    assert not (tmp_path / "w.json").exists()


def test_gemini_is_calibrated_with_its_cost(server, tmp_path, capsys):
    policy = tmp_path / "kind.yaml"
    policy.write_text("name: kind\nclauses:\n  - {id: kind, requirement: The story is kind.}\n")
    data = tmp_path / "d.jsonl"
    rows = [("kind a", "compliant"), ("b", "violating"), ("kind c", "violating")]
    records.write_jsonl(data, [
        {"prompt": "Tell", "response": text, "labels": [label, label]} for text, label in rows
    ])  # fmt: skip
    out = tmp_path / "c.json"
    command = [
        "calibrate",
        "--judge=gemini",
        f"--policy={policy}",
        f"--data={data}",
        f"--out={out}",
    ]
    assert commands.main([*command, "--set=asking.concurrency=2"]) == 0
    found = json.loads(out.read_text())
    assert found["n"] == 3 and found["accuracy"] == pytest.approx(2 / 3)
    assert found["cost"]["calls"] == 3 and found["cost"]["price_per_1000"] > 0
    assert found["roc"] and found["calibration_error"] is not None
    assert commands.main(command) == 0  # again: from the store
    assert json.loads(out.read_text())["cost"]["calls"] == 0
    assert gemini_client.KEY not in capsys.readouterr().out + out.read_text()
