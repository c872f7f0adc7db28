"""The program: flags -> validate -> stages in order.

python -m trace_jax.launch --config=configs/quickstart.py --workdir=runs/quickstart
    [--stages=a,b] [--redo] [--config.key=value]
    [--plan [--topology=v5e:4x4] [--json]]

Several processes, each with its devices and one workdir that all of them see: give every one
--coordinator=HOST:PORT --processes=N --process=I, or --distributed on a TPU pod or under SLURM.
"""

import difflib
import importlib.metadata
import json
import os
import re
import shlex
import sys
import traceback
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

import trace_jax
from trace_jax import (
    bucket,
    errors,
    hardware,
    metrics,
    plan,
    plan_text,
    preemption,
    processes,
    records,
    remote,
    stages,
    validation,
    workdir,
    workload,
)
from trace_jax import config as config_lib
from trace_jax.errors import InputError
from trace_jax.stages import at_work, closing, context

_ORDERED = "--xla_cpu_enable_concurrency_optimized_scheduler"
_MOST_CPU_DEVICES = 4  # each has a copy of the parameters
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # also of an address that was made a Path


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 done, 2 bad input or config, 75 again (one line on stderr)."""
    try:
        values = define_flags(argv)
        parse_flags(values, argv)
        if values.help:
            print(f"{__doc__}\n{values.get_help()}")
            return 0
        if values.config is None:
            raise InputError("--config=FILE is missing; try --config=configs/quickstart.py")
        set_environment(values.config.cpu_devices)
        processes.start(
            values.coordinator, values.processes, values.process, auto=values.distributed
        )
        if values.plan or values.topology or values.json:
            return _plan(values)
        command = shlex.join(["python", "-m", "trace_jax.launch", *argv[1:]])
        directory = _directory(values)
        with preemption.watched():
            realign(values.config, directory, only=values.stages, redo=values.redo, command=command)
            processes.wait("end")  # who is done still hears of one that is told to go
    except InputError as error:
        print("error:", str(error).replace("\n", " "), file=sys.stderr)
        return processes.leave(errors.exit_code(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return processes.leave(130)
    except Exception as error:
        told = errors.of_the_machine(error)
        if told is not None:
            print("error:", told, file=sys.stderr)
            return processes.leave(errors.exit_code(error))
        if processes.count() == 1:
            raise
        traceback.print_exc()
        return processes.leave(1)
    except preemption.Preempted as told:
        print(f"preempted ({told}); the same command goes on from here", file=sys.stderr)
        return processes.leave(preemption.EXIT_CODE)
    return 0


def _plan(values: flags.FlagValues) -> int:
    config = config_lib.resolved(values.config)
    validation.validate(config, planning=True)
    stages.chosen(values.stages)  # a name that is none is a mistake here as well
    with bucket.opened(_directory(values), read_only=True) as directory:
        run = context.Context(config, workdir.Workdir(directory))
        workload.check(run)
        found = plan.make(run, values.topology)
    if values.json:
        metrics.show(json.dumps(found))
    else:
        plan_text.show(found)
    return 0


def realign(
    config: ml_collections.ConfigDict,
    directory: str | Path,
    *,
    only: str | None = None,
    redo: bool = False,
    command: str = "",
) -> context.Context:
    """Validates, then runs the stages in `directory`; importable from a notebook.

    directory: a folder, or gs://bucket/name.
    command: what the report prints under "How to reproduce it".
    """
    _check_place(directory)
    config = config_lib.resolved(config)
    validation.validate(config)
    selected = stages.chosen(only)
    set_environment(config.cpu_devices)
    with bucket.opened(directory) as here:
        run = context.Context(config, workdir.Workdir(here))
        run.load_judges()
        with at_work.at_work(run):
            stages.run(run, selected, redo=redo, on_start=lambda: _describe(run, command))
            closing.show(run)
    if remote.is_remote(directory):
        metrics.say(f"all of it is in {directory}")
    return run


def define_flags(argv: list[str]) -> flags.FlagValues:
    """The program's flags, anew for every call of `main`, so that no call sees another's."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Experiment file, see configs/.", flag_values=values, sys_argv=argv
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the run, or gs://bucket/name; default runs/<name of the config>.",
        flag_values=values,
    )
    names = ", ".join(stages.NAMES)
    flags.DEFINE_string(
        "stages", None, f"Only these, joined by commas: {names}.", flag_values=values
    )
    redo = "Do stages again whose inputs or artefacts changed, and what depends on them."
    flags.DEFINE_bool("redo", False, redo, flag_values=values)
    say = "Say what the run would take, and whether it fits; spends and writes nothing."
    flags.DEFINE_bool("plan", False, say, flag_values=values)
    slice_ = "Plan for a TPU slice (v5e:4x4) or one GPU (h100:1) instead of the devices here."
    flags.DEFINE_string("topology", None, slice_, flag_values=values)
    flags.DEFINE_bool(
        "json", False, "Print the plan as JSON, and nothing else.", flag_values=values
    )
    where = "HOST:PORT of process 0, where there are several."
    flags.DEFINE_string("coordinator", None, where, flag_values=values)
    flags.DEFINE_integer("processes", None, "How many there are.", flag_values=values)
    flags.DEFINE_integer("process", None, "Which one this is, from 0.", flag_values=values)
    found = "Let jax find the other processes (TPU pod, SLURM, MPI)."
    flags.DEFINE_bool("distributed", False, found, flag_values=values)
    flags.DEFINE_bool("help", False, "Show the flags.", short_name="h", flag_values=values)
    return values


