"""What a run will take, before anything is spent: no weights, no network, no workdir written.

Counts come from `workload.py`. Memory comes from the compiler: for the attached devices,
or, with a topology, from the real TPU compiler on any machine.
"""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trace_jax import hardware, metrics, model_folder, packing, scratch, workdir, workload
from trace_jax.errors import InputError
from trace_jax.hardware import GIB
from trace_jax.stages import context


def make(run: context.Context, topology: str | None) -> dict[str, Any]:
    """The plan, as --json prints it.

    Raises:
      InputError: the shape of the model is not known, or the mesh does not fit.
    """
    devices, chip = _devices(topology)
    from trace_jax import programs, sharding

    mesh = sharding.make_mesh(**run.config.mesh.to_dict(), devices=devices)
    config = run.config
    shape = model_shape(run)
    sharding.check_model(mesh, shape)
    model = programs.Model(
        shape,
        config.model.dtype,
        config.model.remat,
        config.model.head_chunk,
        config.train.layer_rows,
        max(config.model.attention_block, -1 if devices[0].platform == "cpu" else 0),
    )
    work = workload.of(run)
    layouts = _layouts(run, shape, work, sharding.row_shards(mesh), devices[0].platform)
    with _compiling(topology):
        found = _programs(run, model, layouts, mesh)
    parameters = _parameters(model, run.settings("train"))
    flops = _flops(run, shape, layouts, sharding.row_shards(mesh))
    for name, value in flops.items():
        found[name]["flops"] = value
    chips = mesh.size
    hours = _hours(run, shape, found, work, layouts, chip, chips)
    peak = max(p["peak_bytes"] for p in found.values())
    return {
        "fits": peak <= chip.memory,
        "verdict": _verdict(run, found, chip),
        "device": {
            "kind": chip.name,
            "count": chips,
            "mesh": dict(mesh.shape),
            "compiled_for": devices[0].device_kind,
        },
        "device_memory_bytes": chip.memory,
        "device_memory_share": chip.share,
        "programs": found,
        "parameters": parameters,
        "records": {
            "total": work.records,
            "by_action": work.by_action,
            "assumed": work.assumed,
        },
        "tokens": _tokens(work, layouts, run),
        "judge": workload.judging(run),
        "judge_later": workload.judging_later(run, work),
        "hours": hours,
        "utilisation": config.plan.utilisation,
    }


def _devices(topology: str | None) -> tuple[list, hardware.Chip]:
    """The devices to plan for, and what they are."""
    if topology is None:
        import jax

        return jax.devices(), hardware.of_device(jax.devices()[0])
    chip, is_tpu = hardware.of_topology(topology)
    # Nothing runs on a device: the compiler needs none, and the one that is here stays free.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_STDERR_LOG_LEVEL": "3"}
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # two plans may compile at the same time
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # it warns where these are missing,
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")  # and compiles the same with any
    import jax

    if not is_tpu:
        return _of_one_gpu(), chip
    try:
        return _of_slice(topology), chip
    except (RuntimeError, ValueError, NotImplementedError) as error:
        what = str(error).strip().splitlines()[0]
        raise InputError(
            f"--topology={topology}: the TPU compiler cannot plan for it ({what}); is it installed "
            "(pip install -e '.[tpu]' in the checkout) and the slice one that exists, such as "
            "v5e:4x4?"
        ) from error


@contextlib.contextmanager
def _compiling(topology: str | None) -> Iterator[None]:
    """What was compiled for devices elsewhere can be kept in the cache, but not read from it."""
    import jax

    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", before and topology is None)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _of_slice(topology: str) -> list:
    from jax.experimental import topologies

    # A host has four chips or more, unless it is told that it has one.
    one = set(topology.partition(":")[2].split("x")) == {"1"}
    options = {"chips_per_host_bounds": (1, 1, 1)} if one else {}
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    return list(found.devices)


def _of_one_gpu() -> list:
    """The device to compile for in place of a GPU, whose compiler works on a GPU alone.

    A TPU chip with as much memory keeps bfloat16 as it is, and so has about its temporaries. Where
    there is no TPU compiler: the CPU, which makes float32 of it and overstates them.
    """
    import jax

    try:
        return _of_slice("v5p:1x1x1")
    except (RuntimeError, ValueError, NotImplementedError):
        return jax.devices("cpu")[:1]


