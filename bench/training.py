"""Our side of a training run that is measured: pairs in, `feed.Steps` through `train.loop`."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trace_jax import (
    batches,
    encoding,
    feed,
    logprobs,
    methods,
    models,
    packing,
    sharding,
    train,
)

MAX_LENGTH, RATE, BETA = 512, 1e-5, 0.1


class Prepared(NamedTuple):
    """A run before its first step.

    arguments: (state, placed step) -> what `train.train_step` takes, by place and by name.
    """

    state: train.TrainState
    source: feed.Steps
    arguments: Callable[[train.TrainState, batches.Step], tuple[tuple, dict]]
    plan: packing.PackPlan
    texts: list[encoding.Encoded]
    config: Any


class Loop:
    """What `train.loop` calls, with the times at which it does."""

    def __init__(self, arguments: Callable):
        self._arguments, self._last = arguments, None
        self.losses, self.ends, self.dispatched, self.starved = [], [], [], 0

    def step_fn(
        self, state: train.TrainState, step: batches.Step
    ) -> tuple[train.TrainState, dict[str, jax.Array]]:
        """Dispatches a step; counts it as starved if the one before has ended."""
        placed = sharding.place_rows(step)
        self.starved += self._last is not None and self._last.is_ready()
        start = time.perf_counter()
        arguments, named = self._arguments(state, placed)
        state, metrics = train.train_step(*arguments, **named)
        self.dispatched.append(time.perf_counter() - start)
        self._last = metrics["loss/total"]
        return state, metrics

    def on_metrics(self, step: int, values: dict[str, float]) -> bool:
        """Keeps a step's loss, which the loop reads when the next step is dispatched."""
        self.losses.append(values["loss/total"])
        self.ends.append(time.perf_counter())
        return True


def prepared(
    model: Path,
    rows: list[dict],
    batch: int,
    *,
    balanced: bool,
    tokenizer: Any,
    mark: Callable[[str], None],
) -> Prepared:
    """Loads, tokenises, computes reference log-probs and plans steps; mark(what) after each.

    balanced: steps of about as many tokens, the default; else pairs in their order.
    """
    mesh = sharding.make_mesh(1, -1, 1)
    jax.set_mesh(mesh)  # for the rest of the process
    module = models.load(model, mesh=mesh)
    mark("load")
    encoder = encoding.Encoder(tokenizer, max_length=2 * MAX_LENGTH, end_id=tokenizer.eos_token_id)
    examples = [
        methods.Example(str(i), "INVERT", r["prompt"], r["chosen"], r["rejected"], pref=1.0)
        for i, r in enumerate(rows)
    ]
    examples, encoded = batches.encode_examples(encoder, examples)
    mark("tokenise")
    ref = logprobs.of_texts(module, encoded, row_length=batches.longest_row(encoded), micro_rows=4)
    mark("reference log-probs")
    lengths = [e.row_length for e in encoded]
    n_steps = len(rows) // batch
    members = np.arange(len(rows)).reshape(n_steps, batch)
    if balanced:
        members = packing.draw(lengths, per_step=batch, total_steps=n_steps, seed=0)
    of_rows = getattr(module, "position_flops", None)  # a commit before may have none
    (plan,) = packing.lay_out(
        [(lengths, members)], row_length=0, micro_rows=4, shards=sharding.shards_in_context(),
        flops=of_rows(max(lengths)) if of_rows else module.config.forward_flops,
    )  # fmt: skip
    source = feed.Steps(batches.StepSource(plan, encoded, examples, ref), None, {})
    graphdef, params, frozen = nnx.split(module, nnx.Param, ...)
    options = train.Options(
        "logistic", "plain", False, batch, 1, n_steps + 1, 0, 1.0, 0.0, 1.0, 0.9, 0.999
    )
    hyper = train.Hyper(*(jnp.float32(v) for v in (RATE, BETA, 0.1)))
    fixed = {"graphdef": graphdef, "options": options}

    def arguments(state: train.TrainState, step: batches.Step) -> tuple[tuple, dict]:
        return (state, frozen, None, step, hyper, None), fixed

    state = train.init_state(params, options)
    mark("plan")
    return Prepared(state, source, arguments, plan, encoded, module.config)


def ours(model: Path, rows: list[dict], batch: int, *, balanced: bool) -> dict:
    """Figures of a run from the loaded model to the last step."""
    marks: dict[str, float] = {}
    run = prepared(
        model, rows, batch, balanced=balanced, tokenizer=encoding.load_tokenizer(model),
        mark=lambda what: marks.setdefault(what, time.perf_counter()),
    )  # fmt: skip
    loop, n_steps = Loop(run.arguments), len(run.source)
    train.loop(
        run.state, run.source.iterator(0, n_steps), loop.step_fn, start=0, total_steps=n_steps,
        record_ids=run.source.record_ids, on_metrics=loop.on_metrics,
        save=lambda step, state: None, save_every=n_steps + 1,
    )  # fmt: skip
    ended, layout = time.perf_counter(), run.plan.layout
    return {
        "seconds": ended - marks["load"],
        "steady": statistics.median(b - a for a, b in zip(loop.ends, loop.ends[1:], strict=False)),
        "losses": loop.losses,
        "tokens_computed": n_steps * layout.n_rows * layout.row_length,
        "tokens_real": sum(2 * len(e.prompt) + sum(map(len, e.branches)) for e in run.texts),
        "starved": loop.starved,
        "dispatch_seconds": statistics.median(loop.dispatched[1:]),
        "devices": jax.device_count(),
    }
