"""Texts become tokens, tokens become packed rows, rows become steps. Host side only (numpy).

Legend: R rows of a batch, L tokens of a row, S example slots of a row, M micro-batches of a step.

A row holds several examples, each as prompt, y0, y1 with the prompt written once
(docs/decisions.md, "The shared prefix"). The label of every position is decided here, in
`_write_example`, and nowhere else.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from trace_jax import methods, records
from trace_jax.errors import InputError

Array = np.ndarray
COEFFICIENTS = ("pref", "npo0", "npo1", "kl", "nll")


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """One prompt in tokens and the responses scored after it.

    Attributes:
      prompt: tokens that all branches share; at least one.
      branches: per response, all tokens after `prompt`.
      skip: per response, how many leading tokens of its branch still belong to the prompt text and
        carry no loss (where the tokenizer splits the same prompt differently before different
        responses).
    """

    prompt: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    skip: tuple[int, ...]

    @property
    def row_length(self) -> int:
        """Row positions it takes: the shared part without its last token, then each branch."""
        return len(self.prompt) - 1 + sum(len(b) for b in self.branches)


class Rows(NamedTuple):
    """Packed rows. Leading axes may be (R,) or (M, R)."""

    tokens: Array  # [R, L] int32
    positions: Array  # [R, L] int32, restarting at the end of the prompt for y1
    segments: Array  # [R, L] int32, 1-based slot of the example, 0 = padding
    branches: Array  # [R, L] int32, 0 prompt, 1 y0, 2 y1
    targets: Array  # [R, L] int32, the token each position predicts
    responses: Array  # [R, L] int32, the target's slot * 2 + branch; 2 S where it counts nowhere


class Batch(NamedTuple):
    """Rows, and per example slot its coefficients and reference log-probs (zero in empty slots)."""

    rows: Rows
    coefficients: dict[str, Array]  # name -> [R, S] float32
    ref_logp: Array  # [R, 2 S] float32


class Step(NamedTuple):
    """What one optimizer step reads: conflict and KL examples, both in M micro-batches, or one."""

    conflict: Batch | None
    retain: Batch | None


class Encoder:
    """Turns (prompt, responses) into `Encoded` under one tokenizer, template and length limit.

    Args:
      tokenizer: a transformers tokenizer.
      max_length: most tokens of a prompt and one response together.
      end_id: token appended to every response, or None.
      cut_responses: cut a response that does not fit at its end; it then has no end_id.
    """

    def __init__(
        self, tokenizer, *, max_length: int, end_id: int | None, cut_responses: bool = False
    ):
        self.tokenizer, self.max_length, self.end_id = tokenizer, max_length, end_id
        self.cut_responses = cut_responses
        self.truncated_prompts = self.truncated_responses = 0
        self._cache: dict[tuple[str, str], tuple[tuple[int, ...], int]] = {}

    def prompt_text(self, prompt: records.Text) -> str:
        """The text in front of the response: the prompt, or the chat template's."""
        if isinstance(prompt, str):
            return prompt
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                "records are chats but the tokenizer has no chat template; set one or use plain "
                "text"
            )
        return self.tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True
        )

    def prompt_tokens(self, prompt: records.Text) -> tuple[int, ...]:
        """Tokens of a prompt alone, for generation."""
        return self._tokens(self.prompt_text(prompt), "")[0]

    def response_text(self, prompt_tokens: Sequence[int], tokens: Sequence[int]) -> str:
        """Text of sampled tokens, decoded with the prompt, so that a leading space survives."""
        whole = self.tokenizer.decode([*prompt_tokens, *tokens], skip_special_tokens=True)
        return whole[len(self.tokenizer.decode(prompt_tokens, skip_special_tokens=True)) :]

    def encode(
        self, prompt: records.Text, responses: Sequence[records.Text], name: str = ""
    ) -> Encoded:
        """Tokenises prompt and each response together and finds the boundary in token space.

        Truncation cuts the prompt from the left (counted in `truncated_prompts`), and responses
        only with `cut_responses` (counted as well); otherwise one that leaves no room for a prompt
        token is an InputError naming the record.
        """
        text = self.prompt_text(prompt)
        pairs = [self._cut_right(*self._tokens(text, _text_of(r))) for r in responses]
        longest = max(len(tokens) - n_prompt for tokens, n_prompt in pairs)
        if longest >= self.max_length:
            raise InputError(
                f"record {name}: a response has {longest} tokens, the limit with its prompt is "
                f"data.max_length={self.max_length}; raise it, or set data.too_long=drop or cut"
            )
        shared = min(_common_prefix([t for t, _ in pairs]), min(n for _, n in pairs))
        if shared == 0:
            raise InputError(
                f"record {name}: its responses change how the whole prompt is tokenised, so they "
                "share no token of it; use a tokenizer with a beginning-of-text token"
            )
        excess = max(0, max(len(tokens) for tokens, _ in pairs) - self.max_length)
        if excess:
            self.truncated_prompts += 1
        return Encoded(
            prompt=self._cut_left(pairs[0][0][:shared], excess),
            branches=tuple(tokens[shared:] for tokens, _ in pairs),
            skip=tuple(n - shared for _, n in pairs),
        )

    def _cut_right(self, tokens: tuple[int, ...], n_prompt: int) -> tuple[tuple[int, ...], int]:
        """Prompt and response without the response's end, if that may be cut and has to be.

        The prompt keeps its length up to half of the limit.
        """
        end = n_prompt + self.max_length - min(n_prompt, self.max_length // 2)
        if not self.cut_responses or len(tokens) <= end:
            return tokens, n_prompt
        self.truncated_responses += 1
        return tokens[:end], n_prompt

    def _cut_left(self, prompt: tuple[int, ...], excess: int) -> tuple[int, ...]:
        """The prompt without `excess` tokens at its left end, after its beginning-of-text token."""
        if not excess:
            return prompt
        first = int(prompt[0] == self.tokenizer.bos_token_id and len(prompt) > excess + 1)
        return prompt[:first] + prompt[min(excess + first, len(prompt) - 1) :]

    def _tokens(self, prompt: str, response: str) -> tuple[tuple[int, ...], int]:
        """Tokens of prompt + response, and how many are the prompt's (one astride is not)."""
        key = (prompt, response)
        if key not in self._cache:
            self._cache[key] = self._tokenise(prompt, response)
        return self._cache[key]

    def _tokenise(self, prompt: str, response: str) -> tuple[tuple[int, ...], int]:
        out = self.tokenizer(
            prompt + response, add_special_tokens=False, return_offsets_mapping=True
        )
        tokens, ends = list(out["input_ids"]), [end for _, end in out["offset_mapping"]]
        n_prompt = sum(end <= len(prompt) for end in ends)
        if self.tokenizer.bos_token_id is not None and tokens[:1] != [self.tokenizer.bos_token_id]:
            tokens, n_prompt = [self.tokenizer.bos_token_id, *tokens], n_prompt + 1
        if n_prompt == 0:
            raise InputError("an empty prompt needs a tokenizer with a beginning-of-text token")
        if response and self.end_id is not None:
            tokens.append(self.end_id)
        return tuple(tokens), n_prompt


def _text_of(response: records.Text) -> str:
    return response if isinstance(response, str) else response[-1]["content"]


def _common_prefix(sequences: Sequence[tuple[int, ...]]) -> int:
    first, last = min(sequences), max(sequences)
    n = 0
    while n < len(first) and n < len(last) and first[n] == last[n]:
        n += 1
    return n


def pack_rows(lengths: Sequence[int], row_length: int, max_slots: int) -> list[list[int]]:
    """First-fit-decreasing: indices of the examples of each row.

    A longer example than a row is a ValueError.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > row_length:
            raise ValueError(
                f"an example of {lengths[i]} positions does not fit a row of {row_length}"
            )
        for r in range(len(rows)):
            if room[r] >= lengths[i] and len(rows[r]) < max_slots:
                rows[r].append(i)
                room[r] -= lengths[i]
                break
        else:
            rows.append([i])
            room.append(row_length - lengths[i])
    return rows


def empty_rows(n_rows: int, row_length: int, slots: int) -> Rows:
    """Rows of padding only: every position its own segment 0, no loss anywhere."""
    arrays = {name: np.zeros((n_rows, row_length), np.int32) for name in Rows._fields}
    arrays["responses"][:] = 2 * slots
    return Rows(**arrays)


def write_rows(
    examples: Sequence[Encoded], plan: Sequence[Sequence[int]], shape: tuple[int, int, int]
) -> Rows:
    """Rows of `plan` (indices into examples) in arrays of shape (n_rows, row_length, slots)."""
    rows = empty_rows(*shape)
    for r, members in enumerate(plan):
        at = 0
        for slot, i in enumerate(members):
            at = _write_example(rows, r, at, slot, examples[i])
    return rows


def _write_example(rows: Rows, r: int, at: int, slot: int, example: Encoded) -> int:
    prefix = len(example.prompt) - 1
    end = at + prefix
    rows.tokens[r, at:end] = example.prompt[:-1]
    rows.positions[r, at:end] = np.arange(prefix)
    rows.segments[r, at:end] = slot + 1
    for b, (branch, skip) in enumerate(zip(example.branches, example.skip, strict=True)):
        start, end = end, end + len(branch)
        inputs = (example.prompt[-1], *branch[:-1])  # the one place where labels shift
        rows.tokens[r, start:end] = inputs
        rows.positions[r, start:end] = prefix + np.arange(len(branch))
        rows.segments[r, start:end] = slot + 1
        rows.branches[r, start:end] = b + 1
        rows.targets[r, start:end] = branch
        rows.responses[r, start + skip : end] = slot * 2 + b
    return end


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Fixed shapes of a batch: rows a micro-batch, tokens and slots a row, micro-batches a step."""

    micro_rows: int
    row_length: int
    slots: int
    micro_batches: int

    @property
    def n_rows(self) -> int:
        return self.micro_rows * self.micro_batches


def round_up(n: int, multiple: int) -> int:
    """The next multiple that is at least n."""
    return -(-n // multiple) * multiple


class PackPlan:
    """Which examples make each step and share rows: a pure function of lengths and seed.

    Examples are drawn epoch by epoch, each epoch a permutation of its own; step k takes the next
    `per_step` of that stream.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        per_step: int,
        total_steps: int,
        seed: int,
        row_length: int,
        micro_rows: int,
    ):
        n = len(lengths)
        epochs = -(-per_step * total_steps // n)
        stream = np.concatenate(
            [np.random.default_rng([seed, epoch]).permutation(n) for epoch in range(epochs)]
        )
        self.members = stream[: per_step * total_steps].reshape(total_steps, per_step)
        max_slots = max(1, row_length // max(1, min(lengths)))
        self.rows = [
            [
                [int(step[j]) for j in row]
                for row in pack_rows([lengths[i] for i in step], row_length, max_slots)
            ]
            for step in self.members
        ]
        self.most_rows = max(len(rows) for rows in self.rows)
        self.slots = max(len(row) for rows in self.rows for row in rows)
        n_rows = round_up(self.most_rows, micro_rows)
        self.layout = Layout(micro_rows, row_length, self.slots, n_rows // micro_rows)

    def real_token_share(self, lengths: Sequence[int]) -> float:
        """Real positions over computed positions, over the whole plan."""
        real = sum(lengths[i] for step in self.members for i in step)
        return real / (len(self.rows) * self.layout.n_rows * self.layout.row_length)


def share_micro_batches(plans: Sequence[PackPlan], *, micro_rows: int, shards: int) -> None:
    """Lays plans of one step out in as many micro-batches, so that they are computed together.

    Together they have about `micro_rows` rows on each of `shards` data shards, at most half as many
    again: within that, the number of micro-batches that needs the fewest rows of padding.
    """

    def rows(micro_batches: int) -> list[int]:
        return [round_up(-(-plan.most_rows // micro_batches), shards) for plan in plans]

    n_rows, limit = sum(plan.most_rows for plan in plans), micro_rows * shards
    counts = range(max(1, 2 * n_rows // (3 * limit)), -(-n_rows // limit) + 1)
    fitting = [m for m in counts if 2 * sum(rows(m)) <= 3 * limit] or [counts[-1]]
    micro_batches = min(fitting, key=lambda m: (m * sum(rows(m)), -m))
    for plan, n in zip(plans, rows(micro_batches), strict=True):
        plan.layout = dataclasses.replace(plan.layout, micro_rows=n, micro_batches=micro_batches)


class StepSource:
    """Random-access source for Grain: `source[step]`, a Batch, is a pure function of the plan."""

    def __init__(
        self,
        plan: PackPlan,
        encoded: Sequence[Encoded],
        examples: Sequence[methods.Example],
        ref_logp: Sequence[tuple[float, float]],
    ):
        self.plan, self.encoded, self.examples, self.ref_logp = plan, encoded, examples, ref_logp

    def __len__(self) -> int:
        return len(self.plan.rows)

    def __getitem__(self, step: int) -> Batch:
        return make_batch(
            self.plan.rows[step], self.plan.layout, self.encoded, self.examples, self.ref_logp
        )

    def record_ids(self, step: int) -> list[str]:
        """Record ids of a step, for error messages."""
        return [self.examples[i].record_id for i in self.plan.members[step]]


def make_batch(
    rows: Sequence[Sequence[int]],
    layout: Layout,
    encoded: Sequence[Encoded],
    examples: Sequence[methods.Example] | None = None,
    ref_logp: Sequence[tuple[float, float]] | None = None,
) -> Batch:
    """The batch of one step, arrays shaped [M, R, ...]. Without examples, coefficients are 0."""
    shape = (layout.n_rows, layout.row_length, layout.slots)
    packed = write_rows(encoded, rows, shape)
    coefficients = {
        name: np.zeros((layout.n_rows, layout.slots), np.float32) for name in COEFFICIENTS
    }
    ref = np.zeros((layout.n_rows, 2 * layout.slots), np.float32)
    for r, members in enumerate(rows):
        for slot, i in enumerate(members):
            if examples is not None:
                for name in COEFFICIENTS:
                    coefficients[name][r, slot] = getattr(examples[i], name)
            if ref_logp is not None:
                ref[r, 2 * slot : 2 * slot + 2] = ref_logp[i]
    return _split_micro_batches(Batch(packed, coefficients, ref), layout)


def _split_micro_batches(batch: Batch, layout: Layout) -> Batch:
    def split(a: Array) -> Array:
        return a.reshape(layout.micro_batches, layout.micro_rows, *a.shape[1:])

    return Batch(
        Rows(*(split(a) for a in batch.rows)),
        {k: split(v) for k, v in batch.coefficients.items()},
        split(batch.ref_logp),
    )


def encode_examples(
    encoder: Encoder,
    examples: Sequence[methods.Example],
    *,
    on_drop: Callable[[str], None] | None = None,
) -> tuple[list[methods.Example], list[Encoded]]:
    """Encodes examples; a too long one is an InputError, or named to `on_drop` and left out."""
    kept, encoded = [], []
    for e in examples:
        responses = [e.y0] if e.y1 is None else [e.y0, e.y1]
        try:
            encoded.append(encoder.encode(e.prompt, responses, e.record_id))
        except InputError:
            if on_drop is None:
                raise
            on_drop(e.record_id)
        else:
            kept.append(e)
    return kept, encoded
