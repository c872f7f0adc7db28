"""Corrupted verdicts, for studies of how much a method suffers from a judge that errs.

`plan` is the paper's study (arXiv 2511.02623): a share of the records is corrupted, half of them by
another action drawn at random, half by exchanging the verdicts of the two responses.
`DoubtfulJudge` errs on single responses, and its probabilities are calibrated: for soft triage.
"""

import dataclasses
import hashlib
import random
from collections.abc import Callable, Sequence

from trace_jax import judges, records

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


class DoubtfulJudge:
    """A judge whose verdicts are wrong as often as their probabilities say.

    Of every response its confidence q is drawn evenly from 1 - 2 error to 1; with probability 1 - q
    the verdict is the opposite, and P(compliant) is q for what it finds compliant. The same
    response to the same prompt always gets the same answer.

    Args:
      judge: who knows; error: mean share of wrong verdicts, up to 0.25.
    """

    def __init__(self, judge: judges.Judge, *, error: float, seed: int):
        self._judge, self._error, self._seed = judge, error, seed
        self.id = f"{judge.id} in doubt"
        self.keeps_answers = judge.keeps_answers

    def judge(
        self, items: Sequence[judges.Item], *, progress: Callable[[int], None] | None = None
    ) -> list[records.Verdict]:
        """Verdicts of the judge in doubt; undecided ones stay as they are."""
        found = self._judge.judge(items, progress=progress)
        return [self._doubted(item, verdict) for item, verdict in zip(items, found, strict=True)]

    def _doubted(self, item: judges.Item, verdict: records.Verdict) -> records.Verdict:
        if verdict.compliant is None:
            return verdict
        prompt, response = item[0], item[1]
        key = f"{self._seed}\0{records.content_id(prompt, response)}"
        rng = random.Random(hashlib.sha256(key.encode()).digest())
        confidence = 1 - 2 * self._error * rng.random()
        compliant = verdict.compliant == (rng.random() < confidence)
        return dataclasses.replace(
            verdict,
            status="compliant" if compliant else "violating",
            probability=confidence if compliant else 1 - confidence,
        )
