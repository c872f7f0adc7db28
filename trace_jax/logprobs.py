"""Log-probabilities of responses over packed rows: in the step, and for whole lists of texts.

Legend: R rows, L tokens of a row, S example slots of a row (2 S responses).
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trace_jax import batches, encoding, losses, packing, sharding

Array = jax.Array

_MICRO_BATCHES = 8  # of a group, at most
_SLOTS = 4  # texts that a row of `roomy_groups` has room for at least


def response_logprobs(module, rows: batches.Rows, n_responses: int) -> Array:
    """Sum of log p(token) over each response's tokens, [R, n_responses]."""
    return of_hidden(module, hidden(module, rows), rows, n_responses)


def hidden(module, rows: batches.Rows) -> Array:
    """Activations of packed rows, [R, L, D]."""
    return module.hidden(rows.tokens, rows.positions, rows.segments, rows.branches)


def of_hidden(module, hidden_RLD: Array, rows: batches.Rows, n_responses: int) -> Array:
    """`response_logprobs` where the activations are at hand."""
    logp_RL = losses.token_logprobs(
        module.logits, hidden_RLD, rows.targets, counted(rows, n_responses), module.head_chunk
    )
    return sum_by_response(logp_RL, rows.responses, n_responses)


def counted(rows: batches.Rows, n_responses: int) -> Array:
    """Positions whose target is of a response, [R, L] bool."""
    return rows.responses < n_responses


def sum_by_response(values_RL: Array, responses_RL: Array, n_responses: int) -> Array:
    """Sums values over each response's positions, [R, n_responses]; others count nowhere."""

    def row(values_L: Array, responses_L: Array) -> Array:
        return jax.ops.segment_sum(values_L, responses_L, num_segments=n_responses + 1)[
            :n_responses
        ]

    return jax.vmap(row)(values_RL, responses_RL)


def response_lengths(rows: batches.Rows, n_responses: int) -> Array:
    """Tokens that count of each response, [R, n_responses] float32."""
    return sum_by_response(jnp.ones(rows.responses.shape, jnp.float32), rows.responses, n_responses)


def of_filled(rows: batches.Rows, compute: Callable[[batches.Rows], Array]) -> Array:
    """`compute` of each micro-batch of rows [M, R, ...], stacked; 0 for empty ones at the end.

    Those cost nothing, so one compiled program serves any number of micro-batches up to M.
    """

    def micro(i: Array | int) -> batches.Rows:
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), rows)

    filled = jnp.sum(jnp.any(rows.segments != 0, axis=(1, 2)))
    one = jax.eval_shape(lambda: compute(micro(0)))
    out = jnp.zeros((rows.tokens.shape[0], *one.shape), one.dtype)
    return jax.lax.fori_loop(0, filled, lambda i, out: out.at[i].set(compute(micro(i))), out)


@functools.partial(jax.jit, static_argnames=("graphdef", "n_responses"))
def _packed_logprobs(graphdef, state, rows: batches.Rows, n_responses: int) -> Array:
    """[M, R, n_responses] of rows [M, R, ...]."""
    module = nnx.merge(graphdef, state)
    found = of_filled(rows, lambda micro: response_logprobs(module, micro, n_responses))
    return sharding.replicated(found)