def parse_flags(values: flags.FlagValues, argv: list[str]) -> None:
    """Parses `argv`; whatever is wrong with it, or with the config file, is an InputError."""
    try:
        rest = values(_with_shipped_config(argv))
    except (AttributeError, KeyError) as error:
        raise _no_key(error, argv) from error
    except (flags.Error, TypeError, ValueError) as error:
        raise InputError(_one_line(error)) from error
    except Exception as error:  # a config file is a program of the user's: anything may come
        what = f"{type(error).__name__}: {_one_line(error)}"
        raise InputError(f"the config file could not be read ({what}); mend it") from error
    _check_config(values["config"])
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}; flags start with --")


def _with_shipped_config(argv: list[str]) -> list[str]:
    """argv where --config=configs/NAME.py, if no such file is here, names the one installed."""
    out = list(argv)
    for i, argument in enumerate(out):
        flag, _, value = argument.partition("=")
        if flag not in ("--config", "-config"):
            continue
        if not value and i + 1 < len(out):
            i, value, flag = i + 1, out[i + 1], ""
        name, colon, variant = value.partition(":")
        path = Path(name)
        if path.parts[:-1] != ("configs",) or path.is_file():
            continue
        package = Path(__file__).parent
        for folder in (package / "configs", package.parent / "configs"):
            if (folder / path.name).is_file():
                found = f"{folder / path.name}{colon}{variant}"
                out[i] = f"{flag}={found}" if flag else found
                break
    return out


def _check_config(flag: flags.Flag) -> None:
    """ml_collections tells of a file that it could not load only once the config is used."""
    if flag.value is None or isinstance(flag.value, ml_collections.ConfigDict):
        return
    name = config_flags.get_config_filename(flag)
    what = "is not a config" if Path(name.split(":")[0]).is_file() else "no such file"
    raise InputError(f"--config={name}: {what}; give a .py file with get_config(), see configs/")


def _no_key(error: Exception, argv: list[str]) -> InputError:
    """What to say where a flag, or else the config file, asks for what is not there."""
    base = config_lib.base_config()
    flagged = [found[1] for a in argv if (found := re.match(r"--?(?:no)?config\.([^=[]+)", a))]
    missing = next((key for key in flagged if not _has(base, key)), None)
    if missing:
        return _unknown(missing)
    inner = error.args[0] if error.args else None
    if isinstance(inner, KeyError):  # as ml_collections has it
        named = re.search(r"""["'](\w+)["']""", str(inner.args[0]))
        return _unknown(named[1] if named else str(inner))
    text = _one_line(error)
    if "'get_config'" in text:
        return InputError(f"the config file defines no get_config(): {text}")
    what = f"{type(error).__name__}: {text}"
    return InputError(f"the config file could not be read ({what}); mend it")


