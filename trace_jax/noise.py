"""Corrupted verdicts, for studies of how much a method suffers from a judge that errs.

As in the paper's study (arXiv 2511.02623): a share of the records is corrupted, half of them by
another action drawn at random, half by exchanging the verdicts of the two responses.
"""

import dataclasses
import random
from collections.abc import Sequence

from trace_jax import records

_ACTIONS = ("INVERT", "PUNISH", "RETAIN")


@dataclasses.dataclass(frozen=True)
class Corruption:
    """What is done to a record: "flip", with how far the action moves on, or "swap"."""

    kind: str
    steps: int = 0

    def applied(
        self, chosen: records.Verdict, rejected: records.Verdict, action: str
    ) -> tuple[records.Verdict, records.Verdict, str | None]:
        """The corrupted verdicts and action; None: the action that the verdicts give."""
        if self.kind == "swap":
            return rejected, chosen, None
        other = _ACTIONS[(_ACTIONS.index(action) + self.steps) % len(_ACTIONS)]
        return *records.verdicts_of(other, chosen, rejected), other


def plan(ids: Sequence[str], *, share: float, seed: int) -> dict[str, Corruption]:
    """Which records are corrupted and how: floor(share n) of them, a half each way."""
    rng = random.Random(seed)
    drawn = rng.sample(ids, int(share * len(ids)))
    flipped, swapped = drawn[::2], drawn[1::2]
    flips = {i: Corruption("flip", rng.randrange(1, len(_ACTIONS))) for i in flipped}
    return flips | dict.fromkeys(swapped, Corruption("swap"))
