"""From examples to a trained model: reference log-probs, pack plan, steps, checkpoints.

One path for every method and stage.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from trace_jax import (
    batches,
    best,
    checkpoints,
    encoding,
    feed,
    methods,
    metrics,
    preemption,
    processes,
    records,
    sharding,
    tracking,
    train,
)
from trace_jax.errors import InputError
from trace_jax.models import lora

BEGAN = "began.json"  # beside the checkpoints: from which step this try goes on, and since when


@dataclasses.dataclass(frozen=True)
class Settings:
    """Values of one training run; the keys of `config._training()`.

    micro_rows: of every data shard, conflict and KL rows together.
    """

    total_steps: int
    examples_per_step: int
    retain_per_step: int
    micro_rows: int
    row_length: int
    learning_rate: float
    beta: float
    tau: float
    warmup_steps: int
    final_fraction: float
    weight_decay: float
    clip_norm: float
    b1: float
    b2: float
    preference: str
    npo_scale: str
    length_normalised: bool
    drift: float
    mu_dtype: str
    adapters: str
    lora_rank: int
    lora_alpha: float
    lora_targets: str
    save_every: int
    keep: int
    seed: int
    balance_steps: bool = True
    skip_steps: int = 0

    @classmethod
    def of(cls, section, *, row_length: int, seed: int) -> "Settings":
        """From a training section of the config."""
        own = {"row_length": row_length, "seed": seed}
        own |= {f"lora_{key}": section.lora[key] for key in ("rank", "alpha", "targets")}
        names = [f.name for f in dataclasses.fields(cls) if f.name not in own]
        return cls(**own, **{name: section[name] for name in names if name in section})

    def options(self) -> train.Options:
        """What the step is compiled for."""
        names = {f.name for f in dataclasses.fields(train.Options)}
        shared = {k: v for k, v in dataclasses.asdict(self).items() if k in names}
        return train.Options(
            n_conflict=self.examples_per_step, n_retain=self.retain_per_step, **shared
        )

    def hyper(self) -> train.Hyper:
        """What the step takes as arguments."""
        return train.Hyper(*(jnp.float32(v) for v in (self.learning_rate, self.beta, self.tau)))


def adapted(module, settings: Settings):
    """`with_adapters`, every parameter where the mesh in context wants it."""
    if settings.adapters == "none":
        return module
    return sharding.place_module(with_adapters(module, settings))


def with_adapters(module, settings: Settings):
    """The module with fresh adapters (a new module), or itself for full fine-tuning."""
    if settings.adapters == "none":
        return module
    targets = settings.lora_targets
    targets = targets if targets == "all" else tuple(t.strip() for t in targets.split(","))
    return lora.add(
        module,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        targets=targets,
        seed=settings.seed,
    )


def trainable(settings: Settings) -> type:
    """Variable type of the trainable leaves."""
    return nnx.LoRAParam if settings.adapters == "lora" else nnx.Param


@dataclasses.dataclass
class Fitted:
    """The trained module (adapters merged) and what the run is worth knowing of.

    stopped_at: the step after which a pause ended the run, or None. The module is then that of the
      last pause before it that was kept.
    kept_step: the step that the module is of.
    """

    module: nnx.Module
    real_token_share: float
    steps_run: int
    kept_step: int
    stopped_at: int | None = None


class Pauses(Protocol):
    """What happens between two steps of a run.

    Attributes:
      steps: after how many updates, in order; the last may be the run's last.
    """

    steps: Sequence[int]

    def __call__(
        self, step: int, module: nnx.Module | None, examples: Sequence[methods.Example]
    ) -> Sequence[methods.Example] | None:
        """The examples, in their order, with the coefficients that hold from here; None: stop.

        module: theta now, adapters beside the kernels; None where the pause is past already, and
        what it gave then is wanted again.
        """

    def keeps(self, step: int) -> bool:
        """Whether the run would end with the state of this pause, if it came to no later one.

        Asked once the pause has gone on; it takes the place of the state kept before.
        """


def fit(
    module,
    examples: Sequence[methods.Example],
    settings: Settings,
    *,
    encoder: encoding.Encoder,
    directory: Path,
    metrics_path: Path,
    on_drop: Callable[[str], None] | None,
    progress,
    pauses: Pauses | None = None,
    kept_reference: feed.Kept | None = None,
) -> Fitted:
    """Trains a copy of `module` and returns it; continues from the newest checkpoint.

    theta_ref is `module` as given; its log-probs are kept in `directory` or in `kept_reference`.
    `progress(total, description, start)` is a context that gives a bar with `advance(n)`.
    """
    kept, encoded = batches.encode_examples(encoder, examples, on_drop=on_drop)
    if not kept:
        raise InputError(
            "no examples to train on: every record is UNRESOLVED, dropped or has coefficient 0"
        )
    source = feed.steps(
        module, kept, encoded, settings, kept_reference or feed.Kept(directory), progress
    )
    parted = _Parted(module, settings)
    step_fn = parted.step_fn(with_reference=source.retain is not None)
    total, ended = settings.total_steps, None
    with checkpoints.Checkpoints(directory, keep=settings.keep) as saved:
        state = parted.init_state()
        start = saved.latest_step or 0
        if processes.is_first():
            directory.mkdir(parents=True, exist_ok=True)  # in a bucket, Orbax makes another
        records.write_json(directory / BEGAN, {"step": start, "time": time.time()})
        stretch = _Stretch(source, kept, pauses, total, start)
        if start:
            state = checkpoints.shapes(state)  # and it is gone: there is no room for two
            _, state = saved.restore(state, stretch.data)
        with (
            metrics.MetricsWriter(metrics_path, resume_after=start) as writer,
            progress(total, f"train {directory.name}", start) as bar,
        ):

            def on_metrics(step: int, values: dict[str, float]) -> bool:
                writer.write(step, values)
                bar.advance(1)
                return writer.skipped <= settings.skip_steps

            def save(step: int, state: train.TrainState) -> None:
                writer.sync()
                saved.save(step, state, stretch.data)

            while ended is None:
                with preemption.stepping():
                    state = train.loop(
                        state,
                        stretch.data,
                        step_fn,
                        start=max(start, stretch.begin),
                        total_steps=stretch.end,
                        record_ids=source.record_ids,
                        on_metrics=on_metrics,
                        save=save,
                        save_every=settings.save_every,
                        due=lambda _: preemption.due(),
                    )
                if pauses is None or stretch.end not in pauses.steps:
                    ended = _Ended(state.params, kept_step=total, stopped_at=None)
                else:
                    ended = _paused(pauses, parted, state, stretch, directory)
    return Fitted(
        parted.module(ended.params, merge=True),
        feed.real_token_share(source),
        (ended.stopped_at or total) - start,
        ended.kept_step,
        ended.stopped_at,
    )


class _Parted:
    """A module as the train step takes it: what is trained, what is not, and what it was before."""

    def __init__(self, module: nnx.Module, settings: Settings):
        self.settings = settings
        self.graphdef, self.params, self.frozen = nnx.split(
            adapted(module, settings), trainable(settings), ...
        )

    def init_state(self) -> train.TrainState:
        return train.init_state(self.params, self.settings.options())

    def step_fn(self, *, with_reference: bool) -> Callable:
        """(state, host's step) -> what `train.train_step` gives for them."""
        settings = self.settings
        ref_params = reference(self.params, settings) if with_reference else None
        origin = self.params if settings.drift else None

        def step_fn(state: train.TrainState, step: batches.Step):
            return train.train_step(
                state,
                self.frozen,
                ref_params,
                sharding.place_rows(step),
                settings.hyper(),
                origin,
                graphdef=self.graphdef,
                options=settings.options(),
            )

        return step_fn

    def stored(self) -> train.TrainState:
        """A state as checkpoints have it: parameters as shapes, in their place the rest `...`."""
        whole = jax.eval_shape(self.init_state)
        wanted = jax.tree.map(lambda _: ..., whole)
        params = jax.tree.map(
            lambda new, old: jax.ShapeDtypeStruct(new.shape, new.dtype, sharding=old.sharding),
            whole.params,
            self.params,
        )
        return wanted._replace(params=params)

    def module(self, params: nnx.State, *, merge: bool) -> nnx.Module:
        """theta as a module, leaves in the dtype of those before; adapters merged, or beside."""
        if self.settings.adapters == "lora":
            module = nnx.merge(self.graphdef, params, self.frozen)
            return lora.merge(module) if merge else module
        cast = jax.tree.map(lambda t, b: t.astype(b.dtype), params, self.params)
        return nnx.merge(self.graphdef, cast, self.frozen)


class _Stretch:
    """The steps between two pauses, with the examples as the pause before them weighed them."""

    def __init__(
        self,
        source: feed.Steps,
        examples: Sequence[methods.Example],
        pauses: Pauses | None,
        total: int,
        start: int,
    ):
        self._source, self.examples = source, examples
        self._cuts = [0, *(p for p in (pauses.steps if pauses else ()) if 0 < p < total), total]
        self._index = next(i for i in range(len(self._cuts) - 1) if start <= self._cuts[i + 1])
        for past in self._cuts[1 : self._index + 1]:
            self._reweigh(pauses(past, None, self.examples))
        self.data = self._iterator()

    @property
    def begin(self) -> int:
        return self._cuts[self._index]

    @property
    def end(self) -> int:
        return self._cuts[self._index + 1]

    @property
    def is_last(self) -> bool:
        return self._index + 2 == len(self._cuts)

    def go_on(self, examples: Sequence[methods.Example]) -> None:
        """To the next stretch, with these coefficients."""
        self._reweigh(examples)
        self._index += 1
        self.data = self._iterator()

    def _reweigh(self, examples: Sequence[methods.Example]) -> None:
        self.examples = examples
        self._source.reweigh(examples)

    def _iterator(self):
        return self._source.iterator(self.begin, self.end)


class _Ended(NamedTuple):
    """What a run ends with; the steps as in `Fitted`."""

    params: nnx.State
    kept_step: int
    stopped_at: int | None


def _paused(
    pauses: Pauses, parted: _Parted, state: train.TrainState, stretch: _Stretch, directory: Path
) -> _Ended | None:
    """What the run ends with at the end of this stretch, or None: it goes on to the next one."""
    step, params = stretch.end, state.params
    reweighed = pauses(step, parted.module(params, merge=False), stretch.examples)
    tracking.flush()  # what a pause found, it does not tell again
    keeps = reweighed is not None and pauses.keeps(step)
    if reweighed is not None and not stretch.is_last:
        if keeps:
            best.keep(directory, params, step)
        stretch.go_on(reweighed)
        return None
    kept_step, params = (step, params) if keeps else best.end_with(directory, params, step)
    return _Ended(params, kept_step, stopped_at=step if reweighed is None else None)


def reference(params: nnx.State, settings: Settings) -> nnx.State:
    """Trainable leaves of theta_ref for KL examples: adapters off under LoRA (no second copy).

    In full fine-tuning it is the leaves as they were loaded, in the dtype of activations.
    """
    return lora.disabled(params) if settings.adapters == "lora" else params


def restore(module, settings: Settings, directory: Path, *, merge: bool = True):
    """The module trained by `fit` in `directory` from its newest checkpoint, adapters merged.

    merge=False leaves the adapters beside the kernels.
    """
    parted = _Parted(module, settings)
    stored = parted.stored()
    params = best.restored(directory, stored.params)
    if params is None:
        with checkpoints.Checkpoints(directory, keep=settings.keep) as saved:
            step = saved.latest_step or 0
            if step != settings.total_steps:
                raise InputError(
                    f"{directory}: the newest checkpoint is of step {step}, not "
                    f"{settings.total_steps}; rerun stage train"
                )
            params = saved.restore(stored)[1].params
    return parted.module(params, merge=merge)


def n_parameters(module) -> int:
    """Parameters of a module."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param)))
