import pytest

from trace_jax import judges, policy, records
from trace_jax.errors import InputError
from trace_jax.judges import ensemble

POLICY = policy.parse("""\
name: tales
clauses:
  - {id: calm, requirement: The story is calm., rules: {words: {in: response, any_of: [calm]}},
     labels: {label: calm}}
  - {id: kind, requirement: The story is kind., rules: {words: {in: response, any_of: [kind]}}}
""")


class Saying:
    """Gives every clause the statuses and probabilities that it was made with."""

    keeps_answers = False

    def __init__(self, name, calm, kind=("compliant", 1.0), better="a"):
        self.id, self.answers, self.better = f"{name}/tales", {"calm": calm, "kind": kind}, better

    def judge(self, items, *, progress=None):
        clauses = {name: records.ClauseVerdict(*answer) for name, answer in self.answers.items()}
        if progress is not None:
            progress(len(items))
        return [judges.aggregate(clauses, rationale=self.id, tokens=5) for _ in items]

    def compare(self, pairs):
        return [self.better for _ in pairs]


YES, NO, UNSURE = ("compliant", 0.9), ("violating", 0.3), ("abstain", None)
ERROR = ("error", None)


def vote(*answers, least_votes=1):
    members = [Saying(f"m{i}", answer) for i, answer in enumerate(answers)]
    judge = ensemble.EnsembleJudge(POLICY, members, least_votes=least_votes)
    return judge.judge([("x", "y")])[0].clauses["calm"]


@pytest.mark.parametrize(
    ("answers", "status", "p"),
    [
        ((YES, YES, NO), "compliant", 0.7),
        ((NO, YES, NO), "violating", 0.5),
        ((YES, NO), "abstain", 0.6),
        ((YES, UNSURE), "compliant", 0.9),
        ((NO, ERROR, UNSURE), "violating", 0.3),
        ((("violating", None), ("violating", None), YES), "violating", 0.3),
        ((UNSURE, UNSURE), "abstain", None),
        ((UNSURE, ERROR), "error", None),
    ],
)
def test_the_majority_of_those_that_decide(answers, status, p):
    found = vote(*answers)
    assert found.status == status
    assert found.probability == (None if p is None else pytest.approx(p))


def test_so_many_have_to_decide():
    assert vote(YES, UNSURE, UNSURE, least_votes=2).status == "abstain"
    assert vote(YES, YES, UNSURE, least_votes=2).status == "compliant"
    with pytest.raises(InputError, match="least_votes=3 must be from 1 to 2"):
        vote(YES, YES, least_votes=3)


def test_agreement_is_alpha_over_decided_answers_by_clause():
    members = [Saying("a", YES), Saying("b", YES)]
    judge = ensemble.EnsembleJudge(POLICY, members, least_votes=1)
    judge.judge([("x", "1"), ("x", "2")])
    for member in members:
        member.answers["calm"] = NO
    verdict = judge.judge([("x", "3")])[0]
    members[1].answers["calm"] = UNSURE
    judge.judge([("x", "4")])
    assert judge.agreement() == {"calm": 1.0, "kind": None}
    assert (verdict.judge, verdict.rationale) == ("ensemble(a+b)/tales", "a/tales\nb/tales")
    assert verdict.tokens == 10 and verdict.status == "violating"


def test_comparisons_are_voted_on():
    def better(*answers, least_votes=1):
        members = [Saying("m", YES, better=answer) for answer in answers]
        judge = ensemble.EnsembleJudge(POLICY, members, least_votes=least_votes)
        return judge.compare([("x", "a", "b")])[0]

    assert better("a", "b", "a") == "a" and better("b", "undecided") == "b"
    assert better("a", "b") == "tie" == better("tie", "tie")
    assert better("undecided", "undecided") == "undecided"
    assert better("a", "undecided", least_votes=2) == "undecided"


def test_rules_and_labels_vote_by_name():
    judge = judges.make("ensemble", POLICY)
    labelled = judges.Item("x", "a calm kind tale", {"calm": False})
    assert judge.judge([labelled])[0].clauses["calm"].status == "abstain"
    found = judge.judge([judges.Item("x", "a calm kind tale", {"calm": True})])[0]
    assert found.status == "compliant" and judge.id == "ensemble(rules+labels)/tales"


@pytest.mark.parametrize("members", [(), ("rules",), ("rules", "rules"), ("rules", "ensemble")])
def test_members_are_checked(members):
    with pytest.raises(InputError, match="two or more different ones"):
        ensemble.check_members(members)
