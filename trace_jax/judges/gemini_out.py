"""Batches that are out: what each was asked and may cost, as text in the judgement store.

It is enough to keep the replies without whoever asked, such as the judge of another policy.
"""

import json
from collections.abc import Sequence

from trace_jax import policy as policies
from trace_jax.judges import reading
from trace_jax.judges import store as stores


def key(question: reading.Question) -> str:
    """Names a question by its item and the texts of its clauses."""
    item = stores.item_hash(question.prompt, question.response).hex()
    return json.dumps([item, [clause.text_hash for clause in question.clauses]])


def written(questions: Sequence[reading.Question], price: float) -> str:
    """What is kept of a batch; its items are kept beside it.

    price: US dollars that it is expected to cost.
    """
    numbers: dict[policies.Clause, int] = {}
    asked = []
    for question in questions:
        which = [numbers.setdefault(clause, len(numbers)) for clause in question.clauses]
        asked.append([stores.item_hash(question.prompt, question.response).hex(), which])
    clauses = [[c.id, c.requirement, c.exceptions, c.omission, c.zero_tolerance] for c in numbers]
    return json.dumps({"price": price, "clauses": clauses, "questions": asked})


def keys(text: str) -> list[str]:
    """Of the questions of a batch, in order."""
    found = json.loads(text)
    if isinstance(found, list):  # of a version that kept nothing else
        return found
    hashes = [clause.text_hash for clause in _clauses(found)]
    return [json.dumps([item, [hashes[i] for i in which]]) for item, which in found["questions"]]


def questions(kept: stores.Store, text: str) -> list[reading.Question | None]:
    """The questions of a batch, in order; None where the store has not their item."""
    found = json.loads(text)
    if isinstance(found, list):
        return [None] * len(found)
    clauses = _clauses(found)
    items = [kept.item(bytes.fromhex(item)) for item, _ in found["questions"]]
    return [
        None if item is None else reading.Question(*item, tuple(clauses[i] for i in which))
        for item, (_, which) in zip(items, found["questions"], strict=True)
    ]


def expected(kept: stores.Store) -> tuple[float, int]:
    """(US dollars, questions) of all batches that are out, whoever reads them."""
    found = [json.loads(text) for text in kept.batches().values()]
    whole = [batch for batch in found if isinstance(batch, dict)]
    older = sum(len(batch) for batch in found if isinstance(batch, list))  # price unknown
    price = sum(batch["price"] for batch in whole)
    return price, older + sum(len(batch["questions"]) for batch in whole)


def _clauses(found: dict) -> list[policies.Clause]:
    """With all that a judge that reads is shown of them; predicates are left out."""
    return [
        policies.Clause(
            name,
            "standard",
            requirement,
            exceptions=tuple(exceptions),
            omission=omission,
            zero_tolerance=zero_tolerance,
        )
        for name, requirement, exceptions, omission, zero_tolerance in found["clauses"]
    ]
