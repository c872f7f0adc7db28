"""Gemini's Batch API: half the price, answers within a day; it may be left and picked up later.

A batch's name and what it was asked are in the store before anything waits for it.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trace_jax import metrics
from trace_jax.errors import InputError
from trace_jax.judges import gemini_reply, reading
from trace_jax.judges import store as stores

_MOST_BYTES = 15_000_000  # of one batch; the service takes 20 MB inline
_MOST_QUESTIONS = 10_000
_LONGEST_PAUSE = 30.0  # seconds between two looks
_ENDED = {
    "JOB_STATE_SUCCEEDED", "JOB_STATE_PARTIALLY_SUCCEEDED", "JOB_STATE_FAILED",
    "JOB_STATE_CANCELLED", "JOB_STATE_EXPIRED",
}  # fmt: skip

Answered = Callable[[reading.Question, stores.Call, reading.Verdicts], None]


async def ask(reader: Any, questions: Sequence[reading.Question], answered: Answered) -> None:
    """Collects batches that are out, submits what none of them has, waits as long as it may.

    Raises:
      InputError: batches are still at work; the same command picks them up.
    """
    client = reader.client()
    try:
        open_ = {_key(q): q for q in questions}
        for key in await _collect(reader, client, open_, answered):
            open_.pop(key, None)
        waiting = _out(reader)
        await _submit(reader, client, [q for key, q in open_.items() if key not in waiting])
        pause = 1.0
        deadline = time.monotonic() + 60 * reader.asking.batch_wait_minutes
        while reader.store.batches(reader.identity):
            if time.monotonic() >= deadline:
                raise _at_work(reader)
            await asyncio.sleep(min(pause, max(0.2, deadline - time.monotonic())))
            pause = min(2 * pause, _LONGEST_PAUSE)
            await _collect(reader, client, open_, answered)
    finally:
        await client.aio.aclose()


def _at_work(reader: Any) -> InputError:
    names = list(reader.store.batches(reader.identity))
    return InputError(
        f"{len(names)} batch(es) of questions are at work at the service ({', '.join(names[:3])}); "
        "run the same command later to pick the answers up (asking.batch_wait_minutes waits)"
    )


def _key(question: reading.Question) -> str:
    item = stores.item_hash(question.prompt, question.response).hex()
    return json.dumps([item, [clause.text_hash for clause in question.clauses]])


def _out(reader: Any) -> set[str]:
    """Keys of questions that some batch has."""
    found = reader.store.batches(reader.identity).values()
    return {key for questions in found for key in json.loads(questions)}


async def _submit(reader: Any, client: Any, questions: Sequence[reading.Question]) -> None:
    from google.genai import errors, types

    budget = reader.budget()
    discount = reader.asking.batch_discount
    for part in _parts(reader, questions):
        expected = discount * sum(reader.expected_price(job) for _, job in part)
        if not budget.reserve(expected):
            raise InputError(
                f"a batch of {len(part)} questions would cost about {expected:.4f} US dollars and "
                f"go beyond the budget ({budget.price:.4f} are spent); raise asking.budget_usd"
            )
        requests = [
            types.InlinedRequest(
                contents=job.material, config=reader.request(job), metadata={"key": str(i)}
            )
            for i, (_, job) in enumerate(part)
        ]
        try:
            batch = await client.aio.batches.create(
                model=reader.settings.model, src=requests, config={"display_name": "trace_jax"}
            )
        except errors.APIError as error:
            said = reader.scrubbed(f"HTTP {error.code}, {error.status}: {error.message}"[:300])
            raise InputError(
                f"the service took no batch ({said}); mend that, or set asking.batch=False"
            ) from error
        keys = [_key(question) for question, _ in part]
        reader.store.add_batch(reader.identity, batch.name, json.dumps(keys))
        metrics.say(f"  {len(part)} questions are in batch {batch.name}")


def _parts(reader: Any, questions: Sequence[reading.Question]) -> Iterator[list]:
    """(question, job) in parts that one batch may hold."""
    part, size = [], 0
    for question in questions:
        job = reader.job(question, lambda *_: None)
        n = len(json.dumps([job.instruction, job.material, job.schema])) + 1000
        if part and (size + n > _MOST_BYTES or len(part) == _MOST_QUESTIONS):
            yield part
            part, size = [], 0
        part.append((question, job))
        size += n
    if part:
        yield part


async def _collect(
    reader: Any, client: Any, open_: dict[str, reading.Question], answered: Answered
) -> set[str]:
    """Takes in what batches have ended; returns the keys of their questions."""
    from google.genai import errors

    done: set[str] = set()
    for name, stored in reader.store.batches(reader.identity).items():
        try:
            batch = await client.aio.batches.get(name=name)
        except errors.APIError as error:
            if error.code == 404:  # gone for good: its questions are asked anew
                reader.store.forget_batch(name)
                continue
            said = reader.scrubbed(f"HTTP {error.code}, {error.status}"[:300])
            raise InputError(f"batch {name} could not be looked at ({said}); try later") from error
        state = getattr(batch.state, "value", str(batch.state))
        if state not in _ENDED:
            continue
        keys = json.loads(stored)
        replies = (batch.dest.inlined_responses if batch.dest else None) or []
        for key, reply in zip(keys, _in_order(replies, len(keys)), strict=True):
            if reply is not None:
                _take(reader, open_.get(key), reply, answered)
                done.add(key)
        reader.store.forget_batch(name)
        metrics.say(f"  batch {name} ended as {state}: {len(done)} of {len(keys)} replies")
    return done


def _in_order(replies: Sequence[Any], n: int) -> list[Any]:
    """Replies by the number of their request; None where there is none."""
    found: list[Any] = [None] * n
    for position, reply in enumerate(replies):
        given = (reply.metadata or {}).get("key", str(position))
        if given.isdigit() and int(given) < n:
            found[int(given)] = reply
    return found


def _take(reader: Any, question: reading.Question | None, reply: Any, answered: Answered) -> None:
    """Keeps one reply. A question that nobody asks any more still was paid for."""
    if reply.response is None:
        said = reply.error.message if reply.error else "no response"
        call, verdicts = stores.Call(f"batch error: {said}"[:200]), None
    else:
        call, verdicts = _read(reader, question, reply.response)
    if question is None:
        return
    job = reader.job(question, answered)
    job.attempted(call, job.failed if verdicts is None else verdicts)


def _read(reader: Any, question: reading.Question | None, response: Any) -> tuple:
    clauses = () if question is None else question.clauses
    try:
        outcome, reason, verdicts = gemini_reply.verdicts(response, clauses)
    except gemini_reply.Malformed as error:
        outcome, reason, verdicts = f"malformed: {error}", "", None
    return reader.call(response, outcome, reason, reader.asking.batch_discount), verdicts
