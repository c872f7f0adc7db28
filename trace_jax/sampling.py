"""Text from a model: batched, left-padded, with a cache of keys and values.

Axes: B rows, L prompt tokens, T new tokens, V vocabulary.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trace_jax import errors
from trace_jax.models import decoder

_BUCKET = 32  # prompts are padded to a multiple of this, so that few lengths are compiled


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
    progress: Callable[[int], None] | None = None,
) -> list[list[Sample]]:
    """`samples` continuations of every prompt (token ids), in the order of the prompts.

    They are number `first_sample` and on, so that more can be added to those made before.
    Temperature 0 is greedy. Randomness depends on (seed, id, sample, position) alone, so a sample
    is the same whatever else is in its batch, up to the rounding of the logits. A prompt longer
    than the context less max_new_tokens loses its left end, which `prompt_tokens_cut` says.
    `progress` is called with the number of rows of every batch.
    """
    rows = _rows(module, prompts, ids, range(first_sample, first_sample + samples), max_new_tokens)
    if temperature < 0:
        raise errors.InputError(f"temperature={temperature} is negative; use 0 for greedy decoding")
    graphdef, state = nnx.split(module)
    stops = jnp.asarray(tuple(stop_ids), jnp.int32)
    results: list[list[Sample | None]] = [[None] * samples for _ in prompts]
    for start in range(0, len(rows), batch_rows):
        batch = rows[start : start + batch_rows]
        size = min(batch_rows, 1 << (len(batch) - 1).bit_length())  # few row counts, as few lengths
        tokens_BL, prompt_B, keys_B2 = _arrays(batch, size, pad_id)
        tokens_BT, length_B, finished_B = jax.device_get(
            _continue(
                graphdef,
                state,
                tokens_BL,
                prompt_B,
                keys_B2,
                jnp.asarray(seed, jnp.uint32),
                jnp.asarray(temperature, jnp.float32),
                stops,
                max_new_tokens=max_new_tokens,
            )
        )
        for row, tokens, length, finished in zip(
            batch, tokens_BT[: len(batch)], length_B, finished_B, strict=False
        ):
            results[row.prompt_index][row.sample_index - first_sample] = Sample(
                tokens[:length].tolist(), bool(finished), row.cut
            )
        if progress is not None:
            progress(len(batch))
    return results


def _rows(
    module: decoder.Decoder,
    prompts: Sequence[Sequence[int]],
    ids: Sequence[str],
    samples: range,
    max_new_tokens: int,
) -> list[_Row]:
    """Longest prompts first: rows of one length share a batch, and lack of memory shows at once."""
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


def _arrays(batch: list[_Row], size: int, pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts padded on the right, their lengths, and (id hash, sample) of every row."""
    length = -(-len(batch[0].prompt) // _BUCKET) * _BUCKET
    tokens_BL = np.full((size, length), pad_id, np.int32)
    prompt_B = np.zeros(size, np.int32)
    keys_B2 = np.zeros((size, 2), np.uint32)
    for i, row in enumerate(batch):
        tokens_BL[i, : len(row.prompt)] = row.prompt
        prompt_B[i] = len(row.prompt)
        keys_B2[i] = row.id_hash, row.sample_index
    return tokens_BL, prompt_B, keys_B2


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new_tokens"))
def _continue(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens_BL: jax.Array,
    prompt_B: jax.Array,
    keys_B2: jax.Array,
    seed: jax.Array,
    temperature: jax.Array,
    stop_ids: jax.Array,
    *,
    max_new_tokens: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tokens_BT, length_B, finished_B); a row with no prompt token is filler, finished at once."""
    module = nnx.merge(graphdef, state)
    B, L = tokens_BL.shape
    row_keys = jax.vmap(
        lambda pair: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), pair[0]), pair[1])
    )(keys_B2)

    def pick(hidden_BD: jax.Array, step: jax.Array) -> jax.Array:
        logits_BV = module.logits(hidden_BD[:, None])[:, 0]
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))
        # Gumbel-max: the argmax of logits / T + noise is a draw at temperature T, and T = 0 greedy.
        return jnp.argmax(logits_BV + temperature * noise(keys), axis=-1).astype(jnp.int32)

    def write(tokens_BT, length_B, finished_B, token_B, step):
        finished_B |= jnp.any(token_B[:, None] == stop_ids[None, :], axis=-1)
        return tokens_BT.at[:, step].set(token_B), length_B + ~finished_B, finished_B

    def unfinished(carry):
        step, _, _, (_, _, finished_B) = carry
        return (step < max_new_tokens) & ~jnp.all(finished_B)

    def extend(carry):
        step, token_B, cache, written = carry
        hidden_B1D, cache = module.decode(token_B[:, None], prompt_B + step - 1, cache)
        token_B = pick(hidden_B1D[:, -1], step)
        return step + 1, token_B, cache, write(*written, token_B, step)

    cache = module.init_cache(B, L + max_new_tokens - 1)
    hidden_BLD, cache = module.decode(tokens_BL, jnp.zeros(B, jnp.int32), cache)
    last_B = jnp.maximum(prompt_B - 1, 0)
    hidden_BD = jnp.take_along_axis(hidden_BLD, last_B[:, None, None], axis=1)[:, 0]
    token_B = pick(hidden_BD, jnp.int32(0))
    empty = (jnp.zeros((B, max_new_tokens), jnp.int32), jnp.zeros(B, jnp.int32), prompt_B == 0)
    carry = (jnp.int32(1), token_B, cache, write(*empty, token_B, 0))
    return jax.lax.while_loop(unfinished, extend, carry)[3]
