"""Text from a model: slots of one cache, refilled with the next prompts as rows finish.

Axes: B slots, G rows of a refill, P prompt tokens, T new tokens, S cache slots, V vocabulary.

Prompts come longest first, so that rows refilled together are of one length and lack of memory
shows at once. Two kinds of programs (`decoding`): `prefill`, one for every length of prompts in
steps of 32, and `advance`. The host looks at the rows once a refill, not once a token.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trace_jax import decoding, errors, sharding
from trace_jax.models import decoder

_BUCKET = 32  # prompts are padded to a multiple of this, so that few lengths are compiled
_REFILLS = 4  # a refill waits until 1 / 4 of the slots are free (bench/sampling.py)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A continuation, without its stop token."""

    tokens: list[int]
    finished: bool  # a stop token came; False: max_new_tokens were used up
    prompt_tokens_cut: int  # tokens cut from the left of the prompt to fit the context


@dataclasses.dataclass(frozen=True)
class _Row:
    """One continuation to make."""

    prompt_index: int
    sample_index: int
    prompt: Sequence[int]
    cut: int
    id_hash: int


def generate(
    module: decoder.Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    ids: Sequence[str],
    seed: int,
    samples: int = 1,
    first_sample: int = 0,
    max_new_tokens: int,
    temperature: float,
    stop_ids: Sequence[int],
    pad_id: int = 0,
    batch_rows: int = 64,
    refills: int = _REFILLS,
    progress: Callable[[int], None] | None = None,
) -> list[list[Sample]]:
    """`samples` continuations of every prompt (token ids), in the order of the prompts.

    They are number `first_sample` and on, so that more can be added to those made before.
    Temperature 0 is greedy. Randomness depends on (seed, id, sample, position) alone, so a sample
    is the same whatever else is in its batch, up to the rounding of the logits. A prompt longer
    than the context less max_new_tokens loses its left end, which `prompt_tokens_cut` says.
    batch_rows: slots. Few rows leave some of them idle, as another number of slots would be another
    program. refills: a slot is refilled when 1 / refills of them are free; 1 waits until all are.
    `progress` is called with the numbers of rows that finished.
    """
    rows = _rows(module, prompts, ids, range(first_sample, first_sample + samples), max_new_tokens)
    if temperature < 0:
        raise errors.InputError(f"temperature={temperature} is negative; use 0 for greedy decoding")
    results: list[list[Sample | None]] = [[None] * samples for _ in prompts]
    if not rows:
        return results
    shards = sharding.shards_in_context()
    size = most_slots(batch_rows)
    group = refilled(size, shards, refills)
    draw = decoding.Draw(
        jnp.asarray(seed, jnp.uint32),
        jnp.asarray(temperature, jnp.float32),
        jnp.asarray(tuple(stop_ids), jnp.int32),
    )
    graphdef, state = nnx.split(decoding.as_computed(module))
    fixed = dict(graphdef=graphdef)
    length = _bucket(len(rows[0].prompt)) + max_new_tokens
    slots = decoding.empty(graphdef, state, size=size, length=length, T=max_new_tokens)
    queue, held, free = collections.deque(rows), {}, list(range(size))
    while queue or held:
        while queue and (len(free) >= group or not held):
            taken = [queue.popleft() for _ in range(min(group, len(free), len(queue)))]
            where = [free.pop() for _ in taken]
            held |= dict(zip(where, taken, strict=True))
            slots = decoding.prefill(
                state, slots, _group(taken, where, group, size, pad_id), draw, **fixed
            )
        leave = max(0, len(held) - group) if queue else 0
        slots, made = decoding.advance(state, slots, jnp.int32(leave), draw, **fixed)
        tokens_BT, step_B, finished_B = jax.device_get(made)
        done = [b for b in held if finished_B[b] or step_B[b] == max_new_tokens]
        for b in done:
            row, n = held.pop(b), int(step_B[b]) - int(finished_B[b])
            results[row.prompt_index][row.sample_index - first_sample] = Sample(
                tokens_BT[b, :n].tolist(), bool(finished_B[b]), row.cut
            )
        free += done
        if progress is not None:
            progress(len(done))
    return results


