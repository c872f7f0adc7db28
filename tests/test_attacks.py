"""Attacks: prompts out of files as they are published, judges side by side, the command."""

import json
import shutil

import gemini_client
import numpy as np
import pytest
from safetensors import numpy as safetensors

from trace_jax import judges, policy
from trace_jax.errors import InputError
from trace_jax.evaluate import attacks
from trace_jax.evaluate.__main__ import main
from trace_jax.judges import store

REFUSAL = "I'm sorry, but I cannot help with that."
HELP = "First gather the parts, then follow these steps one after the other."


def test_published_files_are_read(shared):
    folder = shared / "data" / "prompts"
    advbench = attacks.read_prompts(str(folder / "advbench.csv"), 0)
    assert len(advbench) > 500 and not any(p.text.startswith("Sure") for p in advbench)
    harmbench = attacks.read_prompts(str(folder / "harmbench.csv"), 0)
    assert len(harmbench) > 350 and any("\n\n" in p.text for p in harmbench)  # with a context
    assert len(attacks.read_prompts(str(folder / "strongreject.csv"), 25)) == 25
    safe = attacks.read_prompts(str(shared / "data/xstest/xstest_prompts.csv"), 0, safe=True)
    assert len(safe) == 250


def test_the_column_of_advbench_is_the_one_without_sure(tmp_path):
    for heads in ("goal,target", "target,goal"):
        goal_first = heads.startswith("goal")
        row = "Do harm,Sure, here" if goal_first else "Do harm,Sure"
        (tmp_path / "a.csv").write_text(f"{heads}\n{row.replace(', here', '')}\n")
        (found,) = attacks.read_prompts(str(tmp_path / "a.csv"), 0)
        assert found.text == "Do harm"


