"""Proposals written by Gemini under the instruction of the new policy; what is paid for is kept.

A proposal whose every attempt failed is not: it is asked for again the next time.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trace_jax import policy as policies
from trace_jax import processes, records, respond
from trace_jax.judges import gemini_reply, gemini_service
from trace_jax.judges import store as stores
from trace_jax.judges.gemini_job import Asking, Job, Settings
from trace_jax.writers import instruction

_THOUGHTS = 8192  # tokens of room for thinking where the model decides how much
_KEYS = "correct.max_new_tokens", "correct.gemini_thinking_tokens"


def longest(max_new_tokens: int, thinking_tokens: int) -> int:
    """Tokens of the longest reply: a proposal, with its room for thinking."""
    return max_new_tokens + (thinking_tokens if thinking_tokens >= 0 else _THOUGHTS)


class GeminiWriter:
    """Asks for one reply a proposal, and keeps every one in a file before it is judged.

    Args:
      settings: max_output_tokens is of the proposal alone, thinking comes on top.
      kept: the judgement store, which counts calls and money.
      proposals: file of {"id", "response"}, gone on with after a restart.
    """

    def __init__(
        self,
        policy: policies.Policy,
        settings: Settings,
        asking: Asking,
        kept: stores.Store,
        proposals: Path,
    ):
        self.name = f"gemini:{settings.model}"
        self._longest = settings.max_output_tokens
        whole = longest(self._longest, settings.thinking_tokens)
        self._thinks = whole > self._longest
        self._system = instruction.system(policy)
        self._proposals = proposals
        digest = hashlib.sha256(self._system.encode()).hexdigest()[:16]
        parameters = dataclasses.asdict(settings)
        del parameters["model"], parameters["clauses_per_call"]
        self._identity = stores.Reader(
            "gemini-writer", settings.model, json.dumps(parameters, sort_keys=True), digest
        )
        self._service = gemini_service.Service(
            dataclasses.replace(settings, max_output_tokens=whole),
            asking,
            kept,
            self._identity,
            _KEYS,
        )
        named = json.dumps(list(self._identity))
        self._writer = hashlib.sha256(named.encode()).hexdigest()[:16]  # whose a proposal is

    def write(
        self, prompts: Sequence[respond.Prompt], *, first: int, n: int
    ) -> list[list[str | None]]:
        """See `writers.Writer`. Of several processes the first one asks."""
        wanted = [(p, number) for p in prompts for number in range(first, first + n)]
        with records.JsonlAppender(self._proposals) as out:
            missing = [(p, k) for p, k in wanted if self._key(p, k) not in out.ids]
            if missing:
                jobs = [self._job(p, k, out) for p, k in missing]
                processes.from_first(lambda: self._service.run(jobs))
        rows = (row for _, row in records.read_jsonl(self._proposals))
        found = {row["id"]: row["response"] for row in rows}
        return [[found.get(self._key(p, k)) for k in range(first, first + n)] for p in prompts]

    def price(self) -> float:
        """US dollars of all attempts of this writer in the store."""
        return self._service.store.spent(self._identity).price

    def _key(self, prompt: respond.Prompt, number: int) -> str:
        return f"{self._writer}-{prompt.id}-{number}"

    def _job(self, prompt: respond.Prompt, number: int, out: records.JsonlAppender) -> Job:
        def attempted(call: stores.Call, text: str | None) -> None:
            self._service.store.add_call(self._identity, call)
            if text is not None:
                out.append([{"id": self._key(prompt, number), "response": text}])

        material = instruction.material(prompt.prompt)
        most = self._service.settings.max_output_tokens
        return Job(self._system, material, {}, self._read, attempted, None, most)

    def _read(self, response: Any) -> tuple[str, str, str]:
        """(outcome, reason, text); a reply that the service withholds is an empty text."""
        blocked = gemini_reply.blocked(response)
        if blocked:
            return blocked, "", ""
        text = gemini_reply.finished_text(response).strip()
        usage = response.usage_metadata
        written = (usage.candidates_token_count or 0) if usage is not None else 0
        if self._thinks and written > self._longest:  # it filled the room for thinking
            raise gemini_reply.Malformed("longer than was asked for")
        return "ok", "", text
