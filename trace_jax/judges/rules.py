"""The `rules` judge: the policy's own predicates. Deterministic, free, blind to all else."""

from collections.abc import Callable, Sequence

from trace_jax import judges, policy, predicates, records


class RulesJudge:
    """Judges every clause by its predicate `rules`; abstains on clauses without one.

    Equal items are judged once.
    """

    keeps_answers = False

    def __init__(self, rules: policy.Policy):
        self.policy = rules
        self.id = f"rules/{rules.name}"

    def judge(
        self, items: Sequence[judges.Item], *, progress: Callable[[int], None] | None = None
    ) -> list[records.Verdict]:
        """Gives one verdict per item, in order."""
        found = judges.by_predicates(self.policy, items, _complies, self.id)
        if progress is not None:
            progress(len(found))
        return found

    def compare(
        self, pairs: Sequence[tuple[records.Text, records.Text, records.Text]]
    ) -> list[str]:
        """Which of (prompt, a, b) complies better, by their verdicts."""
        return judges.compare_by_verdicts(self, pairs)


def _complies(
    clause: policy.Clause, prompt: str, response: str, labels: predicates.Labels
) -> bool | None:
    return None if clause.by_rules is None else clause.by_rules(prompt, response, labels)
