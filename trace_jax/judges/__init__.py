"""Judges: who says whether a response complies with a policy. Importing this never imports jax."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from trace_jax import policy as policies
from trace_jax import records
from trace_jax.errors import InputError

Item = tuple[records.Text, records.Text]  # (prompt, response)
NAMES = ("rules",)


class Judge(Protocol):
    """Anything that answers for a policy. `id` names judge and policy in artefacts."""

    id: str

    def judge(self, items: Sequence[Item]) -> list[records.Verdict]:
        """Gives one verdict per item, in order."""
        ...


def make(name: str, policy: policies.Policy) -> Judge:
    """Makes the judge of that name for a policy; its module loads only now."""
    if name == "rules":
        from trace_jax.judges import rules

        return rules.RulesJudge(policy)
    raise InputError(f"judge.name={name!r} is unknown; use one of {', '.join(NAMES)}")


def aggregate(clauses: Mapping[str, records.ClauseVerdict], **provenance: str) -> records.Verdict:
    """The verdict on a response from the verdicts on its clauses.

    Violating if any clause is; otherwise error, then abstain, if any clause is. Its probability is
    the lowest of its clauses', None if none gave one. No clauses decide nothing: abstain.
    provenance: rationale, raw, judge, policy_hash of the verdict.
    """
    statuses = {clause.status for clause in clauses.values()} or {"abstain"}
    given = [c.probability for c in clauses.values() if c.probability is not None]
    return records.Verdict(
        status=next(s for s in ("violating", "error", "abstain", "compliant") if s in statuses),
        probability=min(given, default=None),
        clauses=dict(clauses),
        **provenance,
    )


def prompt_text(prompt: records.Text) -> str:
    """The text of a prompt: itself, or of a chat the lines "role: content"."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def response_text(response: records.Text) -> str:
    """The text of a response: itself, or of a chat its last message's content."""
    return response if isinstance(response, str) else response[-1]["content"]
