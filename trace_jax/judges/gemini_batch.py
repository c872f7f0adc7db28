"""Gemini's Batch API: half the price, answers within a day; it may be left and picked up later.

What a batch is asked is in the store, under its display name, before the service hears of it; so a
batch whose name was lost on the way is found again. Whoever looks first takes in every batch that
has ended, also one that another run or policy submitted.
"""

import asyncio
import contextlib
import itertools
import json
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

from trace_jax import bucket, metrics
from trace_jax.errors import InputError
from trace_jax.judges import gemini_job, gemini_out, gemini_reply, gemini_run, pacing, reading
from trace_jax.judges import store as stores

_MOST_BYTES = 15_000_000  # of one batch; the service takes 20 MB inline
_MOST_QUESTIONS = 10_000
_LONGEST_PAUSE = 30.0  # seconds between two looks
_LOOK = 0.2  # seconds between two looks at who else submits
_BEGUN = "trace_jax-"  # begins display names; no name that the service gives
_ENDED = {
    "JOB_STATE_SUCCEEDED", "JOB_STATE_PARTIALLY_SUCCEEDED", "JOB_STATE_FAILED",
    "JOB_STATE_CANCELLED", "JOB_STATE_EXPIRED",
}  # fmt: skip

Answered = Callable[[reading.Question, stores.Call, reading.Verdicts], None]
Part = list[tuple[reading.Question, gemini_job.Job]]  # what one batch is asked


class _Unanswered(Exception):
    """A look at a batch that the service did not answer; its text says how."""


async def ask(reader: Any, questions: Sequence[reading.Question], answered: Answered) -> None:
    """Collects batches that are out, submits what none of them has, waits as long as it may.

    Raises:
      InputError: batches are still at work, or the service cannot be reached; they are kept, and
        the same command picks them up.
    """
    http = reader.http()
    client = reader.client(http)
    try:
        await _Batches(reader, client, questions, answered).all()
    finally:
        await client.aio.aclose()
        await http.aclose()


