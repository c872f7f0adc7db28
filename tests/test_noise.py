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
