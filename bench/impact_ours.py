"""The ways to score impact in JAX that `bench.impact` compares, each ready to run."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx

from trace_jax import (
    batches,
    config,
    encoding,
    fit,
    impact,
    logprobs,
    methods,
    models,
    packing,
    sharding,
    train,
)
from trace_jax.models import lora
from trace_jax.stages import scoring

BETA, RANK, ALPHA = 0.1, 16, 32.0


class Problem(NamedTuple):
    """What a process works on.

    Attributes:
      folder: the checkpoint.
      length: most tokens of a prompt and a response.
      adapters: "none" or "lora".
      pairs: as `real_pairs.read` gives them; the stage scores all.
      slow: so many of them make the gold batch, and are scored by the paths that take longest.
    """

    folder: str
    length: int
    adapters: str
    pairs: list[dict[str, str]]
    slow: int


class Way(NamedTuple):
    """How scores are computed.

    Attributes:
      score: gives scores of the first pairs.
      gold: computes g_J.
      temp_bytes: of the compiled program, None where it is not one.
    """

    score: Callable[[], np.ndarray]
    gold: Callable[[], Any]
    temp_bytes: int | None = None


def encoded(p: Problem) -> tuple[Callable[[], encoding.Encoder], list, list]:
    """(what makes an encoder that has kept nothing, examples, their tokens)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(p.folder)
    encoder = functools.partial(
        encoding.Encoder, tokenizer, max_length=p.length, end_id=None, cut_responses=True
    )
    examples = [
        methods.Example(str(i), "INVERT", *(pair[k] for k in ("prompt", "chosen", "rejected")),
                        pref=1.0)
        for i, pair in enumerate(p.pairs)
    ]  # fmt: skip
    return encoder, *batches.encode_examples(encoder(), examples)


def adapted(p: Problem) -> models.Decoder:
    """The module with fresh adapters, where the mesh in context wants it."""
    module = models.load(Path(p.folder), mesh=sharding.current())
    if p.adapters == "none":
        return module
    module = lora.add(module, rank=RANK, alpha=ALPHA, targets="all", seed=0)
    return sharding.place_module(module)


@functools.partial(jax.jit, static_argnames=("graphdef", "n_responses"))
def whole_rows_derivatives(params, frozen, tangent, rows, *, graphdef, n_responses: int):
    """`impact.response_derivatives` along one tangent with all rows [M, R] of a batch at once.

    The stage takes a quarter of them at a time. vmap(grad) has no such choice, so this is what it
    can be compared with.
    """

    def body(carry: None, micro: batches.Rows):
        def logp(params: nnx.State):
            module = nnx.merge(graphdef, params, frozen)
            return logprobs.response_logprobs(module, micro, n_responses)

        return carry, jax.jvp(logp, (params,), (tangent,))[1]

    return jax.lax.scan(body, None, rows)[1]


def way(name: str, p: Problem) -> Way:
    """`stage` or `stage_each`, or KIND@ROWS: jvp, jvp_quarters, vmap_grad or vmap_grad_remat."""
    kind, _, at_once = name.partition("@")
    module = adapted(p)
    module.remat = "layer" if kind == "vmap_grad_remat" else "none"
    module.attention_block = 0 if at_once else -1  # vmap would compute every choice of keys
    parts = nnx.split(module, nnx.LoRAParam if p.adapters == "lora" else nnx.Param, ...)
    encoder, examples, texts = encoded(p)
    row_length = batches.longest_row(texts)
    gold = _gold(parts, module, examples, texts, row_length, p.slow)
    if not at_once:
        score = _stage(parts, gold(), encoder, examples, each=kind == "stage_each")
        return Way(score, gold)
    n, at_once = max(p.slow, int(at_once)), int(at_once)
    layout = packing.Layout(at_once, row_length, 1, n // at_once)
    ref = logprobs.of_texts(module, texts[:n], row_length=row_length, micro_rows=4)
    rows = batches.make_batch([[i] for i in range(n)], layout, texts, examples, ref)
    return _one_a_row(kind, parts, gold, rows)


def _options(n: int) -> train.Options:
    return train.Options("logistic", "plain", False, n, 1, 2, 1, 0.1, 0.0, 1.0, 0.9, 0.999)


def _hyper() -> train.Hyper:
    return train.Hyper(*(jnp.float32(v) for v in (1e-4, BETA, 0.1)))


def _gold(parts: tuple, module, examples, texts, row_length: int, n: int) -> Callable:
    """Gradient of the first n pairs' mean loss, in packed rows as the stage takes them."""
    graphdef, params, frozen = parts
    plan = packing.PackPlan(
        [e.row_length for e in texts[:n]], np.arange(n)[None], row_length=row_length,
        micro_rows=4 * sharding.shards_in_context(),
    )  # fmt: skip
    ref = logprobs.of_texts(module, texts[:n], row_length=row_length, micro_rows=4)
    step = batches.Step(batches.StepSource(plan, texts, examples, ref)[0], None)
    step = sharding.place_rows(step)

    def gold() -> nnx.State:
        found = impact.objective_gradient(
            params, frozen, step, _hyper(), graphdef=graphdef, options=_options(n)
        )
        return jax.block_until_ready(found)

    return gold


def _stage(parts: tuple, g_J, encoder, examples, *, each: bool) -> Callable[[], np.ndarray]:
    """From texts to scores, as stage impact does it."""
    graphdef, params, frozen = parts
    module = nnx.merge(*parts)
    settings = fit.Settings.of(config.base_config().train, row_length=0, seed=0)
    model = (graphdef, params, frozen, jax.tree.map(lambda g: g[None], g_J))

    def score() -> np.ndarray:
        of_run = encoder()
        if each:
            found = [scoring.unique_responses(of_run, [e]) for e in examples]
            keys, rows = ([one[0] for one in of] for of in zip(*found, strict=True))
        else:
            keys, rows = scoring.unique_responses(of_run, examples)
        packed = logprobs.packed_groups(
            rows, row_length=0, micro_rows=4,
            flops=module.position_flops(max(e.row_length for e in rows)),
        )  # fmt: skip
        return scoring.by_response(examples, keys, rows, packed, model, settings)

    return score


def _one_a_row(kind: str, parts: tuple, gold: Callable, batch: batches.Batch) -> Way:
    """One example a row, all rows of a micro-batch at once; jvp_quarters: a quarter of them."""
    graphdef, params, frozen = parts
    if kind in ("jvp", "jvp_quarters"):
        program, tangent = whole_rows_derivatives, gold()
        if kind == "jvp_quarters":
            program = impact.response_derivatives
            tangent = jax.tree.map(lambda g: g[None], tangent)
        arguments = (params, frozen, tangent, batch.rows)
        compiled = program.lower(*arguments, graphdef=graphdef, n_responses=2).compile()

        def score() -> np.ndarray:
            d_N2 = np.asarray(compiled(*arguments)).reshape(-1, 2)
            return BETA / 2 * (d_N2[:, 1] - d_N2[:, 0])

    else:
        arguments = (params, frozen, gold(), batch, _hyper())
        compiled = impact.per_example_gradient_dots.lower(
            *arguments, graphdef=graphdef, options=_options(1)
        ).compile()

        def score() -> np.ndarray:
            return np.asarray(compiled(*arguments)).reshape(-1)

    return Way(score, gold, compiled.memory_analysis().temp_size_in_bytes)
