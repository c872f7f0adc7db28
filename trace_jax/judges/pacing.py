"""When a service may be asked: requests a minute, delays between attempts, and a budget."""

import asyncio
import random
import sqlite3
import time
from collections.abc import Mapping
from typing import Any

from trace_jax.judges import gemini_out, store_file
from trace_jax.judges import store as stores

_GRACE = 30.0  # seconds for which a reservation outlasts the longest attempt
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
    """What may still be spent by all who share a judgement store.

    Attempts in flight, also those of other processes, count with what they are expected to cost,
    and of two processes with the same question one asks.

    price, calls: the most in US dollars and attempts of the whole store, batches that are out among
    them; 0 for no limit. seconds: that an attempt may take.

    Attributes:
      price, calls: what was spent when it was last looked at.
    """

    def __init__(self, kept: stores.Store, *, price: float, calls: int, seconds: float):
        self.price, self.calls = 0.0, 0
        self._kept, self._limits, self._seconds = kept, (price, calls), seconds + _GRACE
        self._owner = store_file.owner()
        self._open_price, self._open_calls, self._submits = 0.0, 0, False
        self._newest, self._done = 0, (0.0, 0)  # attempts so far, and what they took
        self._names: frozenset[str] | None = None  # of batches that are out
        self._out = 0.0, 0

    def reserve(self, expected: float, n: int = 1) -> bool | None:
        """Whether n more attempts, together of this price, are within it; if so they count.

        None: not yet; it depends on what those in flight will have cost.
        """
        if not any(self._limits) and not self._submits:
            return True
        price, calls = self._limits
        with self._kept.writing() as db:
            self._look(db)
            held = store_file.held(db, self._owner)
            for more, now in ((store_file.Held(0, 0.0, False), False), (held, None)):
                if calls and self.calls + more.calls + n > calls:
                    return now
                if price and self.price + more.price + expected > price:
                    return now
            self._hold(db, n, expected)
        return True

    def settle(self, expected: float, n: int = 1) -> None:
        """The attempts are over, and what they cost is in the store."""
        if any(self._limits) or self._submits:
            with self._kept.writing() as db:
                self._hold(db, -n, -expected)

    def claim(self, question: str) -> bool:
        """Whether nobody else asks this now; if so others wait until `release`, or for a while."""
        if not question or self._kept.path == ":memory:":
            return True
        with self._kept.writing() as db:
            return store_file.claim(db, self._owner, question, self._seconds)

    def release(self, question: str) -> None:
        """The question is answered, or given up; nothing where it was not claimed."""
        if question and self._kept.path != ":memory:":
            with self._kept.writing() as db:
                store_file.release(db, self._owner, question)

    def begin_submitting(self) -> bool:
        """Whether this one may submit batches now, as nobody else does; until `end_submitting`."""
        with self._kept.writing() as db:
            if store_file.held(db, self._owner).batch:
                return False
            self._submits = True
            self._hold(db, 0, 0.0)
        return True

    def end_submitting(self) -> None:
        """Others may submit batches."""
        self._submits = False
        with self._kept.writing() as db:
            self._hold(db, 0, 0.0)

    def _look(self, db: sqlite3.Connection) -> None:
        """Brings `price` and `calls` up to date."""
        self._newest, n, price = store_file.spent_since(db, self._newest)
        self._done = self._done[0] + price, self._done[1] + n
        names = store_file.batch_names(db)
        if names != self._names:
            self._names, self._out = names, gemini_out.expected(self._kept)
        self.price, self.calls = (a + b for a, b in zip(self._done, self._out, strict=True))

    def _hold(self, db: sqlite3.Connection, calls: int, price: float) -> None:
        self._open_calls += calls
        self._open_price = self._open_price + price if self._open_calls else 0.0
        open_ = self._open_calls, self._open_price
        store_file.hold(db, self._owner, *open_, self._seconds, self._submits)