def of_texts(
    module,
    encoded: Sequence[encoding.Encoded],
    *,
    row_length: int,
    micro_rows: int,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Log-probs of the first two responses of every text, [n, 2] float32 (0 where there is one).

    One compiled program serves all of them, and any other number of them. `progress` is called with
    the number of texts done.
    """
    graphdef, state = nnx.split(module)
    return map_packed(
        lambda rows, n_responses: _packed_logprobs(graphdef, state, rows, n_responses),
        encoded,
        roomy_groups(encoded, row_length=row_length, micro_rows=micro_rows),
        progress,
    )


class Packed(NamedTuple):
    """One layout for all texts, and the groups of rows (indices) that fill it one after another."""

    layout: packing.Layout
    groups: list[list[list[int]]]


def map_packed(
    compute: Callable[[batches.Rows, int], Array],
    encoded: Sequence[encoding.Encoded],
    packed: Packed,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Runs `compute` on packed texts; returns [n, 2, ...] in order, 0 for those in no group.

    compute: (rows [M, R, ...], n_responses) -> [M, R, n_responses, ...]. progress: called with the
    number of texts done.
    """
    layout, groups = packed
    out: np.ndarray | None = None
    pending: list[tuple[list[list[int]], Array]] = []

    def collect() -> None:
        nonlocal out
        group, values = pending.pop(0)
        flat = np.asarray(values).reshape(layout.n_rows, 2 * layout.slots, *values.shape[3:])
        if out is None:
            out = np.zeros((len(encoded), 2, *values.shape[3:]), np.float32)
        for r, members in enumerate(group):
            for slot, i in enumerate(members):
                out[i] = flat[r, 2 * slot : 2 * slot + 2]
        if progress is not None:
            progress(sum(len(members) for members in group))

    for group in groups:
        rows = sharding.place_rows(batches.make_batch(group, layout, encoded).rows)
        pending.append((group, compute(rows, 2 * layout.slots)))
        if len(pending) > 1:
            collect()
    while pending:
        collect()
    return out


def packed_groups(
    encoded: Sequence[encoding.Encoded],
    *,
    row_length: int,
    micro_rows: int,
    micro_batches: int = _MICRO_BATCHES,
    flops: Callable[[int], float] | None = None,
) -> Packed:
    """Texts in rows, with about as many rows in every group: few are empty.

    row_length: 0: the length at which the texts cost least by `flops` (`packing.best_row`).
    micro_rows: rows computed at once on every data shard of the mesh in context, of longer rows
    than the longest text accordingly fewer. micro_batches: the most of a group.
    """
    if not row_length:
        row_length, micro_rows = packing.best_row(
            [e.row_length for e in encoded],
            micro_rows=micro_rows,
            shards=sharding.shards_in_context(),
            flops=flops,
        )
    rows, slots = _rows(encoded, row_length)
    micro_rows *= sharding.shards_in_context()
    n_groups = -(-len(rows) // (micro_rows * micro_batches))
    micro_batches = -(-len(rows) // (micro_rows * n_groups))
    layout = packing.Layout(micro_rows, row_length, slots, micro_batches)
    return Packed(layout, _grouped(rows, layout))


def roomy_groups(
    encoded: Sequence[encoding.Encoded], *, row_length: int, micro_rows: int
) -> Packed:
    """The same in one layout however many texts there are: the last micro-batches may be empty."""
    rows, slots = _rows(encoded, row_length)
    micro_rows *= sharding.shards_in_context()
    layout = packing.Layout(micro_rows, row_length, max(slots, _SLOTS), _MICRO_BATCHES)
    return Packed(layout, _grouped(rows, layout))


def _rows(encoded: Sequence[encoding.Encoded], row_length: int) -> tuple[list[list[int]], int]:
    """Indices of the texts of each row, and the slots of a row."""
    lengths = [e.row_length for e in encoded]
    max_slots = max(1, row_length // max(1, min(lengths)))
    rows = packing.pack_rows(lengths, row_length, max_slots)
    return rows, 1 << (max(len(row) for row in rows) - 1).bit_length()  # few shapes, few programs


def some_of(packed: Packed, encoded: Sequence[encoding.Encoded], chosen: Sequence[int]) -> Packed:
    """Some of the texts in the same layout, so that the same program computes them."""
    layout = packed.layout
    lengths = [encoded[i].row_length for i in chosen]
    rows = packing.pack_rows(lengths, layout.row_length, layout.slots)
    return Packed(layout, _grouped([[chosen[j] for j in row] for row in rows], layout))


def _grouped(rows: list[list[int]], layout: packing.Layout) -> list[list[list[int]]]:
    return [rows[at : at + layout.n_rows] for at in range(0, len(rows), layout.n_rows)]