def model_shape(run: context.Context):
    """The ModelConfig, from the model's folder, or from the config where that is not here."""
    from trace_jax import models
    from trace_jax.models import hf_weights

    config = run.config.model
    base = Path(config.path) if config.path else run.file("prepare", "base")
    adapter = base if model_folder.is_adapter(base) else None
    with contextlib.suppress(InputError):  # an adapter whose model is on the hub
        base = model_folder.chain(base, find=lambda name, _: Path(name))[-1]  # and stays there
    if (base / model_folder.CONFIG).is_file():
        return hf_weights.read_config(base)
    if config.hf_config:
        return models.ModelConfig.from_hf(config.hf_config.to_dict())
    if adapter is not None:
        raise InputError(
            f"{adapter} is an adapter of {str(model_folder.named(adapter)[0])[:200]!r}, which is "
            "not here; put the content of that model's config.json into model.hf_config"
        )
    if config.path:
        raise InputError(
            f"model.path={config.path} is not here, and model.hf_config does not give its shape; "
            "copy its config.json there, or into the config"
        )
    import tokenizers

    with tempfile.TemporaryDirectory() as folder:
        scratch.write_tokenizer(config.scratch.tokenizer, Path(folder))
        written = tokenizers.Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    return models.scratch(config.scratch.to_dict(), written.get_vocab_size())


