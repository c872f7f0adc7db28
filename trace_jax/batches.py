"""Tokens become packed rows, rows become steps. Host side only (numpy).

Legend: R rows of a batch, L tokens of a row, S example slots of a row, M micro-batches of a step.

A row holds several examples, each as prompt, y0, y1 with the prompt written once
(docs/decisions.md, "The shared prefix"). The label of every position is decided here, in
`_write_example`, and nowhere else.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from trace_jax import methods
from trace_jax.encoding import Encoded, Encoder
from trace_jax.errors import InputError

Array = np.ndarray
COEFFICIENTS = ("pref", "npo0", "npo1", "kl", "nll")


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


def longest_row(encoded: Sequence[Encoded]) -> int:
    """Tokens of the longest example, rounded up for the devices here."""
    return round_row(max(e.row_length for e in encoded))


def round_row(tokens: int, platform: str | None = None) -> int:
    """Length of rows that hold so many tokens: a multiple of 8 on CPU, of 64 on an accelerator.

    platform: "cpu" or another; by default that of the devices here.
    """
    if platform is None:
        import jax

        platform = jax.default_backend()
    return round_up(tokens, 8 if platform == "cpu" else 64)


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
