import collections

import pytest

from trace_jax import noise, records, triage

YES, NO = (records.Verdict(s, p, {}) for s, p in (("compliant", 1.0), ("violating", 0.0)))
UNKNOWN = records.Verdict("abstain", None, {})
IDS = [str(i) for i in range(1000)]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 1.0])
def test_the_share_is_met_half_each_way(share):
    plan = noise.plan(IDS, share=share, seed=42)
    kinds = collections.Counter(c.kind for c in plan.values())
    assert kinds["flip"] == kinds["swap"] == 500 * share
    assert plan == noise.plan(IDS, share=share, seed=42)
    if 0 < share < 1:
        assert plan.keys() != noise.plan(IDS, share=share, seed=43).keys()


def test_a_flip_always_moves_the_action_and_reaches_both_others():
    plan = noise.plan(IDS, share=1.0, seed=0)
    reached = collections.Counter()
    for name, corruption in plan.items():
        record = records.PreferenceRecord(name, "x", "yw", "yl")
        settings = triage.Settings(corruptions={name: corruption})
        found = triage.decide(record, NO, YES, settings)
        assert found.noise == corruption.kind
        verdicts = found.chosen_verdict.compliant, found.rejected_verdict.compliant
        assert triage.action(*verdicts) == found.action
        reached[corruption.kind, found.action] += 1
    assert reached["swap", "RETAIN"] == 500  # yl's verdict now stands at yw
    assert reached["flip", "PUNISH"] + reached["flip", "RETAIN"] == 500
    assert 200 < reached["flip", "PUNISH"] < 300


def test_an_unresolved_record_stays_so():
    record = records.PreferenceRecord("a", "x", "yw", "yl")
    for corruption in (noise.Corruption("swap"), noise.Corruption("flip", 1)):
        settings = triage.Settings(corruptions={"a": corruption})
        assert triage.decide(record, UNKNOWN, YES, settings).action == "UNRESOLVED"


class Knowing:
    """Finds "good" compliant, "odd" undecided, and everything else not."""

    id, keeps_answers = "knowing", False

    def judge(self, items, *, progress=None):
        status = {"good": "compliant", "odd": "abstain"}
        return [records.Verdict(status.get(y.split()[0], "violating"), None, {}) for _, y in items]


def test_a_doubtful_judge_errs_as_often_as_it_says():
    items = [("x", f"{'good' if i % 2 else 'bad'} {i}") for i in range(20_000)]
    judge = noise.DoubtfulJudge(Knowing(), error=0.2, seed=1)
    found = judge.judge(items)
    right = [v.compliant == bool(i % 2) for i, v in enumerate(found)]
    assert abs(sum(right) / len(right) - 0.8) < 0.01
    assert all(v.probability > 0.5 if v.compliant else v.probability < 0.5 for v in found)
    sure = [max(v.probability, 1 - v.probability) for v in found]
    for low in (0.6, 0.7, 0.8, 0.9):  # calibrated in every part of its range
        part = [r for r, q in zip(right, sure, strict=True) if low <= q < low + 0.1]
        assert abs(sum(part) / len(part) - (low + 0.05)) < 0.03
    assert judge.judge(items[:50]) == found[:50]
    assert noise.DoubtfulJudge(Knowing(), error=0.2, seed=2).judge(items[:50]) != found[:50]


def test_doubt_leaves_the_undecided_alone():
    (found,) = noise.DoubtfulJudge(Knowing(), error=0.25, seed=0).judge([("x", "odd")])
    assert found.status == "abstain"
    sure = noise.DoubtfulJudge(Knowing(), error=0.0, seed=0).judge([("x", "good"), ("x", "bad")])
    assert [v.probability for v in sure] == [1.0, 0.0]
