"""Responses in text from a model: sampled, decoded, with their likelihood under another model."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from trace_jax import batches, encoding, logprobs, records, sampling


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and the id that seeds its samples."""

    id: str
    prompt: records.Text


def respond(
    module,
    prompts: Sequence[Prompt],
    encoder: encoding.Encoder,
    *,
    seed: int,
    samples: int,
    first_sample: int = 0,
    max_new_tokens: int,
    temperature: float,
    stop_ids: Sequence[int],
    batch_rows: int,
    progress=None,
) -> list[list[str]]:
    """`samples` responses a prompt as text; each depends on (seed, prompt id, its number) only.

    A prompt that leaves less room than `max_new_tokens` in the encoder's limit loses its left end.
    """
    tokens = [encoder.prompt_tokens(p.prompt, p.id, new_tokens=max_new_tokens) for p in prompts]
    sampled = sampling.generate(
        module,
        tokens,
        ids=[p.id for p in prompts],
        seed=seed,
        samples=samples,
        first_sample=first_sample,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_ids=tuple(stop_ids),
        batch_rows=batch_rows,
        progress=progress,
    )
    return [
        [encoder.response_text(t, s.tokens) for s in of_prompt]
        for t, of_prompt in zip(tokens, sampled, strict=True)
    ]


def mean_logprobs(
    module,
    pairs: Sequence[tuple[records.Text, str]],
    encoder: encoding.Encoder,
    *,
    micro_rows: int,
    row_length: int = 0,
    progress=None,
) -> np.ndarray:
    """Mean log p per token of each (prompt, response), [n]; -inf for an empty response."""
    filled = [i for i, (_, response) in enumerate(pairs) if response.strip()]
    out = np.full(len(pairs), -np.inf)
    if not filled:
        return out
    encoded = [encoder.encode(pairs[i][0], [pairs[i][1]]) for i in filled]
    row_length = max(row_length, batches.longest_row(encoded))
    logp = logprobs.of_texts(
        module, encoded, row_length=row_length, micro_rows=micro_rows, progress=progress
    )
    n_tokens = np.array([len(e.branches[0]) - e.skip[0] for e in encoded])
    out[filled] = logp[:, 0] / n_tokens
    return out
