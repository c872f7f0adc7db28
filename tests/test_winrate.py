"""Win rates in both orders, by judges that prefer by text, by position, or not at all."""

import json

import gemini_client
import numpy as np
import pytest

from trace_jax import records
from trace_jax.evaluate import statistics, winrate
from trace_jax.judges import __main__ as commands


class Longer:
    """Prefers the longer text; undecided about "?"."""

    def compare(self, pairs):
        return [
            "undecided" if "?" in a + b else "tie" if len(a) == len(b) else "ab"[len(b) > len(a)]
            for _, a, b in pairs
        ]


class First:
    """Always prefers what comes first."""

    def compare(self, pairs):
        return ["a"] * len(pairs)


def pairs(*texts):
    return [winrate.Pair(f"p{i}", a, b) for i, (a, b) in enumerate(texts)]


def test_a_pair_is_won_in_both_orders():
    made = pairs(("long", "s"), ("s", "long"), ("ab", "cd"), ("same", "same"), ("?", "x"))
    found = winrate.outcomes(Longer(), made)
    assert found == ["a", "b", "tie", "tie", "undecided"]
    told = winrate.summary(made, found)
    assert told["win_rate"] == (1 + 0 + 0.5 + 0.5) / 4 and told["n"] == 4
    assert told["low"] < told["win_rate"] < told["high"]
    assert told["counts"] == {"a": 1, "b": 1, "tie": 2, "inconsistent": 0, "undecided": 1}
    assert told["position_consistency"] == 1.0 and told["longer_wins"] == 1.0
    assert told["length_ratio"] == (4 + 1 + 2 + 4 + 1) / (1 + 4 + 2 + 4 + 1)


def test_a_judge_of_position_wins_nothing():
    made = pairs(("a", "b"), ("c", "dd"), ("same", "same"))
    found = winrate.outcomes(First(), made)
    assert found == ["inconsistent", "inconsistent", "tie"]
    told = winrate.summary(made, found)
    assert told["win_rate"] == 0.5 and told["position_consistency"] == 0.0
    assert told["longer_wins"] is None


def test_prompts_weigh_alike_and_nothing_decided_gives_nothing():
    made = [winrate.Pair("p", "aa", "b")] * 3 + [winrate.Pair("q", "a", "bb")]
    assert winrate.summary(made, ["a", "a", "a", "b"])["win_rate"] == 0.5
    told = winrate.summary(made, ["undecided"] * 4)
    assert told["win_rate"] is None and told["n"] == 0 and told["position_consistency"] is None


def test_guarded_a_degenerate_response_loses_to_one_that_is_not():
    wrecks = [(False, False), (True, False), (False, True), (True, True), (True, False)]
    made = [winrate.Pair(f"p{i}", "a", "bb", degenerate=of) for i, of in enumerate(wrecks)]
    found = ["a", "a", "b", "a", "undecided"]
    assert winrate.guarded(made, found) == ["a", "b", "a", "tie", "b"]
    told = winrate.summary(made, found)
    assert told["win_rate"] == 0.75 and told["ties"] == 0 and told["n"] == 4
    assert told["guarded"]["win_rate"] == (1 + 0 + 1 + 0.5 + 0) / 5
    assert told["guarded"]["ties"] == 0.2 and told["guarded"]["n"] == 5
    assert "guarded" not in winrate.summary(pairs(("a", "b")), ["a"])


def test_seeds_are_a_source_of_chance():
    """100 prompts, of which every one is won under two seeds and lost under the third."""
    made = [winrate.Pair(f"p{i}", "a", "b", seed=k) for k in range(3) for i in range(100)]
    told = winrate.summary(made, ["a"] * 200 + ["b"] * 100)
    assert told["win_rate"] == pytest.approx(2 / 3) and told["n"] == 300
    assert told["low"] == 0 and told["high"] == 1
    alike = winrate.summary(made, (["a"] * 67 + ["b"] * 33) * 3)
    assert 0.55 < alike["low"] < 0.6 and 0.74 < alike["high"] < 0.8


