"""The program: flags -> validate -> stages in order.

python -m trace_jax.launch --config=configs/quickstart.py --workdir=runs/quickstart [--stages=a,b] [--redo] [--config.key=value]
"""

import importlib.metadata
import os
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from trace_jax import config as config_lib
from trace_jax import metrics, records, stages, workdir
from trace_jax.errors import InputError
from trace_jax.stages import closing, context

_FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment file, see configs/.", flag_values=_FLAGS
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; default runs/<name of the config>.", flag_values=_FLAGS
)
_STAGES = flags.DEFINE_string(
    "stages", None, f"Only these, joined by commas: {', '.join(stages.NAMES)}.", flag_values=_FLAGS
)
_REDO = flags.DEFINE_bool(
    "redo",
    False,
    "Do stages again whose inputs changed, and what depends on them.",
    flag_values=_FLAGS,
)
flags.DEFINE_bool("help", False, "Show the flags.", short_name="h", flag_values=_FLAGS)


def main(argv: list[str]) -> int:
    """Runs the stages; returns the exit code: 0 done, 2 bad input or config (one line on stderr)."""
    try:
        _parse(argv)
        if _FLAGS.help:
            print(f"{__doc__}\n{_FLAGS.get_help()}")
            return 0
        realign(_CONFIG.value, _directory(), only=_STAGES.value, redo=_REDO.value)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def realign(
    config, directory: Path, *, only: str | None = None, redo: bool = False
) -> context.Context:
    """Validates, then runs the stages in `directory`; importable from a notebook."""
    config_lib.validate(config)
    selected = stages.chosen(only)
    run = context.Context(config, workdir.Workdir(directory))
    _describe(run)
    _compilation_cache()
    stages.run(run, selected, redo=redo)
    closing.show(run)
    return run


def _parse(argv: list[str]) -> None:
    try:
        rest = _FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(_one_line(error)) from error
    except (OSError, SyntaxError, ImportError) as error:
        raise InputError(f"the config file could not be read: {error}") from error
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}; flags start with --")
    if not _FLAGS.help and _CONFIG.value is None:
        raise InputError("--config=FILE is missing; try --config=configs/quickstart.py")


def _one_line(error: Exception) -> str:
    text = str(error.args[0]) if error.args else str(error)
    if isinstance(
        error, AttributeError | KeyError
    ):  # what ml_collections says of a key that is not there
        return (
            f"unknown config key: {' '.join(text.split())} (see trace_jax/config.py for every key)"
        )
    return " ".join(text.split())


def _directory() -> Path:
    name = config_flags.get_config_filename(_FLAGS["config"])
    return Path(_WORKDIR.value or Path("runs") / Path(name).stem.split(":")[0])


def _describe(run: context.Context) -> None:
    """Writes config.json, versions.json and policy.yaml beside the artefacts."""
    path = run.workdir.path
    try:
        path.mkdir(parents=True, exist_ok=True)
        records.write_json(path / "config.json", run.config.to_dict())
        records.write_json(path / "versions.json", versions())
        (path / "policy.yaml").write_text(run.new_policy.source)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); give another --workdir"
        ) from error


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    names = (
        "trace_jax",
        "jax",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "transformers",
        "numpy",
    )
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _compilation_cache() -> None:
    """Compiled programs outlive the process, so that a rerun starts at once; JAX's own variable wins."""
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "trace_jax" / "xla")
    )
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
