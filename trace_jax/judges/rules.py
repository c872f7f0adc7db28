"""The `rules` judge: the policy's own predicates. Deterministic, free, blind to all else."""

from collections.abc import Sequence

from trace_jax import judges, policy, records

_VERDICTS = {
    True: records.ClauseVerdict("compliant", 1.0),
    False: records.ClauseVerdict("violating", 0.0),
    None: records.ClauseVerdict("abstain", None),
}


class RulesJudge:
    """Judges every clause by its predicate and abstains on clauses without one.

    Equal (prompt, response) are judged once.
    """

    def __init__(self, rules: policy.Policy):
        self.policy = rules
        self.id = f"rules/{rules.name}"

    def judge(self, items: Sequence[judges.Item]) -> list[records.Verdict]:
        """Gives one verdict per item, in order."""
        texts = [(judges.prompt_text(x), judges.response_text(y)) for x, y in items]
        verdicts = {text: self._verdict(*text) for text in dict.fromkeys(texts)}
        return [verdicts[text] for text in texts]

    def _verdict(self, prompt: str, response: str) -> records.Verdict:
        clauses = {
            clause.id: _VERDICTS[clause.predicate and clause.predicate(prompt, response)]
            for clause in self.policy.clauses
        }
        return judges.aggregate(clauses, judge=self.id, policy_hash=self.policy.hash)
