"""The Gemini API as questions see it: client, request, price, budget; through google-genai.

The Developer API's (a key from the environment alone) or Vertex AI's.
"""

import asyncio
import os
import threading
from collections.abc import Coroutine, Sequence
from typing import Any

from trace_jax.errors import InputError
from trace_jax.judges import gemini_reply, gemini_run, pacing
from trace_jax.judges import store as stores
from trace_jax.judges.gemini_job import KEYS, Asking, Job, Settings, check_prices

_TOKEN = 4.0  # characters, for what an attempt is expected to cost
_HARMS = ("HARASSMENT", "HATE_SPEECH", "SEXUALLY_EXPLICIT", "DANGEROUS_CONTENT")


class Service:
    """A model of the service, how it is asked, and the store that counts what it takes.

    Args:
      identity: under what its calls are stored.
      keys: of the config: the one for the length of a reply, the one for thinking.

    Raises:
      InputError: no key, or the settings ask for the impossible.
    """

    def __init__(
        self,
        settings: Settings,
        asking: Asking,
        kept: stores.Store,
        identity: stores.Reader,
        keys: tuple[str, str],
    ):
        self.settings, self.asking, self.store = settings, asking, kept
        self.identity, self.keys = identity, keys
        if asking.concurrency < 1 or asking.tries < 1:
            raise InputError("asking.concurrency and asking.tries must be at least 1")
        self._key = check_access(asking.vertex_project)
        check_prices(settings.model, asking)

    def run(self, jobs: Sequence[Job]) -> None:
        """Sends all jobs, at the pace and within the budget of `asking`.

        Raises:
          InputError: nothing can be asked any more; what was answered was told to its job.
        """
        run_to_end(self._ask_all(jobs))

    def http(self) -> Any:
        """The connections of a client, to be closed by whoever made them.

        Ours, because google-genai changes its library, and its errors, where aiohttp is installed.
        """
        import httpx2

        limits = httpx2.Limits(
            max_connections=self.asking.concurrency,
            max_keepalive_connections=self.asking.concurrency,
        )
        return httpx2.AsyncClient(limits=limits, follow_redirects=True)

    def client(self, http: Any = None) -> Any:
        """A google-genai client over `http`; it does not try again by itself."""
        import google.auth.exceptions
        from google import genai

        options = genai.types.HttpOptions(
            timeout=int(1000 * self.asking.timeout_seconds), httpx_async_client=http
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
            response_mime_type="application/json" if job.schema else None,
            response_json_schema=dict(job.schema) or None,
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
        return self.asking.price(int(characters / _TOKEN), 0, job.reply_tokens)

    def budget(self) -> pacing.Budget:
        """What is left after everything in the store, batches that are out among it."""
        return pacing.Budget(
            self.store,
            price=self.asking.budget_usd,
            calls=self.asking.budget_calls,
            seconds=self.asking.timeout_seconds,
        )

    async def _ask_all(self, jobs: Sequence[Job]) -> None:
        run = gemini_run.Run(self, jobs)
        try:
            await run.all()
        finally:
            await run.close()


def check_access(vertex_project: str) -> str:
    """The key in the environment; "" for Vertex AI, which has credentials of its own.

    Raises:
      InputError: there is none, or it has a character that no key has; it is never shown.
    """
    if vertex_project:
        return ""
    for name in KEYS:
        if key := os.environ.get(name, "").strip():
            _check_characters(name, key)
            return key
    raise InputError(
        f"gemini needs a key in the environment: export {KEYS[0]}=... (a key of Google AI "
        "Studio), or set asking.vertex_project for Vertex AI"
    )


def _check_characters(name: str, key: str) -> None:
    """Others cannot stand in the header of a request, such as quotes that a program made curly."""
    for place, character in enumerate(key, start=1):
        if not (character.isascii() and character.isprintable()):
            raise InputError(
                f"{name}: character {place} of {len(key)} is none of a key (a curly quote, an "
                "accent or a line break that was copied along); copy the key again"
            )


def run_to_end(work: Coroutine[Any, Any, None]) -> None:
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
