"""Several methods and seeds over one prepared workdir: same records, M_ref, verdicts, corrections.

python -m trace_jax.compare --config=FILE --workdir=DIR --methods=trace,dpo,sft --seeds=3 \\
    [--jobs=2] [--config.key=value]

A method may carry overrides: `trace+train.punish=dual_npo`. Each run has its own folder,
DIR/compare/<method>-seed<k>, with its own impact, train and evaluate stages, so an interrupted
comparison goes on. A variant that changes triage.* or correct.* does these stages itself as well.
Writes comparison.json, comparison.md, comparison.tex and comparison.png.
"""

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from trace_jax import config as config_lib
from trace_jax import (
    errors,
    launch,
    locks,
    methods,
    metrics,
    policy,
    preemption,
    records,
    remote,
    stages,
    validation,
    workdir,
)
from trace_jax.errors import InputError
from trace_jax.stages import at_work, context

SHARED = ("prepare", "align", "triage", "baseline", "correct")
OWN = ("impact", "train", "evaluate")
CHANGEABLE = ("triage", "correct")  # a variant that changes one does it and what follows itself
FOLDER, PLAN = "compare", "runs.json"  # in the prepared workdir; in there, what is to be run
_FIXED = (
    "parent",
    "model",
    "data",
    "policy",
    "judge",
    "asking",
    "align",
    "evaluate",
    "mesh",
    "seed",
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A method with overrides of the config, under the name it has in tables."""

    name: str
    overrides: dict[str, str]


def parse_methods(text: str) -> list[Variant]:
    """ "trace,trace+train.punish=dual_npo" -> variants."""
    found = []
    for name in (part.strip() for part in text.split(",") if part.strip()):
        method, *pairs = name.split("+")
        split = [pair.partition("=") for pair in pairs]
        if any(not equals for _, equals, _ in split):
            raise InputError(f"--methods={name}: an override reads key=value")
        preset = methods.PRESETS.get(method, {"train.method": method})
        found.append(Variant(name, preset | {key: value for key, _, value in split}))
    if len({v.name for v in found}) < len(found) or not found:
        raise InputError(f"--methods={text}: name each method once")
    return found


def folder(prepared: Path, variant: Variant, seed: int) -> Path:
    """Where a run of the comparison lives."""
    return prepared / FOLDER / f"{variant.name.replace('/', '_')}-seed{seed}"


def run_variant(config: dict, prepared: Path, target: Path, own: Sequence[str] = OWN) -> dict:
    """Runs a variant's own stages in `target`, returns its eval.json. Arguments cross processes."""
    settings = ml_collections.ConfigDict(config)
    settings.evaluate.splits = tuple(settings.evaluate.splits)
    # One store and one budget: what a method had judged is not paid for again by the next.
    settings.asking.store = str(workdir.store(prepared.resolve(), settings))
    shared = frozenset(SHARED) - set(own)
    directory = workdir.Workdir(target, workdir.Workdir(prepared), shared)
    target.mkdir(parents=True, exist_ok=True)
    run = context.Context(settings, directory)

    def describe() -> None:
        records.write_json(target / "config.json", settings.to_dict())

    with at_work.at_work(run):
        stages.run(run, stages.chosen(",".join(own)), redo=True, on_start=describe)
    return records.read_json(target / "eval.json")


def run_all(
    config: ml_collections.ConfigDict, prepared: Path, todo: Sequence[tuple[Path, dict]], jobs: int
) -> list[dict]:
    """Runs (folder, overrides) pairs, `jobs` at once, and returns their eval.json in order."""
    work = []
    for number, (target, overrides) in enumerate(todo, start=1):
        one = config_lib.with_overrides(config, overrides)
        validation.validate(one)
        changed = {k: v for k, v in overrides.items() if k.split(".")[0] in CHANGEABLE}
        own = own_stages(Variant(target.name, changed))
        heading = f"== {_title(target, one.seed)} ({number} of {len(todo)})"
        work.append((heading, one.to_dict(), prepared, target, own))
    with metrics.progress(len(work), "compare") as bar:
        if jobs == 1:
            return [_counted(_run(*item), bar) for item in work]
        spawn = multiprocessing.get_context("spawn")
        cores = spawn.SimpleQueue()
        for core in sorted(os.sched_getaffinity(0)) * jobs:
            cores.put(core)
        made = concurrent.futures.ProcessPoolExecutor(
            jobs, spawn, initializer=_pin, initargs=(cores,)
        )
        with _workers_told(), made as pool, _workers_told():  # the pool waits for them as it ends
            futures = [pool.submit(_in_worker, *item) for item in work]
            return [_counted(future.result(), bar) for future in futures]


def _title(target: Path, seed: int) -> str:
    """ "trace, seed 1" of .../trace-seed1."""
    name = target.name.removesuffix(f"seed{seed}").removesuffix("-")
    return f"{name}, seed {seed}" if name else f"seed {seed}"


def _run(heading: str, *item) -> dict:
    metrics.say(heading)
    return run_variant(*item)


@contextlib.contextmanager
def _workers_told() -> Iterator[None]:
    """Who is told to go in here tells the workers, which save their step.

    Raises:
      InputError: one of them was killed.
    """
    try:
        yield
    except (preemption.Preempted, KeyboardInterrupt):
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    except concurrent.futures.BrokenExecutor as error:
        raise InputError(
            "a process of the comparison was killed, as where memory ends; the same command goes "
            "on, and takes less memory with fewer --jobs"
        ) from error


def _in_worker(*item) -> dict:
    """`_run`; told to go, this process ends, and takes no other run."""
    try:
        with preemption.watched():
            return _run(*item)
    except preemption.Preempted:
        os._exit(preemption.EXIT_CODE)


def _pin(cores) -> None:
    """One core a process: several times faster for small micro-batches than shared threads.

    Such a process ends with its parent, however that ends, and leaves Ctrl-C to it.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.sched_setaffinity(0, {cores.get()})
    os.environ["JAX_NUM_CPU_DEVICES"] = "1"


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(preemption.EXIT_CODE)


def _counted(found: dict, bar) -> dict:
    bar.advance(1)
    return found


def compare(
    config: ml_collections.ConfigDict,
    prepared: Path,
    variants: Sequence[Variant],
    n_seeds: int,
    jobs: int = 1,
    *,
    winrate: bool = True,
) -> dict:
    """Runs everything that is not there yet; writes comparison.json and the rest, returns it.

    winrate: ask the judge for win rates against u2a, where it is one of the methods.
    """
    config = config_lib.resolved(config)
    seeds = [config.seed + k for k in range(n_seeds)]
    for variant in variants:
        own_stages(variant)
        validation.validate(config_lib.with_overrides(config, variant.overrides))
    launch.realign(config, prepared, only=",".join(SHARED))
    todo = [(folder(prepared, v, s), v.overrides | {"seed": s}) for v in variants for s in seeds]
    with _told(prepared, [target.name for target, _ in todo]):
        run_all(config, prepared, todo, jobs)
        found = summary(config, prepared, variants, seeds, winrate=winrate)
        write(found, prepared)
        _report_anew(config, prepared)
    return found


@contextlib.contextmanager
def _told(prepared: Path, runs: Sequence[str]) -> Iterator[None]:
    """In here `status` finds the comparison at work, and the runs that it will do, in order.

    Several comparisons may work in one folder; it tells of the first one.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locks.of(prepared / FOLDER))
        except InputError as error:
            metrics.say(f"  status will not tell of this comparison: {error}")
        else:
            records.write_json(prepared / FOLDER / PLAN, {"runs": list(runs)})
        yield


