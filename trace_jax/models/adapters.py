"""PEFT's LoRA adapters, read: every tensor of the model with the adapter's change added.

A change is scale * B A (arXiv 2106.09685), added in float32 to the part of a matrix that a process
reads, so an adapted model is loaded as any other. Writing is in `hf_export.py`, training in
`lora.py`.
"""

import contextlib
import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from trace_jax import errors, model_folder
from trace_jax.models import tensor_files

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_EMBEDDING = "model.embed_tokens.weight"
_FACTOR = re.compile(r"(.+)\.lora_(A|B)\.weight")
# Settings of PEFT's LoraConfig under which a change is not scale * B A of the stored factors.
_MEAN_MORE = (
    "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "layer_replication",
    "alora_invocation_tokens", "trainable_token_indices", "target_parameters", "arrow_config",
    "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
_TOO_LARGE = 1e6  # of alpha
_KEEP_THE_MODEL = (True, False, None, "gaussian", "eva", "orthogonal")  # of init_lora_weights


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A matrix [out, in] with its change; b is [out, rank], a [rank, in]."""

    of: "Tensor"
    a: tensor_files.Tensor
    b: tensor_files.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    @property
    def dtype(self) -> np.dtype:
        return self.of.dtype

    def read(self, *index: slice) -> np.ndarray:
        """The part that `index` selects, in float32."""
        rows, columns = (*index, slice(None))[:2]
        a, b = self.a.read(slice(None), columns), self.b.read(rows)
        found = self.of.read(*index).astype(np.float32)
        found += self.scale * (b.astype(np.float32) @ a.astype(np.float32))
        return found


Tensor = tensor_files.Tensor | Adapted


def apply(
    folder: pathlib.Path,
    model: Mapping[str, Tensor],
    files: contextlib.ExitStack,
    *,
    tied: bool,
) -> dict[str, Tensor]:
    """The tensors of `model` with the adapter of a folder, whose file closes with `files`.

    tied: the model's head is its embedding.
    Raises InputError where it is no LoRA adapter, does more than LoRA, or is of another model.
    """
    config, pairs, whole = _read(folder, files)
    if tied and _EMBEDDING in whole and not config.get("ensure_weight_tying"):
        raise errors.InputError(
            f"{folder} has an embedding of its own, and PEFT leaves the head that of the model "
            f"(tie_word_embeddings), so they are no longer one; {_MERGE}, with "
            "tie_word_embeddings false"
        )
    found = dict(model)
    for name, tensor in whole.items():
        if name not in model or tensor.shape != model[name].shape:
            raise errors.InputError(f"{folder}: {name[:99]} fits no tensor of the model; {_MERGE}")
        found[name] = tensor
    for module, pair in pairs.items():
        name = f"{module}.weight"
        if set(pair) != {"A", "B"} or name not in model or not _fits(model[name], **pair):
            raise errors.InputError(
                f"{folder}: the factors of {module[:99]} do not fit the model that the adapter "
                "names; is it another one, or a half-written adapter?"
            )
        scale = _scale(config, module, rank=pair["A"].shape[0])
        found[name] = Adapted(found[name], pair["A"], pair["B"], scale)
    return found


def contents(
    folder: pathlib.Path,
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, np.ndarray]]:
    """What an adapter holds, in float32: module -> (A [rank, in], scale * B [out, rank]); tensors.

    The tensors are those that stand whole in place of the model's (PEFT's modules_to_save).
    """
    with contextlib.ExitStack() as files:
        config, pairs, whole = _read(folder, files)
        factors = {}
        for module, pair in pairs.items():
            a, b = (pair[which].read(slice(None)).astype(np.float32) for which in "AB")
            factors[module] = (a, _scale(config, module, rank=len(a)) * b)
        return factors, {k: t.read(slice(None)).astype(np.float32) for k, t in whole.items()}


def _read(
    folder: pathlib.Path, files: contextlib.ExitStack
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(adapter_config.json, module -> its factors by "A" and "B", whole tensors)."""
    config = model_folder.read_json(folder / model_folder.ADAPTER_CONFIG)
    _check(folder, config)
    pairs: dict[str, dict[str, Tensor]] = {}
    whole = {}
    for key, tensor in tensor_files.opened(folder, [WEIGHTS], files).items():
        name = key.removeprefix(PREFIX)
        if factor := _FACTOR.fullmatch(name):
            pairs.setdefault(factor[1], {})[factor[2]] = tensor
        else:
            whole[name] = tensor
    return config, pairs, whole


_MERGE = "merge the adapter with PEFT (merge_and_unload) and give the merged model"


def _check(folder: pathlib.Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise errors.InputError(
            f"{folder}: adapters of type {str(kind)[:99]} are not read; {_MERGE}"
        )
    more = [key for key in _MEAN_MORE if config.get(key)]
    more += ["bias"] * (config.get("bias", "none") != "none")
    more += ["init_lora_weights"] * (config.get("init_lora_weights", True) not in _KEEP_THE_MODEL)
    if more:
        raise errors.InputError(
            f"{folder}: {more[0]}={str(config[more[0]])[:99]} changes more than LoRA does; {_MERGE}"
        )
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        patterns = {"alpha_pattern": str(patterns)}  # said below
    for key, value in {"lora_alpha": config.get("lora_alpha"), **patterns}.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not abs(value) < _TOO_LARGE:
            said = f"{key[:99]}={str(value)[:99]!r} in its {model_folder.ADAPTER_CONFIG}"
            raise errors.InputError(
                f"{folder}: {said} is not a number that a change can be scaled by; write the "
                "adapter again"
            )
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise errors.InputError(
                f"{folder}: alpha_pattern {pattern[:99]!r} is no regular expression ({error})"
            ) from error


def _fits(of: Tensor, A: Tensor, B: Tensor) -> bool:  # noqa: N803 (PEFT's names)
    two = len(of.shape) == len(A.shape) == len(B.shape) == 2
    return two and A.shape[0] == B.shape[1] > 0 and (B.shape[0], A.shape[1]) == of.shape


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) under rsLoRA; alpha_pattern by PEFT's matching."""
    patterns = config.get("alpha_pattern") or {}
    matching = (p for p in patterns if re.match(rf"(.*\.)?({p})$", module))
    alpha = patterns.get(next(matching, None), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
