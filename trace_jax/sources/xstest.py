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
from typing import Any

from trace_jax.errors import InputError
from trace_jax.sources import forms
from trace_jax.sources.files import Row

KINDS = {"1_full_compliance": "none", "3_partial_refusal": "partial", "2_full_refusal": "full"}
_DEGREE = {kind: n for n, kind in enumerate(KINDS.values())}


def pairs(rows: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, forms.Pair]]:
    """All pairs of answers of different kinds, by prompt; the rows are held in memory.

    Raises:
      InputError: a row without prompt, completion and a final label that is known.
    """
    by_prompt: dict[str, dict[str, str]] = collections.defaultdict(dict)  # answer -> kind
    about: dict[str, tuple[str, dict[str, Any]]] = {}
    for where, row in rows:
        prompt, answer = (forms.text(row, key, where) for key in ("prompt", "completion"))
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise InputError(f"{where}: prompt and completion must be texts (form xstest)")
        kind = kind_of(row, where)
        about.setdefault(prompt, (where, prompt_labels(row)))
        by_prompt[prompt].setdefault(answer, kind)
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
