"""Preference pairs that the model writes itself: sampled from it, ordered by a policy."""

import itertools
from collections.abc import Sequence

import numpy as np

from trace_jax import encoding, judges, records, respond, sampling
from trace_jax.errors import InputError


def openings(
    module,
    encoder: encoding.Encoder,
    *,
    n: int,
    seed: int,
    tokens: tuple[int, int],
    stop_ids: Sequence[int],
    batch_rows: int,
    progress=None,
) -> list[respond.Prompt]:
    """n different openings: unconditional samples, cut at a word, of `tokens` (min, max) tokens."""
    shortest, longest = tokens
    start = encoder.prompt_tokens("")
    found: dict[str, None] = {}
    attempt = 0
    while len(found) < n:
        ids = [f"opening-{attempt}-{i}" for i in range(n)]
        sampled = sampling.generate(
            module,
            [start] * n,
            ids=ids,
            seed=seed,
            max_new_tokens=longest + 8,
            temperature=1.0,
            stop_ids=tuple(stop_ids),
            batch_rows=batch_rows,
            progress=progress,
        )
        rng = np.random.default_rng([seed, attempt])
        for of_prompt, cut in zip(sampled, rng.integers(shortest, longest + 1, n), strict=True):
            text = _cut_at_word(encoder, start, of_prompt[0].tokens, int(cut))
            if text:
                found.setdefault(text)
        attempt += 1
        if attempt > 20:
            raise InputError(
                f"only {len(found)} of {n} different openings after 20 rounds; lower data.openings "
                "or raise "
                "data.opening_tokens"
            )
    return [respond.Prompt(records.content_id(text), text) for text in itertools.islice(found, n)]


def _cut_at_word(
    encoder: encoding.Encoder, start: Sequence[int], tokens: Sequence[int], cut: int
) -> str:
    """The longest whole-word text in the first `cut` tokens; empty if the sample ended before."""
    if len(tokens) <= cut:
        return ""
    text = encoder.response_text(start, tokens[:cut])
    following = encoder.response_text(start, tokens[: cut + 1])[len(text) :]
    if following[:1].isalnum() or following[:1] == "'":
        text = text.rsplit(" ", 1)[0] if " " in text else ""
    return text.strip()


def pairs(
    prompts: Sequence[respond.Prompt],
    responses: Sequence[Sequence[str]],
    judge: judges.Judge,
    *,
    limit: int,
    seed: int,
) -> list[records.PreferenceRecord]:
    """At most `limit` pairs of responses that `judge` orders, spread evenly over prompts."""
    items = [
        (p.prompt, r) for p, of_prompt in zip(prompts, responses, strict=True) for r in of_prompt
    ]
    verdicts = iter(judge.judge(items))
    rng = np.random.default_rng([seed, 0x9A125])
    by_prompt: list[list[records.PreferenceRecord]] = []
    for p, of_prompt in zip(prompts, responses, strict=True):
        judged = [(r, next(verdicts)) for r in of_prompt]
        found = [_pair(p, a, b) for a, b in itertools.combinations(judged, 2)]
        kept = [pair for pair in found if pair is not None]
        by_prompt.append([kept[i] for i in rng.permutation(len(kept))])
    rounds = itertools.zip_longest(*by_prompt)
    out = {pair.id: pair for of_round in rounds for pair in of_round if pair is not None}
    return list(itertools.islice(out.values(), limit))


def _pair(prompt: respond.Prompt, a: tuple, b: tuple) -> records.PreferenceRecord | None:
    (text_a, verdict_a), (text_b, verdict_b) = a, b
    better = judges.order(verdict_a, verdict_b)
    if better == 0 or not text_a.strip() or not text_b.strip() or text_a == text_b:
        return None
    chosen, rejected = (text_a, text_b) if better > 0 else (text_b, text_a)
    return records.PreferenceRecord(
        records.content_id(prompt.prompt, chosen, rejected), prompt.prompt, chosen, rejected
    )
