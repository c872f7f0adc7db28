"""Several judges that vote, clause by clause, and how far they agree."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trace_jax import judges, policy, records
from trace_jax.errors import InputError
from trace_jax.evaluate import agreement

_DECIDED = ("compliant", "violating")


def check_members(members: Sequence[str]) -> tuple[str, ...]:
    """The names, if they make an ensemble; InputError otherwise."""
    members = tuple(members)
    single = [name for name in judges.NAMES if name != "ensemble"]
    unknown = [name for name in members if name not in single]
    if unknown or len(members) < 2 or len(set(members)) < len(members):
        raise InputError(
            f"judge.ensemble.members={members} must be two or more different ones of "
            f"{', '.join(single)}"
        )
    return members


class EnsembleJudge:
    """The majority of its members on every clause; a tie abstains.

    least_votes: members that have to decide a clause; with fewer it abstains, or is an error where
    no member decided and one failed. A probability is the mean of the members'.
    """

    def __init__(self, rules: policy.Policy, members: Sequence[judges.Judge], *, least_votes: int):
        if not 1 <= least_votes <= len(members):
            raise InputError(
                f"judge.ensemble.least_votes={least_votes} must be from 1 to {len(members)}, the "
                "number of members"
            )
        self.policy, self.members, self.least_votes = rules, list(members), least_votes
        # What members keep is not lost, and the others give the same again at no cost.
        self.keeps_answers = any(member.keeps_answers for member in members)
        self.id = f"ensemble({'+'.join(member.id.split('/')[0] for member in members)})"
        self.id += f"/{rules.name}"
        self._statuses: dict[str, list[list[str | None]]] = {c.id: [] for c in rules.clauses}

    def judge(
        self, items: Sequence[judges.Item], *, progress: Callable[[int], None] | None = None
    ) -> list[records.Verdict]:
        """Gives one verdict per item, in order; progress counts those that all members judged."""
        given = [member.judge(items) for member in self.members[:-1]]
        given.append(self.members[-1].judge(items, progress=progress))
        return [self._vote(verdicts) for verdicts in zip(*given, strict=True)]

    def compare(
        self, pairs: Sequence[tuple[records.Text, records.Text, records.Text]]
    ) -> list[str]:
        """The majority of the members that decide; "tie" where they split."""
        given = [member.compare(pairs) for member in self.members]
        return [self._better(answers) for answers in zip(*given, strict=True)]

    def agreement(self) -> dict[str, float | None]:
        """Clause id -> Krippendorff's alpha (nominal) of the members on all they judged so far."""
        return {
            name: agreement.krippendorff_alpha(list(zip(*units, strict=True)))
            for name, units in self._statuses.items()
        }

    def _vote(self, verdicts: Sequence[records.Verdict]) -> records.Verdict:
        clauses = {}
        for clause in self.policy.clauses:
            answers = [verdict.clauses[clause.id] for verdict in verdicts]
            votes = [a.status if a.status in _DECIDED else None for a in answers]
            self._statuses[clause.id].append(votes)
            clauses[clause.id] = self._of_clause(answers)
        rationales = dict.fromkeys(v.rationale for v in verdicts if v.rationale)
        return judges.aggregate(
            clauses,
            rationale="\n".join(rationales),
            judge=self.id,
            policy_hash=self.policy.hash,
            template_hash=next((v.template_hash for v in verdicts if v.template_hash), ""),
            date=max(v.date for v in verdicts),
            tokens=sum(v.tokens for v in verdicts),
        )

    def _of_clause(self, answers: Sequence[records.ClauseVerdict]) -> records.ClauseVerdict:
        counts = collections.Counter(a.status for a in answers)
        probabilities = [p for p in map(judges.p_compliant, answers) if p is not None]
        p = sum(probabilities) / len(probabilities) if probabilities else None
        yes, no = counts["compliant"], counts["violating"]
        if not yes + no and counts["error"]:
            return records.ClauseVerdict("error", None)
        if yes + no < self.least_votes or yes == no:
            return records.ClauseVerdict("abstain", p)
        return records.ClauseVerdict("compliant" if yes > no else "violating", p)

    def _better(self, answers: Sequence[str]) -> str:
        counts: Mapping[str, Any] = collections.Counter(answers)
        decided = len(answers) - counts["undecided"]
        if decided < self.least_votes:
            return "undecided"
        if counts["a"] == counts["b"]:
            return "tie"
        return "a" if counts["a"] > counts["b"] else "b"
