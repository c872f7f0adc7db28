"""A guard against degenerate text that games a policy: too short, unlikely, or repetitive.

Thresholds come from samples of the base model, so they carry over from tiny to large models. A
    response passes when words >= min_words, mean log-prob per token under the BASE model >= the 5th
    percentile of the base samples' own, share of repeated word 3-grams (1 - distinct / total) <=
    the 99th percentile of the base samples' own.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

REASONS = ("too_short", "unlikely", "repetitive")
LOGPROB_PERCENTILE = 5.0
REPETITION_PERCENTILE = 99.0
_NGRAM = 3
_WORD = re.compile(r"\w+(?:['’]\w+)*")


@dataclasses.dataclass(frozen=True, slots=True)
class Guard:
    """Thresholds: words, nats per token, and a share in 0..1."""

    min_words: int
    min_mean_logprob: float
    max_repetition: float

    def reasons(self, response: str, mean_logprob: float) -> tuple[str, ...]:
        """Why the response fails, of REASONS; empty when it passes. NaN counts as unlikely."""
        failed = (
            len(_words(response)) < self.min_words,
            not mean_logprob >= self.min_mean_logprob,
            repetition(response) > self.max_repetition,
        )
        return tuple(reason for reason, fails in zip(REASONS, failed, strict=True) if fails)

    def passes(self, response: str, mean_logprob: float) -> bool:
        """Whether the response is worth counting at all."""
        return not self.reasons(response, mean_logprob)

    def reason_counts(
        self, responses: Sequence[str], mean_logprobs: Sequence[float]
    ) -> dict[str, int]:
        """Responses per reason, and those that passed; one may fail for several reasons."""
        counts = dict.fromkeys(("passed", *REASONS), 0)
        for response, mean_logprob in zip(responses, mean_logprobs, strict=True):
            for reason in self.reasons(response, mean_logprob) or ("passed",):
                counts[reason] += 1
        return counts

    def to_json(self) -> dict[str, Any]:
        """The thresholds for eval.json, with the percentiles that they are."""
        return dataclasses.asdict(self) | {
            "logprob_percentile": LOGPROB_PERCENTILE,
            "repetition_percentile": REPETITION_PERCENTILE,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Guard":
        """Reads back `to_json`."""
        return cls(**{field.name: stored[field.name] for field in dataclasses.fields(cls)})


def fit(
    responses: Sequence[str], token_logprobs: Sequence[np.ndarray], *, min_words: int = 3
) -> Guard:
    """Thresholds from base samples: texts, and the log-probs of their tokens under the base model.

    Samples without tokens count for the repetition only. min_words: 3 is the shortest text with a
    3-gram.
    """
    if len(responses) != len(token_logprobs):
        raise ValueError(f"{len(responses)} responses but {len(token_logprobs)} rows of log-probs")
    mean_N = np.array([np.mean(row) for row in token_logprobs if np.size(row)])
    if not mean_N.size or not np.isfinite(mean_N).all():
        raise ValueError("the guard needs base samples with finite log-probs per token")
    repetition_N = np.array([repetition(response) for response in responses])
    return Guard(
        min_words=min_words,
        min_mean_logprob=float(np.percentile(mean_N, LOGPROB_PERCENTILE)),
        max_repetition=float(np.percentile(repetition_N, REPETITION_PERCENTILE)),
    )


def repetition(response: str) -> float:
    """Share of repeated word 3-grams, 1 - distinct / total, in 0..1; 0 below 3 words."""
    words = _words(response)
    grams = list(zip(*(words[start:] for start in range(_NGRAM)), strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def _words(response: str) -> list[str]:
    return _WORD.findall(response.lower())
