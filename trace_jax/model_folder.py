"""Where a model's files are: a folder, a bucket, the hub; and folders of PEFT adapters.

An adapter's folder holds changes of another model, which its adapter_config.json names. Imports no
jax.
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trace_jax import errors, remote, workdir

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def resolve(path: str | os.PathLike, revision: str | None = None) -> Path:
    """A folder as it is; gs://bucket/name or organisation/name as a local copy, fetched if need be.

    revision: a branch, tag or commit of a model of the hub; None: its main one.
    Raises InputError where the hub has no such model, or does not give it to this user.
    """
    name = os.fspath(path)
    if remote.is_remote(name):
        return remote.local(name)
    if not is_hub_name(name):
        return Path(name)
    return _downloaded(name, revision)


@functools.cache  # a process sees one state of it, and asks the hub once
def _downloaded(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    patterns = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]
    try:
        found = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
        return Path(found)
    except hub_errors.GatedRepoError as error:
        raise errors.InputError(
            f"{name} is gated: accept its licence on the hub, and set HF_TOKEN to a token of that "
            "account"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise errors.InputError(f"{name} has no revision {str(revision)[:99]!r}") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise errors.InputError(
            f"{name}: neither a folder here nor a model of the hub that this user can see"
        ) from error
    except hub_errors.HFValidationError as error:
        raise errors.InputError(
            f"{name}: neither a folder here nor a name that the hub could have"
        ) from error
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, OSError) as error:
        what = str(error).strip().splitlines()[0]
        raise errors.InputError(
            f"{name} could not be downloaded ({what}); try again, or give a local folder"
        ) from error


def is_hub_name(name: str) -> bool:
    """Whether it can only be organisation/name on the hub, as no such folder is here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def holds_model(folder: Path) -> bool:
    """Whether a model or an adapter seems to be there."""
    return (folder / CONFIG).is_file() or is_adapter(folder)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter, and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file()


def chain(folder: Path, find: Callable[[str, str | None], Path] = resolve) -> list[Path]:
    """The folder; of an adapter the folder of its model behind it, which may be one as well.

    find: how a name and a revision become a folder. Raises InputError where an adapter's model is
    not there.
    """
    found = [folder]
    while is_adapter(found[-1]):
        adapter = found[-1]
        name, revision = named(adapter)
        base = _model(name, revision, find)
        if base is None or base in found:
            raise errors.InputError(
                f"{adapter} is an adapter of the model {str(name)[:200]!r}, which is not there; "
                f"let base_model_name_or_path in its {ADAPTER_CONFIG} name the folder of that "
                "model, or its name on the hub"
            )
        found.append(base)
    return found


def named(adapter: Path) -> tuple[Any, str | None]:
    """(name, revision) of the model that an adapter is of, as its config has them."""
    config = read_json(adapter / ADAPTER_CONFIG)
    revision = config.get("revision")
    return config.get("base_model_name_or_path"), revision if isinstance(revision, str) else None


def _model(name: Any, revision: str | None, find: Callable[[str, str | None], Path]) -> Path | None:
    """The folder of the model that an adapter names, if there is one."""
    if not isinstance(name, str) or not name:
        return None
    with contextlib.suppress(OSError):  # a name too long for a file
        folder = find(name, revision)
        return folder if holds_model(folder) else None
    return None


def of_tokenizer(folder: Path) -> Path:
    """The folder with the tokenizer: an adapter may have its own, or else has its model's."""
    folders = chain(folder)
    own = (f for f in folders if any((f / name).is_file() for name in _TOKENIZERS))
    return next(own, folders[-1])


def content_hash(folder: Path) -> str:
    """`workdir.hash_path` of a model; of an adapter its own and its model's."""
    return "-".join(map(workdir.hash_path, chain(folder)))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; anything else is an InputError."""
    try:
        content = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise errors.InputError(
            f"{file} does not exist; give a Hugging Face model directory"
        ) from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, numbers without end
        raise errors.InputError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise errors.InputError(f"{file} is not a JSON object")
    return content
