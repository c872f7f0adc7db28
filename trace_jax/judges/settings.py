"""Keys of judge.* and asking.* as flags of commands that have no config file."""

from collections.abc import Sequence

import ml_collections
import yaml

from trace_jax import config
from trace_jax.errors import InputError


def of(given: Sequence[str]) -> ml_collections.ConfigDict:
    """The default config with the keys of "KEY=VALUE" texts set; only judge.* and asking.*."""
    found = config.base_config()
    for text in given:
        key, equals, value = text.partition("=")
        section = key.partition(".")[0]
        if not equals or section not in ("judge", "asking"):
            raise InputError(f"--set {text!r}: give judge.KEY=VALUE or asking.KEY=VALUE")
        try:
            before = found
            for part in key.split("."):
                before = before[part]
            after = value if isinstance(before, str) else yaml.safe_load(value)
            if isinstance(before, float) and isinstance(after, int):
                after = float(after)
            if isinstance(before, tuple):
                after = tuple(after if isinstance(after, list) else value.split(","))
            found.update_from_flattened_dict({key: after})
        except (KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise InputError(f"--set {text!r}: no such key, or not a value for it") from error
    return found
