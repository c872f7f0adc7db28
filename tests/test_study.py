"""The blind study: its page driven in a real browser, votes checked, win rates by hand."""

import json
from pathlib import Path

import pytest

from trace_jax import records, study
from trace_jax.evaluate import statistics

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


@pytest.fixture
def tab(runs, tmp_path, browser):
    """The page of two systems, on a phone, five prompts."""
    out, _ = _make(runs, tmp_path, f"a={runs}:base", f"b={runs}")
    context = browser.new_context(accept_downloads=True, viewport={"width": 390, "height": 800})
    page = context.new_page()
    page.goto(out.as_uri())
    yield page
    context.close()


def test_what_is_missing_is_said(tab):
    assert tab.is_disabled("#save") and "vote on a prompt first" in tab.inner_text("#why")
    assert tab.is_disabled("#anew")
    tab.keyboard.press("1")
    assert tab.inner_text("#why") == "1 of 5 voted. Enter your name and save the file."
    for _ in range(4):
        tab.keyboard.press("2")
    assert tab.inner_text("#why") == "All 5 voted: enter your name and save the file."
    assert tab.is_disabled("#save") and tab.locator("#why").is_visible()
    box = tab.locator("#why").bounding_box()
    assert 0 <= box["y"] <= 800 - box["height"]  # on the screen
    tab.fill("#rater", "Ada")
    assert tab.inner_text("#why") == "All 5 voted: save the file." and tab.is_enabled("#save")


def _voted(tab, name: str) -> None:
    tab.fill("#rater", name)
    tab.press("#rater", "Enter")
    for key in "121":
        tab.locator("h1").click()
        tab.keyboard.press(key)
    assert tab.inner_text("#count") == "4 of 5, 3 voted"


def test_another_rater_does_not_send_the_first_ones_votes(tab):
    _voted(tab, "Ada")
    tab.fill("#rater", "Bob")
    assert tab.is_disabled("#save") and "they were cast as Ada" in tab.inner_text("#why")
    tab.press("#rater", "Enter")
    assert "3 votes that were cast as Ada" in tab.inner_text("#ask")
    tab.keyboard.press("1")  # no vote while it is asked
    tab.reload()  # and it is asked again
    tab.click("#start")
    assert tab.inner_text("#count") == "1 of 5, 0 voted" and tab.input_value("#rater") == "Bob"
    tab.keyboard.press("2")
    tab.reload()
    assert tab.inner_text("#count") == "2 of 5, 1 voted"
    with tab.expect_download() as found:
        tab.click("#save")
    sent = json.loads(Path(found.value.path()).read_text())
    assert sent["rater"] == "Bob" and list(sent["votes"].values()) == [1]


@pytest.mark.parametrize(
    ("button", "name"), [("#same", "Ada Lovelace"), ("Escape", "Ada")], ids=["corrected", "escape"]
)
def test_who_only_mends_the_name_keeps_the_votes(tab, button, name):
    _voted(tab, "Ada")
    tab.fill("#rater", "Ada Lovelace")
    tab.click("#card-0")  # asked at once, and no vote
    if button.startswith("#"):
        tab.click(button)
    else:
        tab.keyboard.press(button)
    assert tab.input_value("#rater") == name and tab.is_enabled("#save")
    assert tab.inner_text("#count") == "4 of 5, 3 voted" and not tab.is_visible("#ask")
    tab.reload()
    assert f"3 votes of {name}. If they are not yours, start anew" in tab.inner_text("#saved")
    assert not tab.is_visible("#ask")


def test_start_anew_asks_first(tab):
    _voted(tab, "Ada")
    tab.click("#anew")
    assert "This deletes 3 votes of Ada" in tab.inner_text("#ask")
    tab.click("#same")
    assert tab.inner_text("#count") == "4 of 5, 3 voted"
    tab.click("#anew")
    tab.click("#start")
    tab.reload()
    assert tab.inner_text("#count") == "1 of 5, 0 voted" and tab.input_value("#rater") == ""


_CONTRAST = """(id) => {
  const luminance = (color) => color.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
  const ground = getComputedStyle(document.body).backgroundColor;
  const border = getComputedStyle(document.querySelector(id)).borderTopColor;
  const [low, high] = [ground, border].map(luminance).sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_can_be_chosen_has_an_outline_that_is_seen(tab, scheme):
    """At least 3:1 (WCAG 2.2, 1.4.11), and nothing is wider than the screen."""
    tab.emulate_media(color_scheme=scheme)
    for name in ("#card-0", "#card-1", "#tie", "#rater"):
        assert tab.evaluate(_CONTRAST, name) >= 3, name
    _voted(tab, "Ada")
    tab.click("#anew")
    box = tab.locator("#ask").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


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


def test_votes_that_all_agree_have_wilsons_interval():
    """5 of 5 is not 100 % for certain; nor are votes on one prompt, however many."""
    key = KEY | {"items": KEY["items"][:5]}
    x, y = [1, 0, 1, 0, 1], [0, 1, 0, 1, 0]

    def of(*votes: list) -> tuple[float, float, float]:
        raters = [_votes(f"rater {n}", choices) for n, choices in enumerate(votes)]
        row = next(r for r in study.score(key, raters)["win_rates"] if r["a"] == "x")
        return row["rate"], row["low"], row["high"]

    assert of(x) == (1, pytest.approx(0.5655, abs=1e-4), 1)
    assert of(y) == (0, 0, pytest.approx(0.4345, abs=1e-4))
    assert of(x, x, x) == of(x)  # prompts count, not votes
    assert of(["tie"] * 5) == of(x, y) == (0.5, *statistics.wilson(2.5, 5))
    assert of([1], [1], [0], [0]) == (0.5, *statistics.wilson(0.5, 1))


@pytest.mark.parametrize(
    ("votes", "said"),
    [
        ({"study": "other", "rater": "a", "votes": {}}, "votes of study other"),
        ({"study": "s", "rater": "a", "votes": {"i9": 0}}, "no item of the study"),
        ({"study": "s", "rater": "a", "votes": {"i0": 2}}, "is no choice"),
        ({"study": "s", "rater": "a", "votes": {"i0": True}}, "is no choice"),
        ({"study": "s", "rater": " ", "votes": {}}, "a rater's name"),
        ({"study": "s", "rater": ["x"], "votes": {"i0": 0}}, "a rater's name is needed, a text"),
        ({"study": "s", "rater": 7, "votes": {}}, "a text; it is 7"),
        ({"study": "s", "rater": "a", "votes": [0]}, "votes are needed"),
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


@pytest.mark.parametrize("place", [0, 5], ids=["on the page", "where answers are equal"])
def test_answers_to_different_prompts_are_not_put_side_by_side(runs, tmp_path, capsys, place):
    """The ids of the other run are the same, one of its prompts is not."""
    rows = [row for _, row in records.read_jsonl(runs / "samples.jsonl")]
    for row in rows:
        if row["id"] == f"p{place}":
            row["prompt"] = "something else"
    (tmp_path / "other").mkdir()
    records.write_jsonl(tmp_path / "other" / "samples.jsonl", rows)
    out = tmp_path / "study.html"
    systems = [f"--system=a={runs}:ref", f"--system=b={tmp_path / 'other'}"]
    assert study.main(["make", *systems, "--policy=synth_new", f"--out={out}"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and f"different prompts under the id 'p{place}'" in said[0]
    assert not out.exists()
