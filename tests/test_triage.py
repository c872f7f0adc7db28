import json

import children
import pytest

from trace_jax import judges, policy, records, triage
from trace_jax.errors import InputError

POLICY = policy.parse("""\
name: tales
clauses:
  - {id: calm, requirement: A, rules: {not: {words: {in: response, any_of: [scared]}}}}
  - {id: short, requirement: B, rules: {length: {in: response, unit: words, max: 3}}}
""")
GOOD, BAD = "All calm.", "So scared."
RECORDS = [
    records.PreferenceRecord("invert", "x", BAD, GOOD),
    records.PreferenceRecord("punish", "x", BAD, "a b c scared é"),
    records.PreferenceRecord("retain", "x", GOOD, BAD, labels={"safe": True}),
    records.PreferenceRecord("both", "x", GOOD, "So calm."),
]


class Watched:
    """The rules judge; says how many items it was asked about."""

    id = "watched"
    keeps_answers = False

    def __init__(self):
        self.judge_rules, self.n_items = judges.make("rules", POLICY), 0

    def judge(self, items, *, progress=None):
        self.n_items += len(items)
        return self.judge_rules.judge(items, progress=progress)


DECISIONS = {
    (False, True): "INVERT",
    (False, False): "PUNISH",
    (True, False): "RETAIN",
    (True, True): "RETAIN",
    (True, None): "RETAIN",
    (False, None): "UNRESOLVED",
    (None, True): "UNRESOLVED",
    (None, False): "UNRESOLVED",
    (None, None): "UNRESOLVED",
}


@pytest.mark.parametrize("chosen", [True, False, None])
@pytest.mark.parametrize("rejected", [True, False, None])
def test_the_decision_table(chosen, rejected):
    assert triage.action(chosen, rejected) == DECISIONS[chosen, rejected]


