"""What accelerators offer: memory that a program can have, and peak speed. Imports no jax."""

import dataclasses
import os

from trace_jax.errors import InputError

GIB = 2**30
# What a GPU's programs can have is decided once, when jax starts: by the first two of these, the
# second its old name, else by jax. The third says whether it is taken at once or as it is needed.
SHARE_VARIABLES = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
)
GPU_SHARE = 0.92  # as `launch.set_environment` sets it; the rest is for NCCL and kernels' libraries
_JAX_SHARE = 0.75  # where no variable says


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      memory: bytes that a program can have (vendors' figures less what the runtime keeps).
      flops: peak multiply-adds of bfloat16 a second, times two; None where it is not known.
      share: of a GPU's memory that `memory` is, where jax is told to take no more of it.
    """

    name: str
    memory: int
    flops: float | None
    share: float | None = None


# Sources: the vendors' data sheets (dense bfloat16); for TPUs the memory that XLA reports.
CHIPS = {
    "v4": Chip("v4", int(30.75 * GIB), 275e12),
    "v5e": Chip("v5e", int(15.75 * GIB), 197e12),
    "v5p": Chip("v5p", int(95.0 * GIB), 459e12),
    "v6e": Chip("v6e", int(31.25 * GIB), 918e12),
    "a100-40gb": Chip("a100-40gb", int(39.0 * GIB), 312e12),
    "a100-80gb": Chip("a100-80gb", int(79.0 * GIB), 312e12),
    "h100": Chip("h100", int(79.0 * GIB), 989e12),
    "h200": Chip("h200", int(139.0 * GIB), 989e12),
    "a6000": Chip("a6000", int(47.0 * GIB), 155e12),
    "l4": Chip("l4", int(22.0 * GIB), 121e12),
}
TPUS = ("v4", "v5e", "v5p", "v6e")
_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
          "TPU v6 lite": "v6e", "TPU v6e": "v6e"}  # fmt: skip


def of_topology(topology: str) -> tuple[Chip, bool]:
    """(chip, is a TPU slice) of "v5e:4x4" or "h100:1"; of a GPU, the share that jax takes."""
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not shape:
        raise InputError(
            f"--topology={topology!r} is unknown; give a TPU slice such as v5e:4x4, or "
            f"a single GPU such as h100:1 (chips: {', '.join(CHIPS)})"
        )
    if name not in TPUS and shape != "1":
        raise InputError(
            f"--topology={topology!r}: one GPU can be planned for from afar ({name}:1); for more, "
            "run --plan on the machine"
        )
    chip = CHIPS[name]
    if name in TPUS:
        return chip, True
    share = gpu_share()
    return dataclasses.replace(chip, memory=int(share * chip.memory), share=share), False


def gpu_share() -> float:
    """Of a GPU's memory that jax gives to programs under the environment as it is."""
    given = next((os.environ[name] for name in SHARE_VARIABLES[:2] if os.environ.get(name)), None)
    try:
        return _JAX_SHARE if given is None else float(given)
    except ValueError as error:
        raise InputError(
            f"{SHARE_VARIABLES[0]}={given!r} is no share of a GPU's memory; 0.9 is one"
        ) from error


def of_device(device) -> Chip:
    """The chip of an attached jax device, memory as the runtime says it."""
    kind = device.device_kind
    known = CHIPS.get(_KINDS.get(kind, "")) or next(
        (chip for name, chip in CHIPS.items() if name.split("-")[0] in kind.lower()), None
    )
    stats = device.memory_stats() or {}
    memory = stats.get("bytes_limit") or (
        known.memory if known else _host_memory() // device.client.local_device_count()
    )
    return Chip(kind, int(memory), known.flops if known else None)


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
