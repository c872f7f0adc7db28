"""A run on top of a finished one: its records, model, prompts, policies, and the history."""

import json
import shutil
from pathlib import Path

import pytest

from trace_jax import config as config_lib
from trace_jax import generations, launch, policy, records, triage
from trace_jax.errors import InputError


@pytest.fixture(scope="module")
def parent(straight, tmp_path_factory) -> Path:
    return Path(shutil.copytree(straight[0], tmp_path_factory.mktemp("runs") / "parent"))


@pytest.fixture(scope="module")
def child(parent, config, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "child"
    arguments = [f"--config={config}", f"--workdir={path}", f"--config.parent={parent}",
                 "--config.policy.new=synth_third", "--config.impact.weights=uniform"]  # fmt: skip
    assert launch.main(["launch", *arguments]) == 0
    return path


def test_records_are_those_that_made_the_parent(parent, child):
    item = {t.record.id: t for t in triage.read(parent / "triage.jsonl")}
    made = {
        r.prompt + r.chosen: r
        for r in (
            records.PreferenceRecord.from_json(row)
            for _, row in records.read_jsonl(child / "records.jsonl")
        )
    }
    for t in item.values():
        x, y_w, y_l = t.record.prompt, t.record.chosen, t.record.rejected
        if t.action == "INVERT":
            assert made[x + y_l].rejected == y_w and made[x + y_l].id != t.record.id
        elif t.action == "RETAIN":
            assert made[x + y_w].id == t.record.id
    assert (child / "prompts.jsonl").read_bytes() == (parent / "prompts.jsonl").read_bytes()


def test_corrections_become_the_better_response(tmp_path):
    record = records.PreferenceRecord("r", "x", "yw", "yl", {"chosen": {"a": 1}, "rejected": {}})
    bad = records.Verdict("violating", None, {})
    row = records.TriagedRecord(record, bad, bad, "PUNISH").to_json()
    records.write_jsonl(tmp_path / "triage.jsonl", [row])
    records.write_jsonl(tmp_path / "records.jsonl", [record.to_json()])
    records.write_jsonl(tmp_path / "corrections.jsonl", [{"id": "r", "response": "yc"}])
    (found,) = generations.relabelled(tmp_path)
    assert (found.chosen, found.rejected) == ("yc", "yw") and found.id != "r"
    assert found.labels_of("rejected") == {"a": 1} and not found.labels_of("chosen")


def test_the_parents_model_is_m_ref_and_its_base_the_base(parent, child):
    found = json.loads((child / "config.json").read_text())
    assert found["model"]["ref_path"] == str(parent / "model")
    assert found["policy"] == {"old": "synth_new", "new": "synth_third"}
    assert "parent/model" in (child / "ref" / "README.md").read_text()
    before = {(r["id"], r["mode"]): r["response"] for _, r in
              records.read_jsonl(parent / "samples.jsonl") if r["model"] == "trained"}  # fmt: skip
    ref = {(r["id"], r["mode"]): r["response"] for _, r in
           records.read_jsonl(child / "baseline.jsonl") if r["model"] == "ref"}  # fmt: skip
    assert ref == before


def test_history_has_every_generation_and_the_report_shows_it(parent, child):
    first, second = generations.history(child)
    assert (first["new"], second["old"], second["new"]) == ("synth_new", "synth_new", "synth_third")
    assert first["perplexity"] > 1 and second["compliance_guarded"]["n"] == 8
    assert "Over the generations" in (child / "report.html").read_text()
    assert "Over the generations" not in (parent / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parent": "/no/such/run"}, "no run there"),
        ({"policy.old": "stories_old"}, "they have to be one"),
    ],
)
def test_a_parent_that_does_not_fit_is_one_line(parent, change, said):
    c = config_lib.with_overrides(config_lib.base_config(), {"parent": str(parent)} | change)
    with pytest.raises(InputError, match=said):
        config_lib.resolved(c)


def test_an_unfinished_parent_is_one_line(parent, tmp_path):
    path = Path(shutil.copytree(parent, tmp_path / "run"))
    shutil.rmtree(path / "model")
    c = config_lib.with_overrides(config_lib.base_config(), {"parent": str(path)})
    with pytest.raises(InputError, match="not finished .model/config.json is not there"):
        config_lib.resolved(c)


def test_a_policy_extends_another(tmp_path):
    base = policy.load("synth_new")
    (tmp_path / "p.yaml").write_text(
        "name: mine\nextends: synth_new\nwithout: [shopping]\nclauses:\n"
        "  - id: complete\n    requirement: Short.\n"
        "    rules: {length: {in: response, unit: words, max: 5}}\n"
        "  - {id: brave, requirement: Be brave.}\n"
    )
    found = policy.load(tmp_path / "p.yaml")
    ids = [c.id for c in base.clauses if c.id != "shopping"]
    assert [c.id for c in found.clauses] == [*ids, "brave"]
    changes = policy.diff(base, found)
    assert (changes.changed, changes.added, changes.removed) == (
        ("complete",), ("brave",), ("shopping",)
    )  # fmt: skip
    again = policy.parse(found.source)  # whole by itself
    assert again.hash == found.hash and found.description == base.description
    (tmp_path / "q.yaml").write_text("name: q\nextends: p.yaml\n")
    assert policy.load(tmp_path / "q.yaml").hash == found.hash


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: nothing", "no policy 'nothing'"),
        ("extends: synth_new\nwithout: [absent]", "has no clause 'absent'"),
        ("extends: synth_new\nclauses: [{requirement: a}]", "a clause needs an id"),
        ("extends: synth_new\nclauses: [{id: a, requirement: a}, {id: a, requirement: b}]",
         "two clauses have the id 'a'"),
        ("extends: p.yaml", "extends itself"),
    ],
)  # fmt: skip
def test_bad_extensions_are_one_line(tmp_path, text, said):
    (tmp_path / "p.yaml").write_text(f"name: p\n{text}\n")
    with pytest.raises(InputError, match=said):
        policy.load(tmp_path / "p.yaml")