def test_both_responses_are_judged(tmp_path):
    path, steps = tmp_path / "triage.jsonl", []
    counts = triage.run(RECORDS, Watched(), path, progress=steps.append)
    triaged = triage.read(path)
    assert [t.record.id for t in triaged] == ["invert", "punish", "retain", "both"]
    assert [t.action for t in triaged] == ["INVERT", "PUNISH", "RETAIN", "RETAIN"]
    assert triaged[1].rejected_verdict == records.Verdict(
        "violating",
        0.0,
        {
            "calm": records.ClauseVerdict("violating", 0.0),
            "short": records.ClauseVerdict("violating", 0.0),
        },
    )
    assert counts == triage.summary(triaged)
    assert counts.actions == {"INVERT": 1, "PUNISH": 1, "RETAIN": 2, "UNRESOLVED": 0}
    assert counts.violations == {"calm": 4, "short": 1}
    assert str(counts) == "INVERT 1, PUNISH 1, RETAIN 2, UNRESOLVED 0"
    assert sum(steps) == 2 * len(RECORDS)
    assert "labels" not in json.loads(path.read_text().splitlines()[2])


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_a_partial_file_is_continued_byte_for_byte(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(triage, "_BATCH", batch)
    whole, path = tmp_path / "whole.jsonl", tmp_path / "triage.jsonl"
    triage.run(RECORDS, Watched(), whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(RECORDS)
    for n_whole in range(len(RECORDS) + 1):
        for half in (b"", *(line[: len(line) // 2] for line in lines[n_whole : n_whole + 1])):
            path.write_bytes(b"".join(lines[:n_whole]) + half)
            watched, steps = Watched(), []
            triage.run(RECORDS, watched, path, progress=steps.append)
            assert path.read_bytes() == whole.read_bytes()
            assert watched.n_items == 2 * (len(RECORDS) - n_whole)
            assert (steps[0], sum(steps)) == (2 * n_whole, 2 * len(RECORDS))


def test_each_batch_is_written_before_the_next_is_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(triage, "_BATCH", 2)
    path = tmp_path / "triage.jsonl"

    class Dies(Watched):
        def judge(self, items, *, progress=None):
            if self.n_items:
                raise KeyboardInterrupt
            return super().judge(items)

    with pytest.raises(KeyboardInterrupt):
        triage.run(RECORDS, Dies(), path)
    assert [t.record.id for t in triage.read(path)] == ["invert", "punish"]


def test_a_file_of_other_records_is_refused(tmp_path):
    path = tmp_path / "triage.jsonl"
    triage.run(RECORDS, Watched(), path)
    with pytest.raises(InputError, match="holds record 'both', which is not among the records"):
        triage.run(RECORDS[:3], Watched(), path)


def test_an_undecided_record_is_unresolved(tmp_path):
    path = tmp_path / "triage.jsonl"
    judge = judges.make("rules", policy.parse("name: x\nclauses: [{id: a, requirement: A}]"))
    counts = triage.run(RECORDS, judge, path)
    assert counts.actions["UNRESOLVED"] == len(RECORDS)
    assert counts.violations == {"a": 0}


def probability(p, status=None):
    return records.Verdict(status or ("compliant" if p >= 0.5 else "violating"), p, {})


ABSTAINED = records.Verdict("abstain", None, {"a": records.ClauseVerdict("abstain", None)})
HALF = records.Verdict("abstain", 0.5, {"a": records.ClauseVerdict("abstain", 0.5)})
ERROR = records.Verdict("error", 0.9, {"a": records.ClauseVerdict("error", None)})
SURE = records.Verdict("violating", None, {"a": records.ClauseVerdict("violating", None)})


@pytest.mark.parametrize(
    "chosen, rejected, expected",
    [
        (probability(0.0), probability(1.0), (1, 0, 0, 0)),
        (probability(0.0), probability(0.0), (0, 1, 0, 0)),
        (probability(1.0), probability(0.0), (0, 0, 1, 0)),
        (probability(1.0), probability(1.0), (0, 0, 1, 0)),
        (probability(0.2), probability(0.7), (0.56, 0.24, 0.2, 0)),
        (SURE, probability(0.7), (0.7, 0.3, 0, 0)),
        (HALF, probability(1.0), (0.5, 0, 0.5, 0)),
        (probability(0.2), ABSTAINED, (0, 0, 0.2, 0.8)),
        (probability(1.0), ERROR, (0, 0, 1, 0)),
        (ABSTAINED, probability(1.0), (0, 0, 0, 1)),
        (ERROR, probability(1.0), (0, 0, 0, 1)),
    ],
)
def test_masses(chosen, rejected, expected):
    found = triage.masses(chosen, rejected)
    assert tuple(found) == records.ACTIONS
    assert tuple(found.values()) == pytest.approx(expected)


def test_masses_are_the_hard_table_for_verdicts_without_doubt():
    for w in (0.0, 1.0):
        for y in (0.0, 1.0):
            hard = triage.action(w == 1, y == 1)
            assert triage.masses(probability(w), probability(y))[hard] == 1.0


@pytest.mark.parametrize(
    "verdict, expected",
    [
        (probability(0.9), True),
        (probability(0.8), True),
        (probability(0.79), None),
        (probability(0.3), None),
        (probability(0.29), False),
        (HALF, None),
        (ABSTAINED, None),
        (ERROR, None),
        (SURE, False),
    ],
)
def test_thresholds(verdict, expected):
    by_p = triage.Settings(decide_by="probability", compliant_from=0.8, violating_below=0.3)
    assert triage.compliant(verdict, by_p) is expected
    assert triage.compliant(verdict, triage.Settings()) is verdict.compliant


def test_soft_triage_writes_masses(tmp_path):
    path = tmp_path / "triage.jsonl"
    triage.run(RECORDS, Watched(), path, triage.Settings(soft=True))
    assert json.loads(path.read_text().splitlines()[0])["masses"] == {
        "INVERT": 1.0, "PUNISH": 0.0, "RETAIN": 0.0, "UNRESOLVED": 0.0,
    }  # fmt: skip
    assert triage.read(path)[0].masses["INVERT"] == 1.0


def test_a_judge_that_keeps_its_answers_is_asked_for_all_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(triage, "_BATCH", 1)
    asked = []

    class Keeps(Watched):
        keeps_answers = True

        def judge(self, items, *, progress=None):
            asked.append(len(items))
            return super().judge(items, progress=progress)

    triage.run(RECORDS, Keeps(), tmp_path / "a.jsonl")
    assert asked == [2 * len(RECORDS)]


def test_the_judge_gets_the_labels_of_prompt_and_response(tmp_path):
    labels = {"prompt": {"unsafe": False}, "chosen": {"rude": True}, "rejected": {"rude": False}}
    by_label = policy.parse("""\
name: p
clauses: [{id: a, requirement: A, labels: {any: [{label: unsafe}, {not: {label: rude}}]}}]
""")
    found = [records.PreferenceRecord("a", "x", "rude", "calm", labels)]
    triaged = triage.triage(found, judges.make("labels", by_label))
    assert triaged[0].action == "INVERT"


def test_triage_starts_without_jax_in_under_a_second():
    code = """
import sys
import trace_jax.records, trace_jax.sources, trace_jax.policy, trace_jax.triage, trace_jax.judges
trace_jax.judges.make("rules", trace_jax.policy.load("stories_new"))
heavy = {"jax", "flax", "numpy", "transformers", "torch"} & sys.modules.keys()
assert not heavy, heavy
"""
    assert children.cpu_seconds(code, below=1.0) < 1.0


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "triage.jsonl"
    path.write_text('{"id": "a"}\n')
    with pytest.raises(InputError, match=r"triage.jsonl:1: not a triaged record"):
        triage.read(path)
