"""What is asked of Gemini and how: the settings that change answers, and those that do not."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from trace_jax import metrics
from trace_jax.judges import store as stores

KEYS = ("GEMINI_API_KEY", "GOOGLE_API_KEY")  # environment variables, the first that is set
_REPLY, _A_CLAUSE = 60, 25  # tokens of a reply: its frame with the reason, the answer on a clause


@dataclasses.dataclass(frozen=True)
class Settings:
    """What changes answers; config section judge.gemini."""

    model: str
    temperature: float
    max_output_tokens: int
    thinking_tokens: int
    clauses_per_call: int

    def reply_tokens(self, clauses: int) -> int:
        """What a reply on so many clauses takes, thoughts included; for plan and budget alike."""
        if self.thinking_tokens < 0:  # as many as the model likes
            return self.max_output_tokens
        return min(self.max_output_tokens, _REPLY + _A_CLAUSE * clauses + self.thinking_tokens)


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
      reply_tokens: what the reply is expected to take.
      kept: whether another process answered it in the meantime; looked at before every attempt.
      question: names it to other processes, so that one of them asks; "": all do.
    """

    instruction: str
    material: str
    schema: Mapping[str, Any]
    read: Callable[[Any], tuple[str, str, Any]]
    attempted: Callable[[stores.Call, Any], None]
    failed: Any
    reply_tokens: int
    kept: Callable[[], bool] = lambda: False
    question: str = ""


@functools.cache
def check_prices(model: str, asking: Asking) -> None:
    """Warns, once, where the prices are the defaults, and the model is not theirs."""
    from trace_jax import config

    defaults = config.base_config()
    default = Asking.of(defaults.asking.to_dict())
    names = ("price_input", "price_cached", "price_output")
    same = all(getattr(asking, name) == getattr(default, name) for name in names)
    if same and model != defaults.judge.gemini.model:
        metrics.say(
            f"  warning: asking.price_* are those of {defaults.judge.gemini.model}, and {model} is "
            "asked: give its prices, or plan and budget count the wrong dollars"
        )