def most_slots(batch_rows: int) -> int:
    """`batch_rows`, or one row a data shard where there are more of those.

    Raises InputError where the shards do not divide it.
    """
    shards = sharding.shards_in_context()
    if batch_rows > shards and batch_rows % shards:
        below = batch_rows // shards * shards
        raise errors.InputError(
            f"batch_rows={batch_rows} is not divisible by {shards} data shards; use {below} or "
            f"{below + shards}"
        )
    return max(batch_rows, shards)


def _bucket(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


def refilled(slots: int, shards: int, refills: int = _REFILLS) -> int:
    """Rows that are put into slots at once."""
    return max(shards, slots // refills)


def _rows(
    module: decoder.Decoder,
    prompts: Sequence[Sequence[int]],
    ids: Sequence[str],
    samples: range,
    max_new_tokens: int,
) -> list[_Row]:
    """Longest prompts first."""
    context = module.config.max_position_embeddings
    room = context - max_new_tokens
    if max_new_tokens < 1 or room < 1:
        raise errors.InputError(
            f"max_new_tokens={max_new_tokens} must lie between 1 and {context - 1}, as the context "
            f"has {context} tokens"
        )
    rows = []
    for index, (prompt, record_id) in enumerate(zip(prompts, ids, strict=True)):
        if not prompt:
            raise errors.InputError(f"the prompt of {record_id} has no tokens; begin it with BOS")
        cut = max(0, len(prompt) - room)
        id_hash = int.from_bytes(hashlib.sha256(record_id.encode()).digest()[:4], "big")
        rows += [_Row(index, n, prompt[cut:], cut, id_hash) for n in samples]
    return sorted(rows, key=lambda row: -len(row.prompt))


def _group(
    rows: list[_Row], where: list[int], size: int, n_slots: int, pad_id: int
) -> decoding.Group:
    length = _bucket(max(len(row.prompt) for row in rows))
    slots_G = np.full(size, n_slots, np.int32)
    tokens_GP = np.full((size, length), pad_id, np.int32)
    prompt_G = np.ones(size, np.int32)
    keys_G2 = np.zeros((size, 2), np.uint32)
    slots_G[: len(rows)] = where
    for i, row in enumerate(rows):
        tokens_GP[i, : len(row.prompt)] = row.prompt
        prompt_G[i] = len(row.prompt)
        keys_G2[i] = row.id_hash, row.sample_index
    return decoding.Group(slots_G, tokens_GP, prompt_G, keys_G2)


def lower(
    graphdef: nnx.GraphDef, state: nnx.State, rows: int, prompt_length: int, max_new_tokens: int
) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """`prefill` and `advance` for shapes alone, on the mesh in context, with a full cache."""
    mesh = sharding.current()
    prompt_length = _bucket(prompt_length)
    length = prompt_length + max_new_tokens
    make = functools.partial(decoding.empty, graphdef, size=rows, length=length, T=max_new_tokens)

    def place(path: tuple, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        cached = x.ndim == 4
        where = (sharding.of_keys if cached else sharding.of_rows)(x.shape, mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    slots = jax.tree_util.tree_map_with_path(place, jax.eval_shape(make, state))
    scalar = functools.partial(jax.ShapeDtypeStruct, ())
    draw = decoding.Draw(
        scalar(jnp.uint32), scalar(jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    )
    size = refilled(rows, sharding.shards_in_context())
    of_group = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    group = decoding.Group(
        slots_G=of_group((size,)),
        tokens_GP=of_group((size, prompt_length)),
        prompt_G=of_group((size,)),
        keys_G2=jax.ShapeDtypeStruct((size, 2), jnp.uint32),
    )
    return (
        decoding.prefill.lower(state, slots, group, draw, graphdef=graphdef),
        decoding.advance.lower(state, slots, scalar(jnp.int32), draw, graphdef=graphdef),
    )