def _layouts(
    run: context.Context, shape, work: workload.Work, shards: int, platform: str
) -> dict[str, Any]:
    """Layouts of a step's conflict and KL rows, of the impact pass, and the length of rows."""
    settings = run.settings("train")
    per_step = {"conflict": settings.examples_per_step, "retain": settings.retain_per_step}
    kinds = {name: getattr(work, name) for name in per_step if getattr(work, name)}
    from trace_jax.models import block_attention

    most = settings.row_length or max(map(max, kinds.values()))
    block = run.config.model.attention_block
    flops = block_attention.position_flops(shape, block, most, platform)
    plans = packing.plan_steps(
        [([min(n, most) for n in of], per_step[name]) for name, of in kinds.items()],
        total_steps=min(settings.total_steps, 20),
        seed=settings.seed,
        balanced=settings.balance_steps,
        row_length=settings.row_length,
        micro_rows=settings.micro_rows,
        shards=shards,
        flops=flops,
        platform=platform,
    )
    row_length, micro_rows = settings.row_length, run.config.impact.micro_rows
    if not row_length:
        row_length, micro_rows = packing.best_row(
            work.conflict or work.retain,
            micro_rows=micro_rows,
            shards=shards,
            flops=flops,
            platform=platform,
        )
    slots = max(1, row_length // max(1, min(work.conflict or work.retain)))
    impact = packing.Layout(micro_rows * shards, row_length, slots, 1)
    found = {name: plan.layout for name, plan in zip(kinds, plans, strict=True)}
    return {"conflict": None, "retain": None, "impact": impact} | found


def _programs(run: context.Context, model, layouts: dict, mesh) -> dict[str, dict[str, Any]]:
    """Memory of each program, from the compiler."""
    from trace_jax import programs

    settings, evaluate = run.settings("train"), run.config.evaluate
    prompt, tokens = _longest_prompt(run, model.config), evaluate.max_new_tokens
    prefill, sample = programs.sample(model, evaluate.batch_rows, prompt, tokens, mesh)
    lowered = {
        "train": lambda: programs.train_step(
            model, settings, layouts["conflict"], layouts["retain"], mesh
        ),
        "impact": lambda: programs.impact_pass(model, settings, layouts["impact"], mesh),
        "prefill": lambda: prefill,
        "sample": lambda: sample,
    }
    found = {}
    for name, lower in lowered.items():
        clock = workdir.Clock()
        memory = programs.memory(lower())
        found[name] = dataclasses.asdict(memory) | {
            "peak_bytes": memory.peak_bytes,
            "compile_seconds": round(clock.seconds, 1),
        }
        metrics.say(f"compiled {name} in {metrics.duration(clock.seconds)}")
    # The guard asks the base model while the re-aligned one is loaded.
    beside = programs.parameter_bytes(model, mesh)
    for name in ("prefill", "sample"):
        found[name]["argument_bytes"] += beside
        found[name]["peak_bytes"] += beside
    full = run.config.train.adapters == "none"
    if full and layouts["retain"] is None and not settings.drift:  # M_ref stays, though no argument
        found["train"]["argument_bytes"] += beside
        found["train"]["peak_bytes"] += beside
    if full:  # the gradient of half the gold batch waits meanwhile
        found["impact"]["argument_bytes"] += beside
        found["impact"]["peak_bytes"] += beside
    return found


def _longest_prompt(run: context.Context, shape) -> int:
    room = min(run.config.data.max_length, shape.max_position_embeddings)
    return room - run.config.evaluate.max_new_tokens


def _parameters(model, settings) -> dict[str, int]:
    from trace_jax import programs

    total, trainable = programs.count_parameters(model, settings)
    return {"total": total, "trainable": trainable}


def _flops(run: context.Context, shape, layouts: dict, shards: int) -> dict[str, float]:
    """Of one step, one impact batch, one refill and one decoded token a row, from the shapes.

    Recomputed layers do not count, as is usual for utilisation.
    """
    full = run.config.train.adapters == "none"

    def forward(name: str) -> float:
        layout = layouts[name]
        if layout is None:
            return 0.0
        positions = layout.n_rows * layout.row_length
        return positions * shape.forward_flops(layout.row_length)

    from trace_jax import sampling

    rows, prompt = run.config.evaluate.batch_rows, _longest_prompt(run, shape)
    backward = 2.0 if full else 1.0  # gradients of activations, and of parameters if they train
    a_tangent = 2.0 if full else 1.0
    return {
        "train": (1 + backward) * forward("conflict") + (2 + backward) * forward("retain"),
        "impact": forward("impact") * (1 + a_tangent),
        "prefill": sampling.refilled(max(rows, shards), shards)
        * prompt
        * shape.forward_flops(prompt),
        "sample": shape.forward_flops(run.config.data.max_length) * rows,
    }


def _tokens(work: workload.Work, layouts: dict, run: context.Context) -> dict[str, Any]:
    found = {
        "per_epoch": int(sum(work.conflict + work.retain) * work.scale),
        "row_length": next(x for x in map(layouts.get, ("conflict", "retain")) if x).row_length,
        "estimated": work.estimated,
    }
    for name in ("conflict", "retain"):
        layout = layouts[name]
        found[f"{name}_rows_per_step"] = 0 if layout is None else layout.n_rows
    rows = found["conflict_rows_per_step"] + found["retain_rows_per_step"]
    return found | {"per_step": rows * found["row_length"]}


def _hours(
    run, shape, found: dict, work: workload.Work, layouts: dict, chip, chips: int
) -> float | None:
    """At the stated utilisation, all stages; None where the peak speed is not known."""
    peak = run.config.plan.peak_tflops * 1e12 or chip.flops
    if not peak:
        return None
    config = run.config
    steps = config.train.total_steps + config.align.enabled * config.align.total_steps
    impact = layouts["impact"]
    rows = work.scale * sum(work.conflict) / impact.row_length
    train = found["train"]["flops"] * steps + found["impact"]["flops"] * rows / impact.n_rows
    prompts = config.data.validation_prompts * ("validation" in config.evaluate.splits)
    prompts += config.data.test_prompts * ("test" in config.evaluate.splits)
    answers = prompts * (config.evaluate.samples + 1) * (2 + run.has_ref)
    sample = found["sample"]["flops"] / config.evaluate.batch_rows
    sample *= answers * config.evaluate.max_new_tokens
    # A prompt is taken for a third of a pair's example, which is it and both responses.
    prompt = sum(work.conflict) / max(1, len(work.conflict)) / 3
    prefill = answers * prompt * shape.forward_flops(prompt)
    seconds = (train + prefill) / config.plan.utilisation
    seconds += sample / config.plan.decode_utilisation
    return seconds / (peak * chips) / 3600


def _verdict(run: context.Context, found: dict, chip: hardware.Chip) -> str:
    worst = max(found, key=lambda name: found[name]["peak_bytes"])
    peak = found[worst]["peak_bytes"]
    if peak <= chip.memory:
        return f"fits: {worst} takes {peak / GIB:.2f} of {chip.memory / GIB:.2f} GiB a device"
    return (
        f"does not fit by {(peak - chip.memory) / GIB:.2f} GiB ({worst}); try {_advice(run, worst)}"
    )


def _advice(run: context.Context, worst: str) -> str:
    config = run.config
    if worst in ("prefill", "sample"):
        return "a smaller evaluate.batch_rows, or more devices"
    section = "impact" if worst == "impact" else "train"
    tries = []
    if config[section].micro_rows > 1:
        tries.append(f"{section}.micro_rows={config[section].micro_rows // 2}")
    if section == "train" and config.train.micro_rows > 2 and not config.train.layer_rows:
        tries.append("train.layer_rows=2")
    if config.model.dtype == "float32":
        tries.append("model.dtype=bfloat16")
    if config.model.remat != "layer":
        tries.append("model.remat=layer")
    if config.train.adapters == "none" and config.train.mu_dtype == "float32":
        tries.append("train.mu_dtype=bfloat16")
    if config.train.adapters == "none":
        tries.append("train.adapters=lora")
    return ", ".join([*tries, "or more devices along mesh.fsdp"])
