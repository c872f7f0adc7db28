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
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from trace_jax import records
from trace_jax.errors import InputError
from trace_jax.judges import gemini_reply, gemini_run, pacing, reading, template
from trace_jax.judges import store as stores
from trace_jax.judges.gemini_job import KEYS, Asking, Job, Settings

_TOKEN = 4.0  # characters, for what an attempt is expected to cost
_EXPECTED_OUTPUT = 150  # tokens
_HARMS = ("HARASSMENT", "HATE_SPEECH", "SEXUALLY_EXPLICIT", "DANGEROUS_CONTENT")


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
            raise gemini_run.no_credentials(error) from error

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
        run = gemini_run.Run(self, jobs)
        try:
            await run.all()
        finally:
            await run.close()


def _key() -> str:
    for name in KEYS:
        if os.environ.get(name, "").strip():
            return os.environ[name].strip()
    raise InputError(
        f"judge gemini needs a key in the environment: export {KEYS[0]}=... (a key of Google AI "
        "Studio), or set asking.vertex_project for Vertex AI"
    )


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
