"""What Gemini is asked to reply, and what its replies mean: enums, checked, never guessed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from trace_jax import policy as policies
from trace_jax import records

_STATUSES = {"compliant": "compliant", "violating": "violating", "unsure": "abstain"}
_BETTER = {"a": "a", "b": "b", "tie": "tie", "unsure": "undecided"}
# The service would not reply to this text, today or later: an abstention, not an error.
_BLOCKED = {
    "SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE", "MODEL_ARMOR",
    "JAILBREAK", "ESCALATION",
}  # fmt: skip
_REASON = {"type": "string", "description": "one short sentence"}
_CONFIDENCE = {"type": "number", "description": "probability that the verdict is right, 0.5 to 1"}

_LEAST_CONFIDENCE = 0.51


class Malformed(Exception):
    """A reply that is not what was asked for; its text says how. The question is asked again."""


def verdict_schema(clauses: Sequence[policies.Clause]) -> dict[str, Any]:
    """JSON schema of the reply on these clauses: the reason first, then one answer a clause."""
    answer = _object(
        clause={"type": "string", "enum": [clause.id for clause in clauses]},
        verdict={"type": "string", "enum": list(_STATUSES)},
        confidence=_CONFIDENCE,
    )
    n = len(clauses)
    return _object(
        reason=_REASON, answers={"type": "array", "items": answer, "minItems": n, "maxItems": n}
    )


def comparison_schema() -> dict[str, Any]:
    """JSON schema of the reply to a comparison."""
    return _object(reason=_REASON, better={"type": "string", "enum": list(_BETTER)})


def _object(**properties: Any) -> dict[str, Any]:
    names = list(properties)
    schema = {"type": "object", "properties": properties, "required": names}
    return schema | {"propertyOrdering": names}


def verdicts(
    response: Any, clauses: Sequence[policies.Clause]
) -> tuple[str, str, dict[policies.Clause, records.ClauseVerdict]]:
    """(outcome, reason, verdicts) of a GenerateContentResponse; a blocked reply abstains on all.

    Raises:
      Malformed: not exactly one well-formed answer for every clause that was asked.
    """
    withheld = blocked(response)
    if withheld:
        abstains = records.ClauseVerdict("abstain", None)
        return withheld, "", dict.fromkeys(clauses, abstains)
    reply = _reply(response)
    answers = reply.get("answers")
    if not isinstance(answers, list):
        raise Malformed("no answers")
    found: dict[str, records.ClauseVerdict] = {}
    for answer in answers:
        name, verdict = _answer(answer)
        if name in found:
            raise Malformed("two answers on a clause")
        found[name] = verdict
    if found.keys() != {clause.id for clause in clauses}:
        raise Malformed("answers on other clauses than were asked")
    return "ok", _reason(reply), {clause: found[clause.id] for clause in clauses}


def better(response: Any) -> tuple[str, str, str]:
    """(outcome, reason, one of judges.CHOICES) of a reply to a comparison."""
    withheld = blocked(response)
    if withheld:
        return withheld, "", "undecided"
    reply = _reply(response)
    if not isinstance(reply.get("better"), str) or reply["better"] not in _BETTER:
        raise Malformed("neither a, b, tie nor unsure")
    return "ok", _reason(reply), _BETTER[reply["better"]]


def tokens(response: Any) -> tuple[int, int, int]:
    """(input, of them cached, output with thoughts) tokens that the service counted."""
    usage = response.usage_metadata
    if usage is None:
        return 0, 0, 0
    output = (usage.candidates_token_count or 0) + (usage.thoughts_token_count or 0)
    return usage.prompt_token_count or 0, usage.cached_content_token_count or 0, output


def text(response: Any) -> str:
    """The text of the first candidate, without thoughts; "" where there is none."""
    candidates = response.candidates or ()
    content = candidates[0].content if candidates else None
    parts = (content.parts if content is not None else None) or ()
    return "".join(part.text or "" for part in parts if not part.thought)


def blocked(response: Any) -> str:
    """Why the service withholds a reply for good; "" where it does not."""
    feedback = response.prompt_feedback
    if feedback is not None and feedback.block_reason is not None:
        return f"blocked: {_name(feedback.block_reason)}"
    candidates = response.candidates or ()
    finish = _name(candidates[0].finish_reason) if candidates else ""
    return f"blocked: {finish}" if finish in _BLOCKED else ""


def finished_text(response: Any) -> str:
    """The text of a reply that came to its end.

    Raises:
      Malformed: it did not.
    """
    if not response.candidates:
        raise Malformed("no candidate")
    finish = _name(response.candidates[0].finish_reason)
    if finish != "STOP":
        raise Malformed(f"finished by {finish or 'nothing'}")
    return text(response)


def _reply(response: Any) -> Mapping[str, Any]:
    try:
        reply = json.loads(finished_text(response))
    except (ValueError, RecursionError) as error:
        raise Malformed("not JSON") from error
    if not isinstance(reply, dict):
        raise Malformed("not a JSON object")
    return reply


def _answer(answer: Any) -> tuple[str, records.ClauseVerdict]:
    """The clause and the verdict on it, with P(compliant) on the verdict's side of 1/2.

    A confidence below 1/2 denies its own verdict. The verdict is what was asked for and comes from
    an enum, so it stays, as unsure as one can be: asked again at temperature 0 the service would
    say the same, be paid for it, and leave an error in the end. At 1/2 itself, triage by
    probability would call compliant what the verdict calls violating.
    """
    if not isinstance(answer, dict):
        raise Malformed("an answer that is no object")
    name, verdict, confidence = (answer.get(k) for k in ("clause", "verdict", "confidence"))
    if not isinstance(name, str):
        raise Malformed("an answer without its clause")
    if not isinstance(verdict, str) or verdict not in _STATUSES:
        raise Malformed("a verdict that is none")
    status = _STATUSES[verdict]
    if status == "abstain":
        return name, records.ClauseVerdict("abstain", None)
    if confidence is None:
        return name, records.ClauseVerdict(status, None)
    if isinstance(confidence, bool) or not isinstance(confidence, int | float):
        raise Malformed("a confidence that is no number")
    if not 0 <= confidence <= 1:  # NaN is not either
        raise Malformed("a confidence that is no probability")
    confidence = max(confidence, _LEAST_CONFIDENCE)
    probability = confidence if status == "compliant" else 1 - confidence
    return name, records.ClauseVerdict(status, float(probability))


def _reason(reply: Mapping[str, Any]) -> str:
    reason = reply.get("reason")
    return reason[:1000] if isinstance(reason, str) else ""


def _name(value: Any) -> str:
    return "" if value is None else getattr(value, "value", str(value))


_SAMPLE = [verdict_schema([policies.Clause("i", "t", "r")]), comparison_schema()]
HASH = hashlib.sha256(json.dumps(_SAMPLE).encode()).hexdigest()[:16]
