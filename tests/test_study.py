"""The blind study: its page driven in a real browser, votes checked, win rates by hand."""

import json
from pathlib import Path

import pytest

from trace_jax import records, study

EVIL = '</script><img src=x onerror="document.title=1">{{ 7*7 }} <b>bold</b> \u202e'


def _rows(model: str, texts: list[str]) -> list[dict]:
    return [
        {"id": f"p{i}", "model": model, "split": "test", "mode": "sample", "sample": 0,
         "prompt": f"prompt {i} {EVIL}" if i == 0 else f"prompt {i}", "response": text}
        for i, text in enumerate(texts)
    ]  # fmt: skip


@pytest.fixture
def runs(tmp_path) -> Path:
    """Six prompts; on the last one all models say the same."""
    rows = [
        row
        for model in ("base", "ref", "trained")
        for row in _rows(model, [f"{model} says {i} {EVIL}" for i in range(5)] + ["the same"])
    ]
    (tmp_path / "run").mkdir()
    records.write_jsonl(tmp_path / "run" / "samples.jsonl", rows)
    return tmp_path / "run"


def _make(runs: Path, tmp_path: Path, *systems: str) -> tuple[Path, dict]:
    out = tmp_path / "study.html"
    arguments = ["make", *(f"--system={s}" for s in systems), "--policy=synth_new", f"--out={out}"]
    assert study.main(arguments) == 0
    return out, records.read_json(tmp_path / "study.key.json")


def test_the_page_is_blind_and_the_key_knows(runs, tmp_path):
    out, key = _make(runs, tmp_path, f"old_side={runs}:ref", f"new_side={runs}")
    text = out.read_text()
    assert "old_side" not in text and "new_side" not in text
    assert len(key["items"]) == 5  # not the one where both are the same
    orders = {tuple(item["systems"]) for item in key["items"]}
    assert orders == {("old_side", "new_side"), ("new_side", "old_side")}
    for item, shown in zip(key["items"], _data(text)["items"], strict=True):
        assert item["id"] == shown["id"]
        for system, answer in zip(item["systems"], shown["answers"], strict=True):
            assert answer.startswith({"old_side": "ref", "new_side": "trained"}[system])


def _data(text: str) -> dict:
    start = text.index('id="data">') + len('id="data">')
    return json.loads(text[start : text.index("</script>", start)])


def test_pages_are_a_function_of_the_seed(runs, tmp_path):
    made = [study.items({"a": _by_id(runs, "ref"), "b": _by_id(runs, "base")}, n=3, seed=s)
            for s in (0, 0, 1)]  # fmt: skip
    assert made[0] == made[1] != made[2] and len(made[0]) == 3


def _by_id(runs: Path, model: str) -> dict:
    rows = (row for _, row in records.read_jsonl(runs / "samples.jsonl"))
    return {row["id"]: row for row in rows if row["model"] == model}


def test_raters_vote_with_keys_and_mouse(runs, tmp_path, browser):
    out, key = _make(runs, tmp_path, f"a={runs}:base", f"b={runs}:ref", f"c={runs}")
    context = browser.new_context(accept_downloads=True, viewport={"width": 390, "height": 800})
    tab = context.new_page()
    errors = []
    tab.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda e: errors.append(str(e)))
    tab.goto(out.as_uri())
    items = {item["id"]: item["systems"] for item in key["items"]}
    shown = _data(out.read_text())["items"]
    assert tab.inner_text("#count") == "1 of 5, 0 voted" and tab.is_disabled("#save")
    assert tab.text_content("#prompt") == shown[0]["prompt"]
    assert tab.text_content("#answer-1") == shown[0]["answers"][1]
    tab.keyboard.press("2")
    assert tab.inner_text("#count") == "2 of 5, 1 voted"
    tab.keyboard.press("0")
    tab.click("#card-2")
    tab.keyboard.press("ArrowLeft")
    assert tab.get_attribute("#card-2", "aria-pressed") == "true"
    tab.keyboard.press("1")  # changed
    tab.fill("#rater", "Ada 1")  # digits typed into the name are no votes
    assert tab.inner_text("#count") == "4 of 5, 3 voted"
    tab.reload()
    assert tab.inner_text("#count") == "4 of 5, 3 voted" and tab.input_value("#rater") == "Ada 1"
    with tab.expect_download() as found:
        tab.click("#save")
    assert found.value.suggested_filename == f"votes-{key['study']}-Ada_1.json"
    found.value.save_as(tmp_path / "ada.json")
    votes = study.read_votes(tmp_path / "ada.json", key)
    ids = [item["id"] for item in shown]
    assert votes["votes"] == {ids[0]: 1, ids[1]: "tie", ids[2]: 0} and votes["rater"] == "Ada 1"
    assert tab.title().startswith("Which answer") and errors == []
    width = tab.evaluate("document.documentElement.scrollWidth")
    assert width <= 390
    context.close()
    done = study.main(["score", str(tmp_path / "study.key.json"), str(tmp_path / "ada.json"),
                       f"--out={tmp_path / 'scores.json'}"])  # fmt: skip
    found = records.read_json(tmp_path / "scores.json")
    assert done == 0 and found["votes"] == 3 and found["alpha"] is None
    assert found["systems"][items[ids[0]][1]]["chosen"] >= 1


