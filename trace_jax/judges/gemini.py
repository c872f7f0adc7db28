"""Gemini as a reader, through google-genai's asynchronous client.

The policy comes first, as the system instruction, the same bytes for equal clauses, so that the
service finds it in its prefix cache. Replies are structured and checked; whatever is wrong with one
is asked again, and in the end an error, never a guess. Keys come from the environment alone.
"""

import asyncio
import dataclasses
import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

from trace_jax import records
from trace_jax.errors import InputError
from trace_jax.judges import gemini_reply, pacing, reading, template
from trace_jax.judges import store as stores

_KEYS = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
_UNREACHABLE = 10  # attempts in a row that reach nobody, at least, before the service is down
_TOKEN = 4.0  # characters, for what an attempt is expected to cost
_EXPECTED_OUTPUT = 150  # tokens
_HARMS = ("HARASSMENT", "HATE_SPEECH", "SEXUALLY_EXPLICIT", "DANGEROUS_CONTENT")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What changes answers; config section judge.gemini."""

    model: str
    temperature: float
    max_output_tokens: int
    thinking_tokens: int
    clauses_per_call: int


@dataclasses.dataclass(frozen=True)
class Asking:
    """How the service is asked; the keys of config section `asking` that it needs."""

    vertex_project: str
    vertex_location: str
    concurrency: int
    requests_per_minute: float
    timeout_seconds: float
    tries: int
    backoff_seconds: float
    outage_seconds: float
    budget_usd: float
    budget_calls: int
    price_input: float
    price_cached: float
    price_output: float
    batch: bool
    batch_discount: float
    batch_wait_minutes: float

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> "Asking":
        """From the whole section."""
        return cls(**{field.name: section[field.name] for field in dataclasses.fields(cls)})

    def price(self, input_tokens: int, cached_tokens: int, output_tokens: int) -> float:
        """US dollars."""
        fresh = max(0, input_tokens - cached_tokens)
        millionths = fresh * self.price_input + cached_tokens * self.price_cached
        return (millionths + output_tokens * self.price_output) / 1e6


@dataclasses.dataclass(frozen=True)
class Job:
    """A question ready to be sent.

    Attributes:
      read: response -> (outcome, reason, result); Malformed where it is not what was asked.
      attempted: takes the call, and the result or None where there will be another attempt.
      failed: the result after the last attempt.
    """

    instruction: str
    material: str
    schema: Mapping[str, Any]
    read: Callable[[Any], tuple[str, str, Any]]
    attempted: Callable[[stores.Call, Any], None]
    failed: Any


class _Stopped(Exception):
    """No more attempts; what was found stays."""


class GeminiReader:
    """Answers questions by calls to the Gemini API, the Developer API's or Vertex AI's.

    Raises:
      InputError: no key, or the settings ask for the impossible.
    """

    collective = False

    def __init__(self, settings: Settings, asking: Asking, kept: stores.Store):
        self.settings, self.asking, self.store = settings, asking, kept
        self.clauses_per_call = settings.clauses_per_call
        parameters = dataclasses.asdict(settings)
        del parameters["model"], parameters["clauses_per_call"]
        digest = hashlib.sha256(f"{template.HASH}{gemini_reply.HASH}".encode()).hexdigest()[:16]
        self.identity = stores.Reader(
            "gemini", settings.model, json.dumps(parameters, sort_keys=True), digest
        )
        if asking.concurrency < 1 or asking.tries < 1:
            raise InputError("asking.concurrency and asking.tries must be at least 1")
        self._key = "" if asking.vertex_project else _key()

    def ask(
        self,
        questions: Sequence[reading.Question],
        answered: Callable[[reading.Question, stores.Call, reading.Verdicts], None],
    ) -> None:
        """Answers all questions; see `reading.Reader`."""
        if self.asking.batch:
            from trace_jax.judges import gemini_batch

            _run(gemini_batch.ask(self, questions, answered))
        else:
            _run(self._ask_all([self.job(q, answered) for q in questions]))

    def compare(
        self,
        questions: Sequence[reading.Comparison],
        answered: Callable[[reading.Comparison, stores.Call, str | None], None],
    ) -> None:
        """The same for comparisons; never as a batch."""
        jobs = [
            Job(
                template.comparison_instruction(q.clauses),
                template.comparison_material(q.prompt, q.a, q.b),
                gemini_reply.comparison_schema(),
                gemini_reply.better,
                lambda call, answer, q=q: answered(q, call, answer),
                None,
            )
            for q in questions
        ]
        _run(self._ask_all(jobs))

    def job(
        self,
        question: reading.Question,
        answered: Callable[[reading.Question, stores.Call, reading.Verdicts], None],
    ) -> Job:
        """The question, ready to be sent."""
        clauses = question.clauses
        return Job(
            template.instruction(clauses),
            template.material(question.prompt, question.response),
            gemini_reply.verdict_schema(clauses),
            lambda response: gemini_reply.verdicts(response, clauses),
            lambda call, verdicts: answered(question, call, verdicts or {}),
            dict.fromkeys(clauses, records.ClauseVerdict("error", None)),
        )

    def client(self) -> Any:
        """A google-genai client; it does not try again by itself."""
        import google.auth.exceptions
        import httpx2
        from google import genai

        limits = httpx2.Limits(
            max_connections=self.asking.concurrency,
            max_keepalive_connections=self.asking.concurrency,
        )
        options = genai.types.HttpOptions(
            timeout=int(1000 * self.asking.timeout_seconds), async_client_args={"limits": limits}
        )
        try:
            if not self.asking.vertex_project:
                return genai.Client(api_key=self._key, http_options=options, vertexai=False)
            return genai.Client(
                vertexai=True,
                project=self.asking.vertex_project,
                location=self.asking.vertex_location,
                http_options=options,
            )
        except (google.auth.exceptions.GoogleAuthError, ValueError) as error:
            raise _no_credentials(error) from error

    def request(self, job: Job) -> Any:
        """GenerateContentConfig of a job; harmful text has to be judged, so no filter is on."""
        from google.genai import types

        thinking = None
        if self.settings.thinking_tokens >= 0:
            thinking = types.ThinkingConfig(thinking_budget=self.settings.thinking_tokens)
        return types.GenerateContentConfig(
            system_instruction=job.instruction,
            temperature=self.settings.temperature,
            max_output_tokens=self.settings.max_output_tokens,
            thinking_config=thinking,
            response_mime_type="application/json",
            response_json_schema=dict(job.schema),
            safety_settings=[
                types.SafetySetting(category=f"HARM_CATEGORY_{harm}", threshold="OFF")
                for harm in _HARMS
            ],
        )

    def call(self, response: Any, outcome: str, reason: str, discount: float = 1.0) -> stores.Call:
        """What is kept of a reply."""
        tokens = gemini_reply.tokens(response)
        price = discount * self.asking.price(*tokens)
        raw = response.model_dump_json(exclude_none=True, exclude={"sdk_http_response", "parsed"})
        return stores.Call(outcome, *tokens, price, reason, self.scrubbed(raw))

    def scrubbed(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self._key, "***") if self._key else text

    def expected_price(self, job: Job) -> float:
        """US dollars, roughly."""
        characters = len(job.instruction) + len(job.material)
        return self.asking.price(int(characters / _TOKEN), 0, _EXPECTED_OUTPUT)

    def budget(self) -> pacing.Budget:
        """What is left after everything in the store."""
        spent = self.store.spent()
        return pacing.Budget(
            price=self.asking.budget_usd,
            calls=self.asking.budget_calls,
            spent_price=spent.price,
            spent_calls=spent.calls,
        )

    async def _ask_all(self, jobs: Sequence[Job]) -> None:
        run = _Run(self, jobs)
        try:
            await run.all()
        finally:
            await run.close()


class _Run:
    """One run over jobs: workers that share a pace, a budget and a reason to stop."""

    def __init__(self, reader: GeminiReader, jobs: Sequence[Job]):
        self.reader, self.total, self.done = reader, len(jobs), 0
        self.jobs: Iterator[Job] = iter(jobs)
        self.client = reader.client()
        self.pace = pacing.Pace(reader.asking.requests_per_minute)
        self.budget = reader.budget()
        self.rng = random.Random(0)
        self.in_vain, self.reached = 0, time.monotonic()  # attempts in a row that reached nobody
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

    async def _work(self) -> None:
        for job in self.jobs:
            try:
                await self._answer(job)
            except _Stopped:
                return
            self.done += 1

    async def _answer(self, job: Job) -> None:
        """Attempts until there is a result; the last failure gives the failed one."""
        for attempt in range(1, self.reader.asking.tries + 1):
            await self.pace.turn()
            call, result, again, wish = await self._attempt(job)
            last = result is None and (not again or attempt == self.reader.asking.tries)
            job.attempted(call, job.failed if last else result)
            if result is not None or last:
                return
            await asyncio.sleep(
                pacing.delay(attempt, wish, self.reader.asking.backoff_seconds, self.rng)
            )

    async def _attempt(self, job: Job) -> tuple[stores.Call, Any, bool, float | None]:
        """(call, result or None, whether to try again, seconds that the service asks to wait)."""
        expected = self.reader.expected_price(job)
        if self.stopped is None and not self.budget.reserve(expected):
            self._stop(self._out_of_budget())
        if self.stopped is not None:
            raise _Stopped
        call = stores.Call("cancelled")
        try:
            call, result, again, wish = await self._send(job)
            return call, result, again, wish
        finally:
            self.budget.settle(expected, call.price)

    async def _send(self, job: Job) -> tuple[stores.Call, Any, bool, float | None]:
        import pydantic
        from google.genai import errors

        asking, settings = self.reader.asking, self.reader.settings
        try:
            async with asyncio.timeout(asking.timeout_seconds):
                response = await self.client.aio.models.generate_content(
                    model=settings.model, contents=job.material, config=self.reader.request(job)
                )
        except errors.APIError as error:
            self._reached()
            return self._refused(job, error)
        except (pydantic.ValidationError, errors.UnknownApiResponseError, ValueError) as error:
            self._reached()
            raw = self.reader.scrubbed(str(error))
            return stores.Call("malformed: not a reply of the API", raw=raw), None, True, None
        except Exception as error:
            if _is_of(error, "google.auth") and type(error).__name__ != "TransportError":
                self._stop(_no_credentials(error))
                raise _Stopped from error
            if not _is_transport(error):
                raise
            return self._unreached(error), None, True, None
        self._reached()
        try:
            outcome, reason, result = job.read(response)
        except gemini_reply.Malformed as error:
            call = self.reader.call(response, f"malformed: {error}", "")
            return call, None, True, None
        return self.reader.call(response, outcome, reason), result, False, None

    def _refused(self, job: Job, error: Any) -> tuple[stores.Call, Any, bool, float | None]:
        said = self.reader.scrubbed(f"{error.status}: {error.message}"[:300])
        if error.code in (401, 403) or "API_KEY_INVALID" in json.dumps(error.details, default=str):
            self._stop(_wrong_key(error.code, said, self.reader.asking))
        if error.code == 404:
            self._stop(
                InputError(
                    f"judge.gemini.model={self.reader.settings.model!r}: the service does not know "
                    f"it ({said}); give another model"
                )
            )
        call = stores.Call(f"http {error.code}", raw=said)
        again = error.code in (408, 409, 429) or error.code >= 500
        headers = getattr(error.response, "headers", None) or {}
        if self.stopped is not None:
            job.attempted(call, None)
            raise _Stopped
        return call, None, again, pacing.wish(headers, error.details)

    def _reached(self) -> None:
        self.in_vain, self.reached = 0, time.monotonic()

    def _unreached(self, error: Exception) -> stores.Call:
        self.in_vain += 1
        kind, since = type(error).__name__, time.monotonic() - self.reached
        if self.in_vain >= _UNREACHABLE and since >= self.reader.asking.outage_seconds:
            self._stop(
                InputError(
                    f"the judge could not be reached for {since:.0f} seconds ({self.in_vain} "
                    f"attempts, the last ended by {kind}); {self._progress()}"
                )
            )
        return stores.Call(f"no reply: {kind}", raw=self.reader.scrubbed(str(error))[:300])

    def _stop(self, error: InputError) -> None:
        if self.stopped is None:
            self.stopped = error

    def _out_of_budget(self) -> InputError:
        asking = self.reader.asking
        limits = f"asking.budget_usd={asking.budget_usd}, asking.budget_calls={asking.budget_calls}"
        return InputError(
            f"the judge's budget is spent ({self.budget.calls} calls, {self.budget.price:.4f} US "
            f"dollars in all; {limits}); raise it and {self._progress()}"
        )

    def _progress(self) -> str:
        return (
            f"run the same command to go on: {self.done} of {self.total} questions of this run are "
            "answered and kept"
        )


def _key() -> str:
    for name in _KEYS:
        if os.environ.get(name, "").strip():
            return os.environ[name].strip()
    raise InputError(
        f"judge gemini needs a key in the environment: export {_KEYS[0]}=... (a key of Google AI "
        "Studio), or set asking.vertex_project for Vertex AI"
    )


def _wrong_key(code: int, said: str, asking: Asking) -> InputError:
    what = "these credentials" if asking.vertex_project else f"the key in {' or '.join(_KEYS)}"
    return InputError(f"the judge's service refuses {what} (HTTP {code}, {said}); mend that first")


def _is_transport(error: Exception) -> bool:
    """Whether it means that no reply came: timeouts, dropped connections, names not found."""
    libraries = ("httpx", "httpx2", "httpcore", "httpcore2", "google.auth")
    return isinstance(error, OSError) or any(_is_of(error, library) for library in libraries)


def _is_of(error: Exception, library: str) -> bool:
    return f"{type(error).__module__}.".startswith(f"{library}.")


def _no_credentials(error: Exception) -> InputError:
    return InputError(
        f"Vertex AI: no credentials ({_first_line(error)}); run gcloud auth application-default "
        "login, or unset asking.vertex_project and set GEMINI_API_KEY"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Runs to the end, also where a loop runs already, as in notebooks."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        _unwrapped(work)
        return
    failure: list[BaseException] = []

    def target() -> None:
        try:
            _unwrapped(work)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


def _unwrapped(work: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.run(work)
    except BaseExceptionGroup as group:  # of several workers' errors, the first says it
        raise group.exceptions[0] from None
