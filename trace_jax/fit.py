"""From examples to a trained model: reference log-probs, pack plan, steps, checkpoints.

One path for every method and stage.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trace_jax import (
    batches,
    checkpoints,
    encoding,
    logprobs,
    methods,
    metrics,
    processes,
    sharding,
    train,
)
from trace_jax.errors import InputError
from trace_jax.models import lora


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
    mu_dtype: str
    adapters: str
    lora_rank: int
    lora_alpha: float
    lora_targets: str
    save_every: int
    keep: int
    seed: int

    @classmethod
    def of(cls, section, *, row_length: int, seed: int) -> "Settings":
        """From a training section of the config."""
        own = {"row_length": row_length, "seed": seed}
        own |= {f"lora_{key}": section.lora[key] for key in ("rank", "alpha", "targets")}
        names = [f.name for f in dataclasses.fields(cls) if f.name not in own]
        return cls(**own, **{name: section[name] for name in names})

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


class _Steps:
    """Grain source: step -> train.Step of both kinds of batches."""

    def __init__(self, conflict: batches.StepSource | None, retain: batches.StepSource | None):
        self.conflict, self.retain = conflict, retain

    def __len__(self) -> int:
        return len(self.conflict or self.retain)

    def __getitem__(self, step: int) -> batches.Step:
        return batches.Step(*(None if s is None else s[step] for s in (self.conflict, self.retain)))

    def record_ids(self, step: int) -> list[str]:
        return [
            i for s in (self.conflict, self.retain) if s is not None for i in s.record_ids(step)
        ]


@dataclasses.dataclass
class Fitted:
    """The trained module (adapters merged) and what the run is worth knowing of."""

    module: nnx.Module
    real_token_share: float
    steps_run: int


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
) -> Fitted:
    """Trains a copy of `module` and returns it; continues from the newest checkpoint.

    theta_ref is `module` as given. `progress(total, description, start)` is a context that gives a
    bar with `advance(n)`.
    """
    kept, encoded = batches.encode_examples(encoder, examples, on_drop=on_drop)
    if not kept:
        raise InputError(
            "no examples to train on: every record is UNRESOLVED, dropped or has coefficient 0"
        )
    source = _sources(module, kept, encoded, settings, directory, progress)
    module = adapted(module, settings)
    graphdef, params, frozen = nnx.split(module, trainable(settings), ...)
    state = train.init_state(params, settings.options())
    ref_params = None if source.retain is None else reference(params, settings)
    data = iter(grain.MapDataset.source(source).to_iter_dataset(grain.ReadOptions(1, 2)))

    def step_fn(state: train.TrainState, step: batches.Step):
        return train.train_step(
            state,
            frozen,
            ref_params,
            sharding.place_rows(step),
            settings.hyper(),
            graphdef=graphdef,
            options=settings.options(),
        )

    with checkpoints.Checkpoints(directory, keep=settings.keep) as saved:
        start, state = saved.restore(state, data) or (0, state)
        with metrics.MetricsWriter(metrics_path, resume_after=start) as writer:
            with progress(settings.total_steps, f"train {directory.name}", start) as bar:

                def on_metrics(step: int, values: dict[str, float]) -> None:
                    writer.write(step, values)
                    bar.advance(1)

                state = train.loop(
                    state,
                    data,
                    step_fn,
                    start=start,
                    total_steps=settings.total_steps,
                    record_ids=source.record_ids,
                    on_metrics=on_metrics,
                    save=lambda step, state: saved.save(step, state, data),
                    save_every=settings.save_every,
                )
    return Fitted(
        _finished(graphdef, state.params, params, frozen, settings),
        _token_share(source, encoded, settings),
        settings.total_steps - start,
    )


def _finished(
    graphdef, trained: nnx.State, before: nnx.State, frozen: nnx.State, settings, *, merge=True
):
    """The module after training, adapters merged; leaves have the dtype of those before it."""
    if settings.adapters == "lora":
        module = nnx.merge(graphdef, trained, frozen)
        return lora.merge(module) if merge else module
    return nnx.merge(
        graphdef, jax.tree.map(lambda t, b: t.astype(b.dtype), trained, before), frozen
    )


def reference(params: nnx.State, settings: Settings) -> nnx.State:
    """Trainable leaves of theta_ref for KL examples: adapters off under LoRA (no second copy).

    In full fine-tuning it is the leaves as they were loaded, in the dtype of activations.
    """
    return lora.disabled(params) if settings.adapters == "lora" else params


def _sources(module, examples, encoded, settings: Settings, directory: Path, progress) -> _Steps:
    """Pack plans and step sources of the conflict and the KL examples."""

    def source(members: list[int], per_step: int, row_length: int) -> batches.StepSource | None:
        if not members:
            return None
        kept = [encoded[i] for i in members]
        used = [examples[i] for i in members]
        needs_ref = any(e.pref or e.npo0 or e.npo1 for e in used)
        ref = (
            reference_logprobs(module, kept, row_length, settings.micro_rows, directory, progress)
            if needs_ref
            else np.zeros((len(kept), 2), np.float32)
        )
        plan = batches.PackPlan(
            [e.row_length for e in kept],
            per_step=per_step,
            total_steps=settings.total_steps,
            seed=settings.seed,
            row_length=row_length,
            micro_rows=settings.micro_rows,
        )
        return batches.StepSource(plan, kept, used, ref)

    conflict = [i for i, e in enumerate(examples) if not e.kl]
    retain = [i for i, e in enumerate(examples) if e.kl]
    row_length = settings.row_length or longest_row(encoded)
    found = _Steps(
        source(conflict, settings.examples_per_step, row_length),
        source(retain, settings.retain_per_step, row_length),
    )
    batches.share_micro_batches(
        [s.plan for s in (found.conflict, found.retain) if s is not None],
        micro_rows=settings.micro_rows,
        shards=sharding.shards_in_context(),
    )
    return found


def longest_row(encoded: Sequence[encoding.Encoded]) -> int:
    """Tokens of the longest example, rounded up to 64."""
    return batches.round_up(max(e.row_length for e in encoded), 64)


def reference_logprobs(
    module, encoded, row_length: int, micro_rows: int, directory: Path, progress
) -> np.ndarray:
    """log p_ref of both responses, [n, 2]; kept beside the checkpoints, keyed by the tokens.

    The weights are fixed by `directory`: a stage whose model changed does not continue there.
    """
    key = hashlib.sha256(json.dumps([dataclasses.astuple(e) for e in encoded]).encode()).hexdigest()
    path = directory / "reference_logprobs.npz"
    if path.exists():
        with np.load(path) as stored:
            if str(stored["key"]) == key:
                return stored["logp"]
    with progress(len(encoded), "reference log-probs") as bar:
        logp = logprobs.of_texts(
            module, encoded, row_length=row_length, micro_rows=micro_rows, progress=bar.advance
        )
    if processes.is_first():
        directory.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, key=key, logp=logp)
        temporary.replace(path)
    return logp


def _token_share(source: _Steps, encoded, settings: Settings) -> float:
    kinds = [s for s in (source.conflict, source.retain) if s is not None]
    return float(
        np.mean([s.plan.real_token_share([e.row_length for e in s.encoded]) for s in kinds])
    )


def restore(module, settings: Settings, directory: Path, *, merge: bool = True):
    """The module trained by `fit` in `directory` from its newest checkpoint, adapters merged.

    merge=False leaves the adapters beside the kernels.
    """
    graphdef, params, frozen = nnx.split(adapted(module, settings), trainable(settings), ...)
    state = train.init_state(params, settings.options())
    with checkpoints.Checkpoints(directory, keep=settings.keep) as saved:
        step, state = saved.restore(state) or (0, state)
    if step != settings.total_steps:
        raise InputError(
            f"{directory}: the newest checkpoint is of step {step}, not {settings.total_steps}; "
            "rerun stage train"
        )
    return _finished(graphdef, state.params, params, frozen, settings, merge=merge)


def n_parameters(module) -> int:
    """Parameters of a module."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param)))