KEY = {
    "study": "s",
    "items": [{"id": f"i{k}", "systems": ["x", "y"] if k % 2 else ["y", "x"]} for k in range(6)],
}


def _votes(rater: str, choices: list) -> dict:
    return {"study": "s", "rater": rater, "votes": {f"i{k}": c for k, c in enumerate(choices)}}


def test_win_rates_by_hand():
    # x is at place 1 of even items and 0 of odd ones: ann chooses x, x, x, tie, y; bob the same.
    choices = [1, 0, 1, "tie", 0]
    found = study.score(KEY, [_votes("ann", choices), _votes("bob", choices)])
    x_over_y = next(r for r in found["win_rates"] if r["a"] == "x")
    assert x_over_y["rate"] == 0.7 and x_over_y["n"] == 10
    assert x_over_y["low"] < 0.7 < x_over_y["high"]
    assert found["alpha"] == 1 and found["votes"] == 10
    assert found["systems"]["x"]["chosen"] == 6 and found["systems"]["tie"]["chosen"] == 2
    assert found["position"] == [0.5, 0.5]
    other = study.score(KEY, [_votes("ann", choices), _votes("bob", [0, 1, 0, "tie", 1])])
    assert other["alpha"] < 0


def test_triplets_count_for_the_pairs_they_decide():
    key = {"study": "s", "items": [{"id": "i0", "systems": ["x", "y", "z"]}]}
    found = study.score(key, [_votes("ann", [0])])
    rates = {(r["a"], r["b"]): r["rate"] for r in found["win_rates"]}
    assert rates["x", "y"] == 1 and rates["y", "x"] == 0 and rates["y", "z"] is None


@pytest.mark.parametrize(
    ("votes", "said"),
    [
        ({"study": "other", "rater": "a", "votes": {}}, "votes of study other"),
        ({"study": "s", "rater": "a", "votes": {"i9": 0}}, "no item of the study"),
        ({"study": "s", "rater": "a", "votes": {"i0": 2}}, "is no choice"),
        ({"study": "s", "rater": "a", "votes": {"i0": True}}, "is no choice"),
        ({"study": "s", "rater": " ", "votes": {}}, "a rater's name"),
        ([1], "not a file of votes"),
    ],
)
def test_votes_that_do_not_fit_are_one_line(tmp_path, capsys, votes, said):
    records.write_json(tmp_path / "key.json", KEY)
    records.write_json(tmp_path / "v.json", votes)
    arguments = ["score", str(tmp_path / "key.json"), str(tmp_path / "v.json"), "--out=x.json"]
    assert study.main(arguments) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and said in err[0]


@pytest.mark.parametrize(
    ("systems", "said"),
    [
        (["a={run}"], "two or three"),
        (["a={run}", "{run}"], "NAME=WORKDIR"),
        (["a={run}", "b={run}:gone"], "no samples of model 'gone'"),
        (["a=/no", "b={run}"], "run stage evaluate first"),
        (["a={run}", "a={run}:ref"], "a name of its own"),
        (["a={run}", "b={run}"], "no prompt in common on which their answers differ"),
    ],
)
def test_systems_that_cannot_be_compared_are_one_line(runs, tmp_path, capsys, systems, said):
    given = [f"--system={s.format(run=runs)}" for s in systems]
    code = study.main(["make", *given, "--policy=synth_new", f"--out={tmp_path / 's.html'}"])
    assert code == 2 and said in capsys.readouterr().err
