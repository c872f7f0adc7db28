"""What `trace_jax.launch` would refuse in a config, before a slice or nodes are used for it.

python launch/check_config.py --config=FILE [--config.key=value]

For tpu_pod.sh and slurm.sbatch. Imports no jax, and looks at no path: those of a slice are not
here. Exit code 0, or 2 with a line.
"""

import sys

from trace_jax import config as config_lib
from trace_jax import launch, validation
from trace_jax.errors import InputError


def check(argv: list[str]) -> None:
    """Raises InputError where the config is wrong, or lacks the data or the policies of a run."""
    values = launch.define_flags(argv)
    launch.parse_flags(values, argv)
    config = config_lib.resolved(values.config)
    validation.validate(config, planning=True)
    if config.data.source not in validation.FROM_FILE:
        return
    if not config.data.path:
        raise InputError("data.path is empty: give --config.data.path=FILE, on gs:// for a slice")
    given, default = config.policy.to_dict(), config_lib.base_config().policy.to_dict()
    for key in ("old", "new"):
        named = any(argument.startswith(f"--config.policy.{key}=") for argument in argv)
        if given[key] == default[key] and not named:
            raise InputError(
                f"policy.{key} is {given[key]}, which is SynthValueBench's: give "
                f"--config.policy.{key}=FILE, on gs:// for a slice (or that name, if you mean it)"
            )


def main(argv: list[str]) -> int:
    """Exit code 0 taken, 2 refused."""
    try:
        check(argv)
    except InputError as error:
        print(f"error: {error}".replace("\n", " "))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