class _Batches:
    """The batches of one call: what is still open, and since when the service is silent."""

    def __init__(
        self, reader: Any, client: Any, questions: Sequence[reading.Question], answered: Answered
    ):
        self.reader, self.client, self.answered = reader, client, answered
        self.open = {gemini_out.key(q): q for q in questions}
        self.silent_since: float | None = None
        self.rng = random.Random(0)

    async def all(self) -> None:
        await self._collect()
        if self._unasked():
            async with self._submitting() as budget:
                for part in _parts(self.reader, self._unasked()):
                    await self._submit(part, budget)
        pause = 1.0
        deadline = time.monotonic() + 60 * self.reader.asking.batch_wait_minutes
        while names := self._awaited():
            if time.monotonic() >= deadline:
                raise _at_work(names)
            await asyncio.sleep(min(pause, max(0.2, deadline - time.monotonic())))
            pause = min(2 * pause, _LONGEST_PAUSE)
            await self._collect()

    def _out(self) -> dict[str, list[str]]:
        """Batches of this reader that are out: name -> keys of their questions."""
        found = self.reader.store.batches(self.reader.identity)
        return {name: gemini_out.keys(text) for name, text in found.items()}

    def _awaited(self) -> list[str]:
        """Those with an open question of this call; others are no reason to wait."""
        return [n for n, keys in self._out().items() if not self.open.keys().isdisjoint(keys)]

    def _unasked(self) -> list[reading.Question]:
        """Questions that no batch has, and whose answers nobody has kept in the meantime."""
        at_work = {key for keys in self._out().values() for key in keys}
        for key, question in list(self.open.items()):
            if key not in at_work and (found := self.reader.kept(question)):
                self.answered(question, stores.KEPT, found)
                del self.open[key]
        return [question for key, question in self.open.items() if key not in at_work]

    def _begun(self) -> list[str]:
        """Batches that may be at the service or not: whoever submitted them did not end it."""
        return [name for name in self._out() if name.startswith(_BEGUN)]

    @contextlib.asynccontextmanager
    async def _submitting(self) -> AsyncIterator[pacing.Budget]:
        """Of several processes one is in here, and what another has begun is found or forgotten."""
        budget = self.reader.budget()
        try:
            for attempt in itertools.count(1):
                while not budget.begin_submitting():
                    await asyncio.sleep(_LOOK)
                begun = self._begun()
                try:
                    named = await self._told(self._named(begun), "the list of batches")
                    break
                except _Unanswered as error:
                    self._check_silence(str(error), len(begun))
                await self._pause(attempt)
            for name in begun:
                if name in named:
                    self.reader.store.name_batch(name, named[name])
                    metrics.say(f"  batch {named[name]} was begun before, and is found again")
                else:
                    self.reader.store.forget_batch(name)
            yield budget
        finally:
            budget.end_submitting()

    async def _named(self, begun: Sequence[str]) -> dict[str, str]:
        """Display name -> name, of those that the service has."""
        found: dict[str, str] = {}
        if begun:
            async for batch in await self.client.aio.batches.list(config={"page_size": 20}):
                if batch.display_name in begun:
                    found[batch.display_name] = batch.name
                if len(found) == len(begun):  # the newest come first
                    break
            self.silent_since = None
        return found

    async def _submit(self, part: Part, budget: pacing.Budget) -> None:
        store, asked = self.reader.store, [question for question, _ in part]
        items = [(q.prompt, q.response) for q in asked]
        price = await _reserve(self.reader, budget, part)
        try:
            begun = _BEGUN + secrets.token_hex(8)
            text = gemini_out.written(asked, price)
            store.add_batch(self.reader.identity, begun, text, items)
            bucket.publish()  # another machine may have to find it
            batch = await self._create(part, begun)
            store.name_batch(begun, batch.name)
            bucket.publish()
        finally:
            budget.settle(price, len(part))
        metrics.say(f"  {len(part)} questions are in batch {batch.name}")

    async def _create(self, part: Part, begun: str) -> Any:
        from google.genai import errors, types

        requests = [
            types.InlinedRequest(
                contents=job.material, config=self.reader.request(job), metadata={"key": str(i)}
            )
            for i, (_, job) in enumerate(part)
        ]
        try:
            return await self.client.aio.batches.create(
                model=self.reader.settings.model, src=requests, config={"display_name": begun}
            )
        except errors.APIError as error:
            if error.code < 500:  # it was refused; of others nobody knows
                self.reader.store.forget_batch(begun)
            said = self.reader.scrubbed(f"HTTP {error.code}, {error.status}: {error.message}"[:300])
            raise InputError(
                f"the service took no batch ({said}); mend that, or set asking.batch=False"
            ) from error
        except Exception as error:
            if not gemini_run.is_transport(error):
                raise
            raise InputError(
                f"the service did not answer when it was given a batch ({type(error).__name__}); "
                "run the same command later"
            ) from error

    async def _collect(self) -> None:
        """Takes in what batches have ended; looks again while the service answers no look at all.

        Raises:
          InputError: it did not for asking.outage_seconds.
        """
        if self._begun():
            async with self._submitting():
                pass  # once whoever submits just now is done, all have their names
        for attempt in itertools.count(1):
            out = self.reader.store.batches(self.reader.identity)
            out = {name: text for name, text in out.items() if not name.startswith(_BEGUN)}
            silent = 0
            for name, text in out.items():
                try:
                    batch = await self._look(name)
                except _Unanswered as error:
                    silent += 1
                    self._check_silence(str(error), len(out))
                    continue
                self.silent_since = None
                self._take_in(name, text, batch)
            if not silent or silent < len(out):
                return
            await self._pause(attempt)

    async def _pause(self, attempt: int) -> None:
        backoff = self.reader.asking.backoff_seconds
        await asyncio.sleep(pacing.delay(attempt, None, backoff, self.rng))

    async def _look(self, name: str) -> Any:
        """The batch as the service has it; None where it is gone for good."""
        from google.genai import errors

        async def get() -> Any:
            try:
                return await self.client.aio.batches.get(name=name)
            except errors.APIError as error:
                if error.code == 404:
                    return None
                raise

        return await self._told(get(), f"batch {name}")

    async def _told(self, request: Awaitable[Any], what: str) -> Any:
        """What the service answers."""
        import pydantic
        from google.genai import errors

        try:
            return await request
        except errors.APIError as error:
            said = self.reader.scrubbed(f"HTTP {error.code}, {error.status}"[:300])
            if gemini_run.may_change(error.code):
                raise _Unanswered(said) from error
            raise InputError(f"{what} could not be looked at ({said}); try later") from error
        except (pydantic.ValidationError, errors.UnknownApiResponseError, ValueError) as error:
            raise _Unanswered("not a reply of the API") from error
        except Exception as error:
            if not gemini_run.is_transport(error):
                raise
            raise _Unanswered(type(error).__name__) from error

    def _check_silence(self, said: str, n: int) -> None:
        now = time.monotonic()
        self.silent_since = now if self.silent_since is None else self.silent_since
        if (seconds := now - self.silent_since) >= self.reader.asking.outage_seconds:
            raise InputError(
                f"the service could not be asked for batches for {seconds:.0f} seconds (at last: "
                f"{said}); {n} batch(es) are kept, run the same command later to pick them up"
            )

    def _take_in(self, name: str, text: str, batch: Any) -> None:
        """Keeps all replies of a batch that has ended; one that is gone is asked anew."""
        if batch is None:
            self.reader.store.forget_batch(name)
            return
        state = getattr(batch.state, "value", str(batch.state))
        if state not in _ENDED:
            return
        keys, store = gemini_out.keys(text), self.reader.store
        replies = (batch.dest.inlined_responses if batch.dest else None) or []
        rows = zip(
            keys, gemini_out.questions(store, text), _in_order(replies, len(keys)), strict=True
        )
        found = [row for row in rows if row[2] is not None]
        with store.taking_in(name) as is_out:
            calls = [self._keep(*row) for row in found if is_out]
        for key, *_ in found:
            self.open.pop(key, None)
        if is_out:
            metrics.say(f"  batch {name} ended as {state}: {len(found)} of {len(keys)} replies")
        if calls and all(call.outcome == gemini_run.CUT_OFF for call in calls):
            length, thinking = self.reader.keys
            metrics.say(f"  warning: all were cut off; raise {length} or lower {thinking}")

    def _keep(self, key: str, question: reading.Question | None, reply: Any) -> stores.Call:
        """Keeps one reply, and returns what it took.

        Where nobody knows its question any more, it was paid for all the same. question: as the
        store has it.
        """
        reader = self.reader
        question = self.open.get(key, question)
        call, verdicts = _read(reader, question, reply)
        if question is None:
            reader.store.add_call(reader.identity, call)
            return call
        job = reader.job(question, self.answered if key in self.open else self._store)
        job.attempted(call, job.failed if verdicts is None else verdicts)
        return call

    def _store(
        self, question: reading.Question, call: stores.Call, verdicts: reading.Verdicts
    ) -> None:
        """Keeps the answer to a question that is not this call's."""
        prompt, response, _ = question
        self.reader.store.add(self.reader.identity, prompt, response, call, verdicts)