def _report_anew(config: ml_collections.ConfigDict, prepared: Path) -> None:
    """The report of a run that has come that far is made again, now with the comparison."""
    run = context.Context(config, workdir.Workdir(prepared))
    (report,) = stages.chosen("report")
    if all(run.workdir.finished(name) for name in report.upstream):
        with at_work.at_work(run):
            run.workdir.forget(report.name, report.outputs)
            stages.run(run, [report], redo=False)


def own_stages(variant: Variant) -> tuple[str, ...]:
    """The stages that a variant does not share: OWN, and of SHARED those that it changes.

    Raises:
      InputError: it changes what all methods have to share to be compared.
    """
    fixed = [k for k in variant.overrides if k.split(".")[0] in _FIXED]
    if fixed:
        raise InputError(
            f"--methods={variant.name}: {fixed[0]} has to be the same for all methods; prepare "
            "another workdir for it"
        )
    changed = {k.split(".")[0] for k in variant.overrides} & set(CHANGEABLE)
    first = min((CHANGEABLE.index(name) for name in changed), default=len(CHANGEABLE))
    return (*CHANGEABLE[first:], *OWN)


def summary(
    config: ml_collections.ConfigDict,
    prepared: Path,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    *,
    winrate: bool = True,
) -> dict:
    """comparison.json of finished runs; see `comparison.summary`.

    It is written without win rates before the judge is asked for them, since the judge may fail.
    """
    from trace_jax import comparison
    from trace_jax.evaluate import choices

    split = config.evaluate.splits[0]
    new = policy.load(config.policy.new)
    kept = policy.diff(policy.load(config.policy.old), new).unchanged
    folders = {v.name: [folder(prepared, v, s) for s in seeds] for v in variants}
    evaluated = {
        name: [records.read_json(f / "eval.json") for f in of] for name, of in folders.items()
    }
    comparison.check_policy(evaluated, new.hash)
    runs = {
        name: [comparison.rows_of(f / "samples.jsonl", "trained", split, kept) for f in of]
        for name, of in folders.items()
    }
    perplexity = {name: [e["perplexity"] for e in of] for name, of in evaluated.items()}
    chosen = {
        name: [e["choice_accuracy"]["chosen"] for e in of]
        for name, of in evaluated.items()
        if all("choice_accuracy" in e for e in of)  # runs of earlier versions have none
    }
    known = records.read_json(prepared / "perplexity.json")[split]
    before = {
        model: [comparison.rows_of(prepared / "baseline.jsonl", model, split, kept)]
        for model in ("base", "ref")
    }
    before = {model: of for model, of in before.items() if of[0]}
    (ref,) = before.get("ref", before["base"])  # without one of its own, the base model is M_ref
    found = {
        **{
            model: comparison.figures(of)
            | {"perplexity": known[model]}
            | choices.figure(known.get("chosen", {}).get(model))
            for model, of in before.items()
        },
        "seeds": list(seeds),
        "split": split,
        "unchanged_clauses": list(kept),
        **comparison.summary(runs, perplexity, chosen, ref=ref),
    }
    if winrate and comparison.LOWER in runs:
        write(found, prepared)
        judge = context.Context(config, workdir.Workdir(prepared)).judge
        for name, rate in comparison.win_rates(judge, before | runs).items():
            of = found if name in before else found["methods"]
            of[name]["win_rate_vs_u2a"] = rate
    return found


