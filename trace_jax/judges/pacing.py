"""When a service may be asked: requests a minute, delays between attempts, and a budget."""

import asyncio
import random
import time
from collections.abc import Mapping
from typing import Any

_LONGEST_DELAY = 60.0  # seconds between two attempts, unless the service asks for more
_LONGEST_WISH = 600.0  # seconds that a service may ask for


class Pace:
    """Starts at most so many requests a minute, evenly; 0: as many as come."""

    def __init__(self, requests_per_minute: float):
        self._interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0

    async def turn(self) -> None:
        """Returns when the next request may start."""
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + self._interval
        if start > now:
            await asyncio.sleep(start - now)


def delay(attempt: int, wish: float | None, first: float, rng: random.Random) -> float:
    """Seconds before the next attempt: exponential with full jitter, never below the wish.

    attempt: attempts so far, from 1. wish: what the service asked for. first: scale of the first.
    """
    limit = min(_LONGEST_DELAY, first * 2 ** (attempt - 1))
    jitter = rng.uniform(0, limit)
    return jitter if wish is None else min(wish, _LONGEST_WISH) + min(jitter, 1.0)


def wish(headers: Mapping[str, str], body: Any) -> float | None:
    """Seconds that a reply asks to wait: Retry-After, or google.rpc.RetryInfo in its body."""
    after = headers.get("retry-after", "")
    try:
        return max(0.0, float(after))
    except ValueError:
        pass  # a date, or nothing
    error = body.get("error", body) if isinstance(body, dict) else {}
    details = error.get("details") if isinstance(error, dict) else None
    for detail in details if isinstance(details, list) else ():
        text = detail.get("retryDelay") if isinstance(detail, dict) else None
        if isinstance(text, str) and text.endswith("s"):
            try:
                return max(0.0, float(text[:-1]))
            except ValueError:
                continue
    return None


class Budget:
    """What may still be spent; attempts in flight count with what they are expected to cost.

    price, calls: the most in US dollars and attempts, 0 for no limit; spent ones count.
    """

    def __init__(self, *, price: float, calls: int, spent_price: float, spent_calls: int):
        self._limits = price, calls
        self.price, self.calls = spent_price, spent_calls
        self._reserved = 0.0

    def reserve(self, expected: float) -> bool:
        """Whether one more attempt of this expected price is within the budget; if so it counts."""
        price, calls = self._limits
        if calls and self.calls >= calls:
            return False
        if price and self.price + self._reserved + expected > price:
            return False
        self._reserved += expected
        self.calls += 1
        return True

    def settle(self, expected: float, price: float) -> None:
        """The attempt is over and cost this."""
        self._reserved -= expected
        self.price += price