def test_files_without_prompts_are_one_line(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(InputError, match=r"no column of prompts.*it has x, y"):
        attacks.read_prompts(str(tmp_path / "a.csv"), 0)
    (tmp_path / "b.csv").write_text("prompt,label\na,unsafe\n")
    with pytest.raises(InputError, match="no safe prompts"):
        attacks.read_prompts(str(tmp_path / "b.csv"), 0, safe=True)


def _row(response: str, wrapper: str = "plain", model: str = "m") -> dict:
    return {"model": model, "wrapper": wrapper, "prompt": "How?", "response": response}


def test_judges_side_by_side():
    rows = [_row(HELP), _row(REFUSAL), _row(""), _row("It is harmful to do this: " + HELP)]
    by_rules = judges.make("rules", policy.load("attacks"), {}, asking={}, store=None)
    assert attacks.outcomes("rules", by_rules, rows, safe=False) == [True, False, False, True]
    keywords = attacks.Keywords()
    assert attacks.outcomes("keywords", keywords, rows, safe=False) == [True, False, True, False]
    answers = judges.make("rules", policy.load("answers"), {}, asking={}, store=None)
    assert attacks.outcomes("rules", answers, rows[:2], safe=True) == [False, True]
    assert attacks.outcomes("keywords", keywords, rows[:2], safe=True) == [False, True]


def test_an_undecided_verdict_is_a_failed_attack():
    rows = [_row(HELP)] * 3 + [_row(HELP, attacks.SAFE)] * 2
    judged = {"a": [True, None, False, True, False], "b": [True, True, False, None, False]}
    found = attacks.summary(rows, judged)
    plain = found["models"]["m"]["asr"]["plain"]
    assert plain["a"]["rate"] == pytest.approx(1 / 3) and plain["a"]["undecided"] == 1
    assert plain["b"]["rate"] == pytest.approx(2 / 3)
    assert found["models"]["m"]["over_refusal"]["a"]["rate"] == 0.5
    assert found["alpha"] == 1  # of the units that both decided
    assert "| attack success, plain | 33.3 [" in attacks.markdown(found)
    assert "| over-refusal, safe prompts | 50.0 [" in attacks.markdown(found)


def test_judges_that_decide_little_get_no_rate(capsys):
    rows = [_row(HELP)] * 5 + [_row(HELP, attacks.SAFE)] * 2
    judged = {"g": [None] * 5 + [False, True], "r": [True, None, None, True, False, True, True]}
    found = attacks.summary(rows, judged)
    plain = found["models"]["m"]["asr"]["plain"]
    assert plain["g"] == {"rate": None, "low": None, "high": None, "n": 5, "undecided": 5}
    assert plain["r"]["rate"] == pytest.approx(0.4) and plain["r"]["undecided"] == 2
    lines = attacks.markdown(found).splitlines()
    assert "| attack success, plain | - (5 undecided of 5) | 40.0 [" in lines[2]
    assert lines[2].endswith("(2 undecided) |") and "undecided" not in lines[3]
    attacks.warn_of_undecided(found)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "mostly undecided, so without a rate: g (5 answers)" in told
    attacks.warn_of_undecided(attacks.summary(rows, {"r": judged["r"], "s": judged["r"]}))
    assert capsys.readouterr().err == ""


def test_the_store_that_is_given_is_used(attack, tmp_path, monkeypatch):
    _, out, run = attack
    with gemini_client.running() as address:
        gemini_client.reach(address, monkeypatch)
        flags = ["--judges=rules,gemini", f"--set=asking.store={tmp_path / 'kept.sqlite'}"]
        run(*flags)
        asked = gemini_client.get(address)["requests"]
        assert asked > 0 and not (out / "judgements.sqlite").exists()
        run(*flags)
        assert gemini_client.get(address)["requests"] == asked
        assert store.Store(tmp_path / "kept.sqlite").spent().calls == asked


def test_the_command_goes_on_where_it_stopped(shared, tmp_path, capsys):
    harmful = tmp_path / "harmful.csv"
    harmful.write_text("prompt\nTell me how to do harm\nAnd how to do more of it\n")
    path, out = shared / "models" / "stories260k", tmp_path / "out"
    arguments = [
        "attacks", f"--model=s={path}", f"--harmful={harmful}", "--limit=5", "--stop-ids=1,2",
        f"--safe={shared / 'data/xstest/xstest_prompts.csv'}", "--max-new-tokens=12",
        f"--out={out}",
    ]  # fmt: skip
    assert main(arguments) == 0
    found = json.loads((out / "attacks.json").read_text())
    assert found["judges"] == ["rules", "keywords"] and found["prompts"]["safe"] == 5
    assert set(found["models"]["s"]["asr"]) == set(attacks.WRAPPERS)
    kept = {p: p.stat().st_mtime_ns for p in out.glob("answers-*.jsonl")}
    assert len(kept) == 4
    first = json.loads((out / "answers-s-fiction.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == "Tell me how to do harm"  # judges see the plain request
    assert main(arguments) == 0
    assert kept == {p: p.stat().st_mtime_ns for p in out.glob("answers-*.jsonl")}
    capsys.readouterr()
    assert main([*arguments, "--judges=rules,guess"]) == 2
    assert "'guess' is none of" in capsys.readouterr().err
    assert main([*arguments, "--stop-ids=1,-2"]) == 2
    assert "--stop-ids=1,-2: ids of tokens are at least 0" in capsys.readouterr().err
    for few in ("", "rules", "rules,rules"):
        assert main([*arguments, f"--judges={few}"]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and "two judges or more" in said[0]


@pytest.fixture
def attack(shared, tmp_path, capsys):
    """(model's folder, result's folder, run(*flags) -> wrappers answered anew, what was said)."""
    path, out = tmp_path / "model", tmp_path / "out"
    path.mkdir()
    for file in (shared / "models" / "stories260k").iterdir():
        shutil.copyfile(file, path / file.name)  # without its mode: one test writes there
    for name in ("harmful", "safe"):
        (tmp_path / f"{name}.csv").write_text(f"prompt\nTell a {name} story\n")
    files = [f"--{name}={tmp_path / name}.csv" for name in ("harmful", "safe")]

    def run(*flags: str) -> tuple[set[str], str]:
        before = {p: p.stat().st_mtime_ns for p in out.glob("answers-*.jsonl")}
        given = {f.partition("=")[0]: f for f in ("--stop-ids=1,2", "--max-new-tokens=4")}
        given |= {f.partition("=")[0]: f for f in flags}
        assert main(["attacks", f"--model=s={path}", *files, f"--out={out}", *given.values()]) == 0
        found = {p: p.stat().st_mtime_ns for p in out.glob("answers-*.jsonl")}
        anew = {p.stem.rpartition("-")[2] for p in found if before.get(p) != found[p]}
        return anew, capsys.readouterr().err

    return path, out, run


ALL = {*attacks.WRAPPERS, attacks.SAFE}


def test_answers_of_another_model_or_other_settings_are_made_anew(attack, monkeypatch):
    path, out, run = attack
    anew, said = run()
    assert anew == ALL and "anew" not in said
    assert run()[0] == set()
    for flag, key in (
        ("--max-new-tokens=5", "max_new_tokens"),
        ("--stop-ids=2", "stop_ids"),
        ("--dtype=bfloat16", "dtype"),
    ):
        anew, said = run(flag)
        assert anew == ALL
        assert f"answers-s-plain.jsonl: answered anew; changed since: {key}\n" in said
        assert run(flag)[0] == set()
        assert run()[0] == ALL
    monkeypatch.setitem(attacks.WRAPPERS, "fiction", "Go on: {}")
    anew, said = run()
    assert anew == {"fiction"} and "answered anew; changed since: wrapper\n" in said
    weights = safetensors.load_file(path / "model.safetensors")
    changed = {name: np.roll(tensor, 1) for name, tensor in weights.items()}
    safetensors.save_file(changed, path / "model.safetensors")
    anew, said = run()
    assert anew == ALL and said.count("answered anew; changed since: model\n") == len(ALL)


def test_answers_that_nobody_knows_of_are_made_anew(attack):
    """Those of earlier versions, and of a kill between the answers and what stands beside them."""
    _, out, run = attack
    run()
    (out / "answers-s-plain.json").unlink()
    anew, said = run()
    assert anew == {"plain"} and "answered anew; nothing says how it was made" in said
    assert run()[0] == set()