def write(found: dict, target: Path) -> None:
    """comparison.json, .md, .tex and .png in a folder."""
    from trace_jax import comparison_tables

    records.write_json(target / "comparison.json", found)
    (target / "comparison.md").write_text(comparison_tables.markdown(found))
    (target / "comparison.tex").write_text(comparison_tables.latex(found))
    comparison_tables.plot(found, target / "comparison.png")


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The flags of a comparison, anew for every call."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Experiment file, see configs/.", flag_values=values, sys_argv=argv
    )
    define = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "Prepared run (prepared first where it is not).", **define)
    flags.DEFINE_string("methods", "trace", "Methods, joined by commas: name+key=value.", **define)
    counted = define | {"lower_bound": 1}
    flags.DEFINE_integer("seeds", 3, "Runs a method: config.seed, config.seed + 1, ...", **counted)
    asks = "Ask the judge for win rates against u2a, in both orders."
    flags.DEFINE_bool("winrate", True, asks, **define)
    flags.DEFINE_integer("jobs", 1, "Processes at once, each on a core of its own.", **counted)
    flags.DEFINE_bool("help", False, "Show the flags.", short_name="h", **define)
    return values


def main(argv: list[str]) -> int:
    """Exit code 0 done, 2 bad input, 75 again."""
    try:
        values = define_flags(argv)
        launch.parse_flags(values, argv)
        if values.help:
            print(f"{__doc__}\n{values.get_help()}")
            return 0
        if values.config is None or values.workdir is None:
            raise InputError("--config=FILE and --workdir=DIR are needed")
        if remote.is_remote(values.workdir):
            raise InputError(
                f"--workdir={values.workdir}: a comparison works in a local folder; give one"
            )
        target, variants = Path(values.workdir), parse_methods(values.methods)
        wanted = (variants, values.seeds, values.jobs)
        with preemption.watched():
            compare(values.config, target, *wanted, winrate=values.winrate)
    except InputError as error:
        print("error:", error, file=sys.stderr)
        return errors.exit_code(error)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except preemption.Preempted as told:
        print(f"preempted ({told}); the same command goes on from here", file=sys.stderr)
        return preemption.EXIT_CODE
    except Exception as error:
        told = errors.of_the_machine(error)
        if told is None:
            raise
        print("error:", told, file=sys.stderr)
        return errors.exit_code(error)
    print((target / "comparison.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
