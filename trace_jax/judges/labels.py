"""The `labels` judge: the annotations that came with the data. Free, and silent where they are."""

from collections.abc import Callable, Sequence

from trace_jax import judges, policy, predicates, records


class LabelsJudge:
    """Judges every clause by its predicate `labels` over the annotations of prompt and response.

    Abstains on clauses without one, where an annotation that would decide is missing, and where the
    annotations say "violating" of a clause with exceptions: they do not know of the context.
    """

    keeps_answers = False

    def __init__(self, rules: policy.Policy):
        self.policy = rules
        self.id = f"labels/{rules.name}"

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
    if clause.by_labels is None:
        return None
    complies = clause.by_labels(prompt, response, labels)
    return None if complies is False and clause.exceptions else complies