def _at_work(names: Sequence[str]) -> InputError:
    return InputError(
        f"{len(names)} batch(es) of questions are at work at the service ({', '.join(names[:3])}); "
        "run the same command later to pick the answers up (asking.batch_wait_minutes waits)"
    )


async def _reserve(reader: Any, budget: pacing.Budget, part: Part) -> float:
    """US dollars that the batch is expected to cost; they and its calls count from now on."""
    asking = reader.asking
    price = sum(asking.batch_discount * reader.expected_price(job) for _, job in part)
    while not (found := budget.reserve(price, len(part))):
        if found is None:  # what others have in flight may turn out cheaper
            await asyncio.sleep(_LOOK)
            continue
        raise InputError(
            f"a batch of {len(part)} questions would cost about {price:.4f} US dollars and "
            f"go beyond the budget ({budget.calls} calls and {budget.price:.4f} US dollars are "
            f"spent or at work; asking.budget_usd={asking.budget_usd}, asking.budget_calls="
            f"{asking.budget_calls}); raise it"
        )
    return price


def _parts(reader: Any, questions: Sequence[reading.Question]) -> Iterator[Part]:
    """Parts that one batch may hold."""
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


def _in_order(replies: Sequence[Any], n: int) -> list[Any]:
    """Replies by the number of their request; None where there is none."""
    found: list[Any] = [None] * n
    for position, reply in enumerate(replies):
        given = (reply.metadata or {}).get("key", str(position))
        if given.isdigit() and int(given) < n:
            found[int(given)] = reply
    return found


def _read(
    reader: Any, question: reading.Question | None, reply: Any
) -> tuple[stores.Call, reading.Verdicts | None]:
    """(call, verdicts); None where the reply has none."""
    if reply.response is None:
        said = reply.error.message if reply.error else "no response"
        return stores.Call(f"batch error: {said}"[:200]), None
    clauses = () if question is None else question.clauses
    try:
        outcome, reason, verdicts = gemini_reply.verdicts(reply.response, clauses)
    except gemini_reply.Malformed as error:
        outcome, reason, verdicts = f"malformed: {error}", "", None
    return reader.call(reply.response, outcome, reason, reader.asking.batch_discount), verdicts
