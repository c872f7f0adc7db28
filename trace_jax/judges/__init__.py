"""Judges: who says whether a response complies with a policy. Importing this never imports jax."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from trace_jax import policy as policies
from trace_jax import predicates, processes, records
from trace_jax.errors import InputError

NAMES = ("rules", "labels", "gemini", "local", "ensemble")
CHOICES = ("a", "b", "tie", "undecided")
_CERTAIN = {"compliant": 1.0, "violating": 0.0}  # P(compliant) of a status without one


class Item(NamedTuple):
    """What is judged. `labels`: the data set's annotations of the prompt and of this response."""

    prompt: records.Text
    response: records.Text
    labels: predicates.Labels = predicates.NO_LABELS


class Judge(Protocol):
    """Anything that answers for a policy.

    Attributes:
      id: names judge and policy in artefacts.
      keeps_answers: an answer once given is kept elsewhere, so nothing is lost if the caller dies.
    """

    id: str
    keeps_answers: bool

    def judge(
        self, items: Sequence[Item], *, progress: Callable[[int], None] | None = None
    ) -> list[records.Verdict]:
        """Gives one verdict per item, in order; (prompt, response) tuples will do as items.

        progress: called with the number of items just answered.
        """
        ...


class Comparer(Protocol):
    """A judge that also says which of two responses complies better."""

    def compare(
        self, pairs: Sequence[tuple[records.Text, records.Text, records.Text]]
    ) -> list[str]:
        """One of CHOICES per (prompt, a, b), in order; a and b as they are given, once."""
        ...


def make(
    name: str,
    policy: policies.Policy,
    settings: Mapping[str, Any] | None = None,
    *,
    asking: Mapping[str, Any] | None = None,
    store: records.AnyPath | None = None,
    load_model: Callable[[str, str], Any] | None = None,
) -> Judge:
    """Makes the judge of that name for a policy; its module loads only now.

    settings, asking: config sections `judge` and `asking` as mappings; None: their defaults.
    store: file of the judgement store, which the first of several processes opens; None keeps
    answers in memory. load_model(path, dtype): how the local judge comes by its (model,
    tokenizer); None: as `models.load` does.

    Raises:
      InputError: the name is unknown, or what the judge needs is missing.
    """
    if name == "rules":
        from trace_jax.judges import rules

        return rules.RulesJudge(policy)
    if name == "labels":
        from trace_jax.judges import labels

        return labels.LabelsJudge(policy)
    if name not in NAMES:
        raise InputError(f"judge.name={name!r} is unknown; use one of {', '.join(NAMES)}")
    from trace_jax import config

    defaults = config.base_config()
    settings = defaults.judge.to_dict() if settings is None else settings
    asking = defaults.asking.to_dict() if asking is None else asking
    if name == "ensemble":
        from trace_jax.judges import ensemble

        section = dict(settings["ensemble"])
        members = [
            make(m, policy, settings, asking=asking, store=store, load_model=load_model)
            for m in ensemble.check_members(section.pop("members"))
        ]
        return ensemble.EnsembleJudge(policy, members, **section)
    from trace_jax.judges import reading
    from trace_jax.judges import store as stores

    asks = store is not None and processes.is_first()  # a second open file would be another copy
    kept = stores.Store(store if asks else ":memory:")
    reader = _reader(name, settings, asking, kept, load_model)
    return reading.ReadingJudge(policy, reader, kept, reask_abstentions=asking["reask_abstentions"])


def _reader(name: str, settings: Mapping[str, Any], asking: Mapping[str, Any], kept, load_model):
    if name == "gemini":
        from trace_jax.judges import gemini, gemini_job

        return gemini.GeminiReader(
            gemini_job.Settings(**settings["gemini"]), gemini_job.Asking.of(asking), kept
        )
    from trace_jax.judges import local

    micro_rows = asking["micro_rows"]
    if micro_rows < 1:
        raise InputError(f"asking.micro_rows={micro_rows} must be at least 1")
    return local.LocalReader(local.Settings(**settings["local"]), load_model, micro_rows=micro_rows)


def aggregate(clauses: Mapping[str, records.ClauseVerdict], **provenance: Any) -> records.Verdict:
    """The verdict on a response from the verdicts on its clauses.

    Violating if any clause is; otherwise error, then abstain, if any clause is. Its probability is
    the lowest of its clauses', where one that is decided and gives none is certain; None if there
    is no other. No clauses decide nothing: abstain. provenance: the other fields of the verdict.
    """
    statuses = {clause.status for clause in clauses.values()} or {"abstain"}
    given = [p_compliant(clause) for clause in clauses.values()]
    return records.Verdict(
        status=next(s for s in ("violating", "error", "abstain", "compliant") if s in statuses),
        probability=min((p for p in given if p is not None), default=None),
        clauses=dict(clauses),
        **provenance,
    )


def p_compliant(clause: records.ClauseVerdict) -> float | None:
    """P(compliant) as given; of a decided clause without one that it is certain; else None."""
    return _CERTAIN.get(clause.status) if clause.probability is None else clause.probability


def order(a: records.Verdict, b: records.Verdict) -> int:
    """1 if a is better than b, -1 worse, 0 equal: compliant first, then fewer violated clauses."""

    def key(verdict: records.Verdict) -> tuple[bool, int]:
        violated = sum(c.status == "violating" for c in verdict.clauses.values())
        return verdict.status == "compliant", -violated

    return (key(a) > key(b)) - (key(a) < key(b))


def compare_by_verdicts(
    judge: Judge, pairs: Sequence[tuple[records.Text, records.Text, records.Text]]
) -> list[str]:
    """`compare` of a judge that only gives verdicts: their `order`, "undecided" unless both are."""
    verdicts = judge.judge([Item(pair[0], y) for pair in pairs for y in pair[1:]])
    return [
        "undecided" if None in (a.compliant, b.compliant) else ("tie", "a", "b")[order(a, b)]
        for a, b in zip(verdicts[::2], verdicts[1::2], strict=True)
    ]


def by_predicates(
    policy: policies.Policy, items: Sequence[Item], decide: Callable[..., bool | None], judge: str
) -> list[records.Verdict]:
    """Verdicts of decide(clause, prompt text, response text, labels) -> complies, None: unknown.

    Equal items are decided once.
    """
    texts = [_decided(Item(*item)) for item in items]
    verdicts = {}
    for key, (prompt, response, labels) in texts:
        if key not in verdicts:
            clauses = {
                clause.id: _VERDICTS[decide(clause, prompt, response, labels)]
                for clause in policy.clauses
            }
            verdicts[key] = aggregate(clauses, judge=judge, policy_hash=policy.hash)
    return [verdicts[key] for key, _ in texts]


_VERDICTS = {
    True: records.ClauseVerdict("compliant", 1.0),
    False: records.ClauseVerdict("violating", 0.0),
    None: records.ClauseVerdict("abstain", None),
}


def _decided(item: Item) -> tuple[Any, tuple[str, str, predicates.Labels]]:
    prompt, response = prompt_text(item.prompt), response_text(item.response)
    labels = item.labels or predicates.NO_LABELS
    key = (prompt, response, json.dumps(dict(labels), sort_keys=True, default=str))
    return key, (prompt, response, labels)


def prompt_text(prompt: records.Text) -> str:
    """The text of a prompt: itself, or of a chat the lines "role: content"."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def response_text(response: records.Text) -> str:
    """The text of a response: itself, or of a chat its last message's content."""
    return response if isinstance(response, str) else response[-1]["content"]
