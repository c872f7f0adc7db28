"""Text from a model: slots of one cache, refilled with the next prompts as rows finish.

Axes: B slots, G rows of a refill, P prompt tokens, T new tokens, S cache slots, V vocabulary.

Prompts come longest first, so that rows refilled together are of one length and lack of memory
shows at once. Two kinds of programs: `prefill`, one for every length of prompts in steps of 32, and
`advance`. The host looks at the rows once a refill, not once a token.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trace_jax import errors, sharding
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


class Slots(NamedTuple):
    """Rows in the making. A free slot has `step` = T and is never read."""

    cache: decoder.Cache
    keys_B2: jax.Array  # id hash and sample number of the row, uint32
    last_B: jax.Array  # the newest token, not in the cache yet
    position_B: jax.Array  # its position
    step_B: jax.Array  # tokens made, the stop token among them
    finished_B: jax.Array  # a stop token came
    tokens_BT: jax.Array


class Draw(NamedTuple):
    """What decides the draws beside the row: scalars, and the ids [n] that end a row."""

    seed: jax.Array
    temperature: jax.Array
    stop_ids: jax.Array


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
    draw = Draw(
        jnp.asarray(seed, jnp.uint32),
        jnp.asarray(temperature, jnp.float32),
        jnp.asarray(tuple(stop_ids), jnp.int32),
    )
    graphdef, state = nnx.split(_as_computed(module))
    fixed = dict(graphdef=graphdef)
    longest = _bucket(len(rows[0].prompt))
    slots = _empty(graphdef, state, size=size, length=longest + max_new_tokens, T=max_new_tokens)
    queue, held, free = collections.deque(rows), {}, list(range(size))
    while queue or held:
        while queue and (len(free) >= group or not held):
            taken = [queue.popleft() for _ in range(min(group, len(free), len(queue)))]
            where = [free.pop() for _ in taken]
            held |= dict(zip(where, taken, strict=True))
            slots = prefill(state, slots, _group(taken, where, group, size, pad_id), draw, **fixed)
        leave = max(0, len(held) - group) if queue else 0
        slots, *found = advance(state, slots, jnp.int32(leave), draw, **fixed)
        tokens_BT, step_B, finished_B = jax.device_get(found)
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


def refilled(slots: int, shards: int, refills: int = _REFILLS) -> int:
    """Rows that are put into slots at once."""
    return max(shards, slots // refills)


def _as_computed(module: decoder.Decoder) -> decoder.Decoder:
    """The module with its matrices in the dtype of activations, cast once and not every token."""
    graphdef, state = nnx.split(module)
    leaves = [
        (keys, leaf.replace(leaf[...].astype(module.dtype)) if keys[-1] in _CAST else leaf)
        for keys, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


_CAST = ("kernel", "embed")


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


def _bucket(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


class Group(NamedTuple):
    """Prompts for free slots; filler has slot B, which does not exist."""

    slots_G: Any
    tokens_GP: Any  # padded on the right
    prompt_G: Any  # tokens of each prompt
    keys_G2: Any


def _group(rows: list[_Row], where: list[int], size: int, n_slots: int, pad_id: int) -> Group:
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
    return Group(slots_G, tokens_GP, prompt_G, keys_G2)


@functools.partial(jax.jit, static_argnames=("graphdef", "size", "length", "T"), keep_unused=True)
def _empty(graphdef: nnx.GraphDef, state: nnx.State, *, size: int, length: int, T: int) -> Slots:
    """Free slots for `length` tokens, T of them new.

    No value of the state is used, but slots are committed to its devices, as `prefill`'s are: else
    that would be compiled for either kind.
    """
    zeros = jnp.zeros(size, jnp.int32)
    slots = Slots(
        cache=nnx.merge(graphdef, state).init_cache(size, length),
        keys_B2=jnp.zeros((size, 2), jnp.uint32),
        last_B=zeros,
        position_B=zeros,
        step_B=zeros + T,
        finished_B=zeros == 0,
        tokens_BT=jnp.zeros((size, T), jnp.int32),
    )
    return _placed(slots)


def _placed(slots: Slots) -> Slots:
    """Slots lie the same way whoever makes them: `prefill` and `advance` are compiled once."""
    own = jax.tree.map(sharding.rows, slots._replace(cache=None))
    return own._replace(cache=jax.tree.map(sharding.keys, slots.cache))


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("slots",))
def prefill(
    state: nnx.State, slots: Slots, group: Group, draw: Draw, *, graphdef: nnx.GraphDef
) -> Slots:
    """The slots with new rows in them: their prompts in the cache, their first token drawn."""
    module = nnx.merge(graphdef, state)
    G, P = group.tokens_GP.shape
    hidden_GPD, made = module.decode(
        group.tokens_GP, jnp.zeros(G, jnp.int32), module.init_cache(G, P)
    )
    last_G11 = (group.prompt_G - 1)[:, None, None]
    hidden_G1D = jnp.take_along_axis(hidden_GPD, last_G11, axis=1)
    step_G = jnp.zeros(G, jnp.int32)
    token_G = _pick(module, hidden_G1D, group.keys_G2, step_G, draw)

    def put(into: jax.Array, rows: jax.Array) -> jax.Array:
        return into.at[group.slots_G].set(rows, mode="drop")

    cache = jax.tree.map(
        lambda into, new: into.at[group.slots_G, :, :P].set(new, mode="drop"), slots.cache, made
    )
    new = Slots(
        cache=cache,
        keys_B2=put(slots.keys_B2, group.keys_G2),
        last_B=put(slots.last_B, token_G),
        position_B=put(slots.position_B, group.prompt_G),
        step_B=put(slots.step_B, step_G + 1),
        finished_B=put(slots.finished_B, _stops(token_G, draw)),
        tokens_BT=slots.tokens_BT.at[group.slots_G, 0].set(token_G, mode="drop"),
    )
    return _placed(new)


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("slots",))
def advance(
    state: nnx.State, slots: Slots, leave: jax.Array, draw: Draw, *, graphdef: nnx.GraphDef
) -> tuple[Slots, jax.Array, jax.Array, jax.Array]:
    """Decodes until at most `leave` rows are unfinished: (slots, tokens_BT, step_B, finished_B)."""
    module = nnx.merge(graphdef, state)
    B, T = slots.tokens_BT.shape

    def live(slots: Slots) -> jax.Array:
        return ~slots.finished_B & (slots.step_B < T)

    def extend(slots: Slots) -> Slots:
        live_B = live(slots)
        hidden_B1D, cache = module.decode(slots.last_B[:, None], slots.position_B, slots.cache)
        token_B = _pick(module, hidden_B1D, slots.keys_B2, slots.step_B, draw)
        column_B = jnp.where(live_B, slots.step_B, T)  # T does not exist: idle rows write nothing
        return Slots(
            cache=cache,
            keys_B2=slots.keys_B2,
            last_B=jnp.where(live_B, token_B, slots.last_B),
            position_B=slots.position_B + live_B,
            step_B=slots.step_B + live_B,
            finished_B=slots.finished_B | (live_B & _stops(token_B, draw)),
            tokens_BT=slots.tokens_BT.at[jnp.arange(B), column_B].set(token_B, mode="drop"),
        )

    slots = jax.lax.while_loop(lambda s: jnp.sum(live(s)) > leave, extend, slots)
    return _placed(slots), *sharding.replicated((slots.tokens_BT, slots.step_B, slots.finished_B))


def lower(
    graphdef: nnx.GraphDef, state: nnx.State, rows: int, prompt_length: int, max_new_tokens: int
) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """`prefill` and `advance` for shapes alone, on the mesh in context, with a full cache."""
    mesh = sharding.current()
    prompt_length = _bucket(prompt_length)
    length = prompt_length + max_new_tokens
    make = functools.partial(_empty, graphdef, size=rows, length=length, T=max_new_tokens)

    def place(path: tuple, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        cached = x.ndim == 4
        where = (sharding.of_keys if cached else sharding.of_rows)(x.shape, mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    slots = jax.tree_util.tree_map_with_path(place, jax.eval_shape(make, state))
    scalar = functools.partial(jax.ShapeDtypeStruct, ())
    draw = Draw(scalar(jnp.uint32), scalar(jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32))
    size = refilled(rows, sharding.shards_in_context())
    of_group = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    group = Group(
        slots_G=of_group((size,)),
        tokens_GP=of_group((size, prompt_length)),
        prompt_G=of_group((size,)),
        keys_G2=jax.ShapeDtypeStruct((size, 2), jnp.uint32),
    )
    return (
        prefill.lower(state, slots, group, draw, graphdef=graphdef),
        advance.lower(state, slots, scalar(jnp.int32), draw, graphdef=graphdef),
    )


def _pick(
    module: decoder.Decoder,
    hidden_B1D: jax.Array,
    keys_B2: jax.Array,
    step_B: jax.Array,
    draw: Draw,
) -> jax.Array:
    """The next token [B]: the argmax of logits / T + Gumbel noise is a draw at temperature T."""
    logits_BV = module.logits(hidden_B1D)[:, 0]

    def noise(pair: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(draw.seed), pair[0])
        key = jax.random.fold_in(jax.random.fold_in(key, pair[1]), step)
        return jax.random.gumbel(key, logits_BV.shape[1:])

    noise_BV = jax.vmap(noise)(keys_B2, step_B)
    return jnp.argmax(logits_BV + draw.temperature * noise_BV, axis=-1).astype(jnp.int32)


def _stops(token_B: jax.Array, draw: Draw) -> jax.Array:
    return jnp.any(token_B[:, None] == draw.stop_ids[None, :], axis=-1)
