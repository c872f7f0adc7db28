import pytest

from trace_jax import judges, policy, records, triage
from trace_jax.errors import InputError
from trace_jax.judges import rules

POLICY = policy.parse("""\
name: tales
clauses:
  - {id: calm, requirement: A, rules: {not: {words: {in: response, any_of: [scared]}}}}
  - {id: named, requirement: B, rules: {words: {in: prompt, any_of: [Lily]}}}
""")
READ = policy.parse("""\
name: read
clauses:
  - {id: calm, requirement: A, rules: {not: {words: {in: response, any_of: [scared]}}}}
  - {id: warm, requirement: The story is warm.}
""")
YES, NO = records.ClauseVerdict("compliant", 1.0), records.ClauseVerdict("violating", 0.0)
SURELY, SURELY_NOT = (records.ClauseVerdict(s, None) for s in ("compliant", "violating"))
ABSTAIN, ERROR = records.ClauseVerdict("abstain", None), records.ClauseVerdict("error", None)


def status(judge, prompt, response):
    return judge.judge([(prompt, response)])[0].status


def test_every_clause_is_judged_and_named():
    judge = judges.make("rules", POLICY)
    calm, scared = judge.judge([("Lily", "All calm."), ("Tim", "So scared.")])
    assert calm == records.Verdict(
        "compliant",
        1.0,
        {"calm": YES, "named": YES},
        judge="rules/tales",
        policy_hash=POLICY.hash,
    )
    assert (scared.status, scared.probability) == ("violating", 0.0)
    assert scared.clauses == {"calm": NO, "named": NO}


def test_a_clause_without_rules_is_an_abstention():
    calm, scared = judges.make("rules", READ).judge([("", "Calm."), ("", "Scared.")])
    assert calm.clauses == {"calm": YES, "warm": ABSTAIN}
    assert (calm.status, calm.probability, calm.compliant) == ("abstain", 1.0, None)
    assert (scared.status, scared.probability, scared.compliant) == ("violating", 0.0, False)


def test_chats_are_judged_as_text():
    judge = judges.make("rules", POLICY)
    chat = [{"role": "user", "content": "Hi."}, {"role": "user", "content": "I am Lily."}]
    assert judges.prompt_text(chat) == "user: Hi.\nuser: I am Lily."
    answer = [{"role": "user", "content": "scared?"}, {"role": "assistant", "content": "No."}]
    assert judges.response_text(answer) == "No."
    assert status(judge, chat, answer) == "compliant"
    assert status(judge, chat, answer[:1]) == "violating"
    assert status(judge, chat[:1], answer) == "violating"


def test_equal_items_are_judged_once(monkeypatch):
    judged = []
    one = rules._complies

    def counted(clause, *texts):
        judged.append(texts[:2])
        return one(clause, *texts)

    monkeypatch.setattr(rules, "_complies", counted)
    items = [("Lily", "a"), ("Tim", "a"), ("Lily", "a"), ("Lily", [{"role": "r", "content": "a"}])]
    verdicts = judges.make("rules", POLICY).judge(items)
    assert judged == [("Lily", "a"), ("Lily", "a"), ("Tim", "a"), ("Tim", "a")]  # two clauses
    assert [v.status for v in verdicts] == ["compliant", "violating", "compliant", "compliant"]
    assert judges.make("rules", POLICY).judge([]) == []


@pytest.mark.parametrize(
    "clauses, expected, probability",
    [
        ([YES, YES], "compliant", 1.0),
        ([YES, NO, ERROR, ABSTAIN], "violating", 0.0),
        ([YES, ABSTAIN, ERROR], "error", 1.0),
        ([YES, ABSTAIN], "abstain", 1.0),
        ([ABSTAIN, ERROR], "error", None),
        ([records.ClauseVerdict("compliant", p) for p in (0.9, 0.6, 0.8)], "compliant", 0.6),
        ([records.ClauseVerdict("compliant", 0.95), SURELY_NOT], "violating", 0.0),
        ([records.ClauseVerdict("compliant", 0.9), SURELY], "compliant", 0.9),
        ([SURELY, SURELY_NOT, ABSTAIN], "violating", 0.0),
        ([SURELY, ABSTAIN], "abstain", 1.0),
        ([], "abstain", None),
    ],
)
def test_aggregation(clauses, expected, probability):
    for order in (clauses, clauses[::-1]):
        by_name = {str(i): clause for i, clause in enumerate(order)}
        found = judges.aggregate(by_name, judge="j", rationale="r")
        assert (found.status, found.probability) == (expected, probability)
        assert (found.clauses, found.judge, found.rationale) == (by_name, "j", "r")


def test_an_unknown_judge_is_an_input_error():
    with pytest.raises(InputError, match="judge.name='oracle' is unknown; use one of rules"):
        judges.make("oracle", POLICY)


def test_a_violation_without_a_probability_decides_by_probability_too():
    clauses = {"calm": records.ClauseVerdict("compliant", 0.95), "kind": SURELY_NOT}
    verdict = judges.aggregate(clauses)
    assert triage.compliant(verdict, triage.Settings(decide_by="probability")) is False
