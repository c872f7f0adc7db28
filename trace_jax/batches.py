"""Tokens become packed rows, rows become steps. Host side only (numpy); shapes: packing.py.

Legend: R rows of a batch, L tokens of a row, S example slots of a row, M micro-batches of a step.

A row holds several examples, each as prompt, y0, y1 with the prompt written once
(docs/decisions.md, "The shared prefix"). The label of every position is decided here, in
`_write_example`, and nowhere else.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from trace_jax import methods, packing
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


def longest_row(encoded: Sequence[Encoded]) -> int:
    """Tokens of the longest example, rounded up for the devices here."""
    return packing.round_row(max(e.row_length for e in encoded))


class StepSource:
    """Random-access source for Grain: `source[step]`, a Batch, is a pure function of the plan."""

    def __init__(
        self,
        plan: packing.PackPlan,
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
    layout: packing.Layout,
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


def _split_micro_batches(batch: Batch, layout: packing.Layout) -> Batch:
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
