"""One run over questions to Gemini: attempts at a pace, within a budget, until there is a result.

Errors of the service are sorted here: asked again, given up, or the reason to stop everything.
"""

import asyncio
import collections
import contextlib
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from trace_jax.errors import InputError
from trace_jax.judges import gemini_reply, pacing
from trace_jax.judges import store as stores
from trace_jax.judges.gemini_job import KEYS, Asking, Job

if TYPE_CHECKING:
    from trace_jax.judges.gemini_service import Service

_UNREACHABLE = 10  # attempts in a row that reach nobody, at least, before the service is down
_ALIKE = 5  # refusals, or replies cut off, before any good one: the settings are wrong
CUT_OFF = "malformed: finished by MAX_TOKENS"  # the outcome of a reply that was longer than it may
_LOOK = 0.05  # seconds between two looks at what others have in flight


class _Stopped(Exception):
    """No more attempts; what was found stays."""


class Run:
    """One run over jobs: workers that share a pace, a budget and a reason to stop."""

    def __init__(self, reader: "Service", jobs: Sequence[Job]):
        self.reader, self.total, self.done = reader, len(jobs), 0
        self.works = False  # there was a good reply
        self.refusals: collections.Counter[int] = collections.Counter()  # by HTTP status
        self.cut_off = 0  # replies
        self.jobs = collections.deque(jobs)
        self.http = reader.http()
        self.client = reader.client(self.http)
        self.pace = pacing.Pace(reader.asking.requests_per_minute)
        self.budget, self.reserving = reader.budget(), asyncio.Lock()
        self.rng = random.Random(0)
        self.in_vain, self.last_answer = 0, time.monotonic()  # attempts in a row without an answer
        self.stopped: InputError | None = None

    async def all(self) -> None:
        n = min(self.reader.asking.concurrency, self.total)
        async with asyncio.TaskGroup() as group:
            for _ in range(n):
                group.create_task(self._work())
        if self.stopped is not None:
            raise self.stopped

    async def close(self) -> None:
        await self.client.aio.aclose()
        await self.http.aclose()

    async def _work(self) -> None:
        while self.jobs:
            job = self.jobs.popleft()
            try:
                answered = await self._answer(job)
            except _Stopped:
                return
            finally:
                self.budget.release(job.question)
            self.done += answered
            if not answered:
                self.jobs.append(job)
                await asyncio.sleep(_LOOK)

    async def _answer(self, job: Job) -> bool:
        """Attempts until there is a result; the last failure gives the failed one.

        Returns:
          False where another process is asking just now, and will keep an answer, or fail.
        """
        settings, asking, cut_off = self.reader.settings, self.reader.asking, 0
        for attempt in itertools.count(1):
            if job.kept():
                return True
            await self.pace.turn()
            async with self._reserved(job):
                if not self.budget.claim(job.question):
                    return False
                if job.kept():
                    return True
                call, result, again, wish = await self._send(job)
                cut_off += call.outcome == CUT_OFF
                again &= cut_off < 2 or settings.temperature > 0  # it would be cut off again
                last = result is None and (not again or attempt >= asking.tries)
                job.attempted(call, job.failed if last else result)
            if result is not None or last:
                return True
            if self.stopped is not None:
                raise _Stopped
            await asyncio.sleep(pacing.delay(attempt, wish, asking.backoff_seconds, self.rng))

    @contextlib.asynccontextmanager
    async def _reserved(self, job: Job) -> AsyncIterator[None]:
        """Within, an attempt counts in the budget; it begins once there is room for it."""
        expected = self.reader.expected_price(job)
        async with self.reserving:  # one of the workers looks
            while self.stopped is None and not (found := self.budget.reserve(expected)):
                if found is None:
                    await asyncio.sleep(_LOOK)
                else:
                    self._stop(self._out_of_budget(expected))
        if self.stopped is not None:
            raise _Stopped
        try:
            yield
        finally:
            self.budget.settle(expected)

    async def _send(self, job: Job) -> tuple[stores.Call, Any, bool, float | None]:
        """(call, result or None, whether to try again, seconds that the service asks to wait)."""
        import pydantic
        from google.genai import errors

        asking, settings = self.reader.asking, self.reader.settings
        try:
            async with asyncio.timeout(asking.timeout_seconds):
                response = await self.client.aio.models.generate_content(
                    model=settings.model, contents=job.material, config=self.reader.request(job)
                )
        except errors.APIError as error:
            return self._refused(job, error)
        except (pydantic.ValidationError, errors.UnknownApiResponseError, ValueError) as error:
            self._answered()
            raw = self.reader.scrubbed(str(error))
            return stores.Call("malformed: not a reply of the API", raw=raw), None, True, None
        except Exception as error:
            if _is_of(error, "google.auth") and type(error).__name__ != "TransportError":
                self._stop(no_credentials(error))
                raise _Stopped from error
            if not is_transport(error):
                raise
            return self._unreached(error), None, True, None
        self._answered()
        try:
            outcome, reason, result = job.read(response)
        except gemini_reply.Malformed as error:
            call = self.reader.call(response, f"malformed: {error}", "")
            self.cut_off += call.outcome == CUT_OFF
            if self.cut_off >= _ALIKE and not self._ever_worked():
                self._stop(self._all_cut_off())
            return call, None, True, None
        self.works = True
        return self.reader.call(response, outcome, reason), result, False, None

    def _refused(self, job: Job, error: Any) -> tuple[stores.Call, Any, bool, float | None]:
        said = self.reader.scrubbed(f"{error.status}: {error.message}"[:300])
        if error.code in (401, 403) or "API_KEY_INVALID" in json.dumps(error.details, default=str):
            self._stop(_wrong_key(error.code, said, self.reader.asking))
        if error.code == 404:
            self._stop(
                InputError(
                    f"model {self.reader.settings.model!r}: the service does not know "
                    f"it ({said}); give another model"
                )
            )
        call = stores.Call(f"http {error.code}", raw=said)
        again = may_change(error.code)
        if again:  # an overload, or a quota that is spent: one of the two passes
            self._unanswered(f"HTTP {error.code}, {said}")
        else:
            self._answered()
        self.refusals[error.code] += not again
        # Refusals come faster than replies: of single questions there are less than are in flight.
        most = max(_ALIKE, min(self.reader.asking.concurrency, self.total))
        if self.refusals[error.code] >= most and not self._ever_worked():
            self._stop(self._all_refused(error.code, said))
        headers = getattr(error.response, "headers", None) or {}
        if self.stopped is not None:
            job.attempted(call, None)
            raise _Stopped
        return call, None, again, pacing.wish(headers, error.details)

    def _ever_worked(self) -> bool:
        """In this run or an earlier one: then single questions may be refused for good."""
        self.works = self.works or self.reader.store.has_answered(self.reader.identity)
        return self.works

    def _answered(self) -> None:
        self.in_vain, self.last_answer = 0, time.monotonic()

    def _unreached(self, error: Exception) -> stores.Call:
        kind = type(error).__name__
        self._unanswered(kind)
        return stores.Call(f"no reply: {kind}", raw=self.reader.scrubbed(str(error))[:300])

    def _unanswered(self, how: str) -> None:
        self.in_vain += 1
        since = time.monotonic() - self.last_answer
        if self.in_vain >= _UNREACHABLE and since >= self.reader.asking.outage_seconds:
            self._stop(
                InputError(
                    f"the judge has not answered for {since:.0f} seconds ({self.in_vain} attempts, "
                    f"the last ended by {how}); once it does again, {self._progress()}"
                )
            )

    def _stop(self, error: InputError) -> None:
        if self.stopped is None:
            self.stopped = error

    def _out_of_budget(self, expected: float) -> InputError:
        asking = self.reader.asking
        limits = f"asking.budget_usd={asking.budget_usd}, asking.budget_calls={asking.budget_calls}"
        return InputError(
            f"the judge's budget is spent ({self.budget.calls} calls, {self.budget.price:.4f} US "
            f"dollars in all, the next takes up to {expected:.4f}; {limits}); raise it and "
            f"{self._progress()}"
        )

    def _all_refused(self, code: int, said: str) -> InputError:
        return InputError(
            f"model {self.reader.settings.model!r} refuses what it is sent (HTTP {code} to "
            f"{self.refusals[code]} requests and no good reply to any; the service says: {said}); "
            f"mend that, perhaps by {' or '.join(self.reader.keys)}, and run the same command again"
        )

    def _all_cut_off(self) -> InputError:
        settings, (length, thinking) = self.reader.settings, self.reader.keys
        return InputError(
            f"model {settings.model!r}: {self.cut_off} replies were cut off at "
            f"{settings.max_output_tokens} tokens, thinking included, and none was whole; raise "
            f"{length} or lower {thinking}, and run the same command again"
        )

    def _progress(self) -> str:
        return (
            f"run the same command to go on: {self.done} of {self.total} questions of this run are "
            "answered and kept"
        )


def _wrong_key(code: int, said: str, asking: Asking) -> InputError:
    what = "these credentials" if asking.vertex_project else f"the key in {' or '.join(KEYS)}"
    return InputError(f"the judge's service refuses {what} (HTTP {code}, {said}); mend that first")


def may_change(code: int) -> bool:
    """Whether the same request may get another reply than this HTTP error, a little later."""
    return code in (408, 409, 429) or code >= 500


def is_transport(error: Exception) -> bool:
    """Whether it means that no reply came: timeouts, dropped connections, names not found."""
    libraries = ("httpx", "httpx2", "httpcore", "httpcore2", "google.auth")
    return isinstance(error, OSError) or any(_is_of(error, library) for library in libraries)


def _is_of(error: Exception, library: str) -> bool:
    return f"{type(error).__module__}.".startswith(f"{library}.")


def no_credentials(error: Exception) -> InputError:
    """What to do where Vertex AI's client has none."""
    return InputError(
        f"Vertex AI: no credentials ({_first_line(error)}); run gcloud auth application-default "
        "login, or unset asking.vertex_project and set GEMINI_API_KEY"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
