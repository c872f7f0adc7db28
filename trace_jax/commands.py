"""How the programs beside `launch` run a command and end: 2 for what is the user's, 75: again."""

import argparse
import sys
from collections.abc import Callable, Sequence

from trace_jax import errors
from trace_jax.errors import InputError


def run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Parses `argv`, calls `run(arguments)` of its command, and returns the exit code."""
    try:
        arguments = parser.parse_args(argv)
        arguments.run(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return errors.exit_code(error)
    except SystemExit as stop:  # argparse: --help, or a wrong argument
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("stopped; what was paid for is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:  # head, less
        sys.stderr.close()
    except Exception as error:
        told = errors.of_the_machine(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return errors.exit_code(error)
    return 0


def at_least(least: int) -> Callable[[str], int]:
    """A `type` of argparse: whole numbers from `least` on."""

    def number(text: str) -> int:
        found = int(text)
        if found < least:
            raise argparse.ArgumentTypeError(f"{found} must be at least {least}")
        return found

    return number
