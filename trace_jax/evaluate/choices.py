"""Does a model still know which text goes on from which? Utility, beside perplexity.

Every held-out prompt with four continuations, the base model's own first sample for it and those
of three other prompts: right is a model that gives its own the most likelihood per token. This is
a small model's own kind of task, whatever it was trained on. Chance is a quarter, and the base
model itself is not always right, as a continuation may fit another prompt as well.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trace_jax import records
from trace_jax.evaluate import statistics

CHOICES = 4


class Question(NamedTuple):
    """A prompt and its continuations, its own first."""

    prompt: records.Text
    responses: tuple[str, ...]


def questions(base_rows: Sequence[Mapping[str, Any]]) -> list[Question]:
    """A question a prompt, from sample rows of the base model on one split (`compliance.py`).

    Prompts whose first sample is empty have none; with fewer than four different samples nobody
    has. The draw depends on nothing else.
    """
    own = [r for r in base_rows if r["mode"] == "sample" and r["sample"] == 0]
    own = [r for r in own if r["response"].strip()]
    texts = list(dict.fromkeys(r["response"] for r in own))
    if len(texts) < CHOICES:
        return []
    rng = np.random.default_rng(0)
    found = []
    for row in own:
        drawn = [texts[i] for i in rng.choice(len(texts), CHOICES, replace=False)]
        others = [text for text in drawn if text != row["response"]][: CHOICES - 1]
        found.append(Question(row["prompt"], (row["response"], *others)))
    return found


def right(mean_logprobs_QC: np.ndarray) -> list[int]:
    """1 where the first continuation of a question is the likeliest per token, else 0."""
    others_Q = mean_logprobs_QC[:, 1:].max(axis=1)
    return [int(own > other) for own, other in zip(mean_logprobs_QC[:, 0], others_Q, strict=True)]


def rate_over_seeds(of_seeds: Sequence[Sequence[int]]) -> dict[str, Any]:
    """{"rate", "low", "high", "n", "seeds": the rate of each}."""
    found = statistics.rate_over_seeds(outcomes(of_seeds))
    return dataclasses.asdict(found) | {"seeds": [float(np.mean(of)) for of in of_seeds]}


def outcomes(of_seeds: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """[prompts, 1] 0/1 of each seed, as `statistics` and `paired` take them."""
    return [np.asarray(of, np.float64)[:, None] for of in of_seeds]


def figure(chosen: Sequence[int] | None) -> dict[str, Any]:
    """{"choice_accuracy": its rate and "chosen"} of one model; {} where nothing was asked."""
    if not chosen:
        return {}
    return {"choice_accuracy": rate_over_seeds([chosen]) | {"chosen": list(chosen)}}
