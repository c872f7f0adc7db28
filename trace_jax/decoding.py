"""What sampling does on the devices: rows of text in slots, and the programs that decode them.

Axes: B slots, G rows of a refill, P prompt tokens, T new tokens, S cache slots, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from trace_jax import sharding
from trace_jax.models import decoder

_LAST = 4  # the last 1 / 4 of the rows are decoded alone
_COPIED_BYTES = 2**28  # where their cache takes no more than this of a data shard


class Slots(NamedTuple):
    """Rows in the making. A free slot has `step` = T and is never read."""

    cache: decoder.Cache
    keys_B2: jax.Array  # id hash and sample number of the row, uint32
    last_B: jax.Array  # the newest token, not in the cache yet
    position_B: jax.Array  # its position
    step_B: jax.Array  # tokens made, the stop token among them
    finished_B: jax.Array  # a stop token came
    tokens_BT: jax.Array


class Made(NamedTuple):
    """What the host reads of slots, as there."""

    tokens_BT: jax.Array
    step_B: jax.Array
    finished_B: jax.Array


class Draw(NamedTuple):
    """What decides the draws beside the row: scalars, and the ids [n] that end a row."""

    seed: jax.Array
    temperature: jax.Array
    stop_ids: jax.Array


class Group(NamedTuple):
    """Prompts for free slots; filler has slot B, which does not exist."""

    slots_G: Any
    tokens_GP: Any  # padded on the right
    prompt_G: Any  # tokens of each prompt
    keys_G2: Any


def as_computed(module: decoder.Decoder) -> decoder.Decoder:
    """The module with its matrices in the dtype of activations, cast once and not every token."""
    graphdef, state = nnx.split(module)
    leaves = [
        (keys, leaf.replace(leaf[...].astype(module.dtype)) if keys[-1] in _CAST else leaf)
        for keys, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


_CAST = ("kernel", "embed")


@functools.partial(jax.jit, static_argnames=("graphdef", "size", "length", "T"), keep_unused=True)
def empty(graphdef: nnx.GraphDef, state: nnx.State, *, size: int, length: int, T: int) -> Slots:
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
) -> tuple[Slots, Made]:
    """Decodes until at most `leave` rows are unfinished.

    With leave = 0 the last quarter of the rows is decoded alone, where a copy of it is small.
    """
    module = nnx.merge(graphdef, state)
    B, T = slots.tokens_BT.shape
    shards = sharding.shards_in_context()
    quarter = B // shards // _LAST  # rows a shard

    def live(slots: Slots) -> jax.Array:
        return ~slots.finished_B & (slots.step_B < T)

    def extend(slots: Slots) -> Slots:
        live_B = live(slots)
        start_B = jnp.where(live_B, slots.position_B, 0)  # idle rows make no step longer
        hidden_B1D, cache = module.decode(slots.last_B[:, None], start_B, slots.cache)
        token_B = _pick(module, hidden_B1D, slots.keys_B2, slots.step_B, draw)
        column_B = jnp.where(live_B, slots.step_B, T)  # T does not exist: idle rows write nothing
        return Slots(
            cache=cache,
            keys_B2=slots.keys_B2,
            last_B=jnp.where(live_B, token_B, slots.last_B),
            position_B=slots.position_B + live_B,
            step_B=slots.step_B + live_B,
            finished_B=slots.finished_B | (live_B & _stops(token_B, draw)),
            tokens_BT=jax.vmap(lambda row, at, token: row.at[at].set(token, mode="drop"))(
                slots.tokens_BT, column_B, token_B
            ),
        )

    def decoded(slots: Slots, more: Callable[[jax.Array], jax.Array]) -> Slots:
        """Decodes while `more` is true of the live rows of every shard."""
        return jax.lax.while_loop(lambda s: more(of_shards(live(s))), extend, slots)

    def of_shards(live_B: jax.Array) -> jax.Array:
        return sharding.replicated(live_B.reshape(shards, -1).sum(1))

    def last_rows(slots: Slots) -> Made:
        """Decodes the rows that are live, a quarter of each shard's at most, to their ends."""
        rows = jnp.argsort(~live(slots).reshape(shards, -1), axis=1, stable=True)[:, :quarter]
        few = _placed(jax.tree.map(functools.partial(_taken, rows=rows), slots))
        few = decoded(few, lambda n: n.sum() > leave)
        put = functools.partial(_put, rows=rows)  # nobody reads the rest of a row at its end
        return jax.tree.map(put, _made(slots), _made(few))

    if quarter and _bytes(slots.cache) // shards // _LAST <= _COPIED_BYTES:
        slots = decoded(slots, lambda n: (n.sum() > leave) & ((leave > 0) | (n.max() > quarter)))
        made = jax.lax.cond(leave == 0, last_rows, _made, slots)
    else:
        slots = decoded(slots, lambda n: n.sum() > leave)
        made = _made(slots)
    return _placed(slots._replace(**made._asdict())), sharding.replicated(made)


def _made(slots: Slots) -> Made:
    return Made(slots.tokens_BT, slots.step_B, slots.finished_B)


def _taken(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows [shards, n] of every shard, [shards * n, ...]."""
    cut = x.reshape(rows.shape[0], -1, *x.shape[1:])
    return jax.vmap(lambda own, rows: own[rows])(cut, rows).reshape(-1, *x.shape[1:])


def _put(x: jax.Array, taken: jax.Array, rows: jax.Array) -> jax.Array:
    """x with what `_taken` took in its place."""
    cut, new = (a.reshape(rows.shape[0], -1, *x.shape[1:]) for a in (x, taken))
    return jax.vmap(lambda own, new, rows: own.at[rows].set(new))(cut, new, rows).reshape(x.shape)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


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

    return _argmax(logits_BV + draw.temperature * jax.vmap(noise)(keys_B2, step_B))


def _argmax(x_BV: jax.Array) -> jax.Array:
    """The first of the largest entries.

    `jnp.argmax` takes four times as long on CPU: XLA computes what x is made of, two logarithms an
    entry, within its loop over scalars.
    """
    V = x_BV.shape[1]
    largest_B1 = jnp.max(x_BV, axis=1, keepdims=True)
    first_B = jnp.min(jnp.where(x_BV == largest_B1, jnp.arange(V), V), axis=1)
    return jnp.minimum(first_B, V - 1).astype(jnp.int32)  # no entry is the largest among NaN


def _stops(token_B: jax.Array, draw: Draw) -> jax.Array:
    return jnp.any(token_B[:, None] == draw.stop_ids[None, :], axis=-1)