def _has(config: object, key: str) -> bool:
    section, _, rest = key.partition(".")
    found = isinstance(config, ml_collections.ConfigDict) and section in config
    return found and (not rest or _has(config[section], rest))


def _unknown(key: str) -> InputError:
    """What to say of a key that is not there: the nearest ones, by spelling or initials."""
    name = key.rpartition(".")[2]

    def likeness(known: str) -> float:
        last = known.rpartition(".")[2]
        same = name in (last, "".join(word[0] for word in last.split("_")))
        return same + difflib.SequenceMatcher(None, key, known).ratio()

    nearest = sorted(config_lib.flatten(config_lib.base_config()), key=likeness, reverse=True)[:3]
    return InputError(
        f"unknown config key {key}; the nearest are {', '.join(nearest)} (trace_jax/config.py has "
        "every key)"
    )


def _one_line(error: Exception) -> str:
    text = str(error.args[0]) if error.args else str(error)
    flag, of_file, trace = text.partition(": Error whilst parsing config file:")
    if not of_file:
        return " ".join(text.split())
    why, variant = trace.strip().splitlines()[-1], flag.rpartition(":")[2]
    if "get_config() takes 0 positional" in why:
        return f"{flag.removeprefix('flag ')}: this config has no variants; leave out :{variant}"
    if "get_config() missing" in why:
        return f"{flag.removeprefix('flag ')}: this config has variants; name one, as FILE.py:NAME"
    return f"the config file could not be read ({why}); mend it"


def _directory(values: flags.FlagValues) -> str | Path:
    name = config_flags.get_config_filename(values["config"])
    if values.workdir:
        _check_place(values.workdir)
        return values.workdir if remote.is_remote(values.workdir) else Path(values.workdir)
    return Path("runs") / Path(name).stem.split(":")[0]


def _check_place(workdir: str | Path) -> None:
    if not remote.is_remote(workdir) and _SCHEME.match(os.fspath(workdir)):
        raise InputError(
            f"workdir {workdir}: a run works in a local folder or in {remote.SCHEME}BUCKET/NAME "
            "(given as a text); give one of these, or a folder where the other storage is mounted"
        )


def _describe(run: context.Context, command: str) -> None:
    """Writes config.json, versions.json and policy.yaml beside the artefacts."""
    path = run.workdir.path
    used = versions() | ({"command": command} if command else {})
    if processes.is_first():
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); give another --workdir"
            ) from error
    records.write_json(path / "config.json", run.config.to_dict())
    records.write_json(path / "versions.json", used)
    records.write_text(path / "policy.yaml", run.new_policy.source)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    names = (
        "jax",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "transformers",
        "numpy",
    )
    found = {"python": sys.version.split()[0], "trace_jax": trace_jax.__version__}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def set_environment(cpu_devices: int = 1) -> None:
    """Compiled programs outlive the process: a rerun starts at once. A variable set by hand wins.

    cpu_devices: as in the config. Several of them wait for each other for ever where collectives
    may start in any order. Of a GPU jax takes three quarters unless it is told otherwise.
    transformers is here for its tokenizers; that PyTorch is missing is no news to anybody.
    """
    flags_of_xla = os.environ.get("XLA_FLAGS", "")
    if "device_count" not in flags_of_xla:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        devices = cpu_devices or min(cores, _MOST_CPU_DEVICES)
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(devices))
    if _ORDERED not in flags_of_xla:
        os.environ["XLA_FLAGS"] = f"{flags_of_xla} {_ORDERED}=false".strip()
    if not any(name in os.environ for name in hardware.SHARE_VARIABLES):
        os.environ[hardware.SHARE_VARIABLES[0]] = str(hardware.GPU_SHARE)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "trace_jax" / "xla")
    )
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
