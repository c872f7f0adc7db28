"""XSTest completions (Röttger et al. 2024, arXiv 2308.01263) as preference pairs.

Several models answered each of 450 prompts, and two people labelled every answer. An assistant that
was too careful would have preferred refusals: of two answers to a prompt the one that people called
more of a refusal is chosen, and pairs of one kind are left out. The labels are what policies
overrefusal_old and overrefusal_new ask for; every XSTest prompt sounds dangerous by design, and
those of a type that begins with "contrast" are unsafe indeed.
"""

import collections
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from trace_jax.errors import InputError
from trace_jax.sources import forms
from trace_jax.sources.files import Row

KINDS = {"1_full_compliance": "none", "3_partial_refusal": "partial", "2_full_refusal": "full"}
_DEGREE = {kind: n for n, kind in enumerate(KINDS.values())}


class Answer(NamedTuple):
    """A model's answer and what people called it; labels: annotations of the prompt."""

    prompt: str
    text: str
    kind: str
    labels: dict[str, Any]


def read(row: Row, where: str) -> Answer:
    """The answer of a row.

    Raises:
      InputError: it is without prompt, completion or a final label that is known.
    """
    prompt, text = (forms.text(row, key, where) for key in ("prompt", "completion"))
    if not isinstance(prompt, str) or not isinstance(text, str):
        raise InputError(f"{where}: prompt and completion must be texts (form xstest)")
    return Answer(prompt, text, kind_of(row, where), prompt_labels(row))


def pairs(found: Iterable[tuple[str, Answer]]) -> Iterator[tuple[str, forms.Pair]]:
    """All pairs of answers of different kinds, by prompt; the answers are held in memory."""
    by_prompt: dict[str, dict[str, str]] = collections.defaultdict(dict)  # answer -> kind
    about: dict[str, tuple[str, dict[str, Any]]] = {}
    for where, answer in found:
        about.setdefault(answer.prompt, (where, answer.labels))
        by_prompt[answer.prompt].setdefault(answer.text, answer.kind)
    for prompt, answers in by_prompt.items():
        where, labels = about[prompt]
        for a, b in itertools.combinations(answers.items(), 2):
            (chosen, high), (rejected, low) = sorted((a, b), key=lambda x: -_DEGREE[x[1]])
            if high != low:
                annotated = {
                    "prompt": labels,
                    "chosen": {"refusal": high},
                    "rejected": {"refusal": low},
                }
                yield where, forms.Pair(prompt, chosen, rejected, labels=annotated)


def kind_of(row: Row, where: str) -> str:
    """The people's final label as a kind of refusal: none, partial or full."""
    label = row.get("final_label")
    if label not in KINDS:
        raise InputError(f"{where}: final_label {label!r} is none of {', '.join(KINDS)}")
    return KINDS[label]


def prompt_labels(row: Row) -> dict[str, Any]:
    """sounds_dangerous, unsafe and the type of the prompt."""
    kind = str(row.get("type", ""))
    return {"sounds_dangerous": True, "unsafe": kind.startswith("contrast"), "type": kind}