def test_pairs_nobody_decided_leave_the_other_seeds_theirs():
    made = [winrate.Pair(f"p{i}", "a", "b", seed=k) for k in range(2) for i in range(20)]
    found = ["a"] * 10 + ["undecided"] * 10 + ["b"] * 9 + ["a"] * 10 + ["undecided"]
    told = winrate.summary(made, found)
    assert told["n"] == 29 and told["win_rate"] == pytest.approx(20 / 29)
    assert told["low"] < told["win_rate"] < told["high"]


def test_rates_of_means():
    found = statistics.rate_of_means(np.array([0.0, 0.5, 1.0, 1.0]))
    assert found.rate == 0.625 and found.low < 0.625 < found.high and found.n == 4
    equal = statistics.rate_of_means(np.array([0.5, 0.5]))
    assert (equal.low, equal.high) == statistics.wilson(1.0, 2)
    nan = float("nan")
    one = statistics.rate_of_means_over_seeds(np.array([[0.0, nan, 1.0, 1.0], [nan] * 4]))
    assert one == statistics.rate_of_means(np.array([0.0, 1.0, 1.0]))
    for bad in ([[]], [[nan]], [[1.5]], [0.5]):
        with pytest.raises(ValueError, match="a seed and prompt"):
            statistics.rate_of_means_over_seeds(np.array(bad))
    for bad in ([], [1.5], [[0.5]]):
        with pytest.raises(ValueError, match="one value"):
            statistics.rate_of_means(np.array(bad))


@pytest.fixture
def runs(tmp_path):
    """Two workdirs with greedy answers to two prompts in common."""
    answers = {"one": ["calm kind", "kind", "x"], "two": ["calm", "calm kind day", "y"]}
    for name, texts in answers.items():
        (tmp_path / name).mkdir()
        rows = [
            {"id": f"p{i}" if i < 2 else name, "prompt": f"Tell {i}", "split": "test",
             "model": "trained", "mode": mode, "response": text}
            for i, text in enumerate(texts) for mode in ("greedy", "sample")
        ]  # fmt: skip
        records.write_jsonl(tmp_path / name / "samples.jsonl", rows)
    return tmp_path


def test_the_command_by_rules_and_by_gemini(runs, tmp_path, monkeypatch, capsys):
    policy = tmp_path / "tales.yaml"
    clauses = "".join(
        f"  - {{id: {c}, requirement: {c}., rules: {{words: {{in: response, any_of: [{c}]}}}}}}\n"
        for c in ("calm", "kind")
    )
    policy.write_text("name: tales\nclauses:\n" + clauses)
    out = tmp_path / "w.json"
    command = ["winrate", f"--a={runs / 'one'}", f"--b={runs / 'two'}", f"--policy={policy}"]
    assert commands.main([*command, f"--out={out}"]) == 0
    assert (
        json.loads(out.read_text())["counts"]["a"]
        == json.loads(out.read_text())["counts"]["b"]
        == 1
    )
    assert "win rate 50.0%" in capsys.readouterr().out
    with gemini_client.running() as address:
        for name, value in gemini_client.environment(address).items():
            monkeypatch.setenv(name, value)
        assert commands.main([*command, f"--out={out}", "--judge=gemini"]) == 0
        assert gemini_client.get(address)["requests"] == 4  # two prompts in both orders
    assert json.loads(out.read_text())["position_consistency"] == 1.0


def test_what_is_missing_is_one_line(runs, tmp_path, capsys):
    command = ["winrate", "--policy=answers", f"--out={tmp_path / 'w.json'}", f"--a={runs / 'one'}"]
    assert commands.main([*command, f"--b={tmp_path / 'none'}"]) == 2
    assert "run stage evaluate first" in capsys.readouterr().err
    assert commands.main([*command, f"--b={runs / 'two'}", "--split=validation"]) == 2
    assert "has no greedy answers of trained to validation prompts" in capsys.readouterr().err
