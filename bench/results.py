"""What a benchmark writes, in one form, and where it goes.

{machine, versions, commit, rows, headline, ranges}: what it ran on, what was measured, one row a
measurement, ratios by name, and for those that were repeated the least and the largest. A full run
writes bench/results/<name>.json, of which README's table is made; --quick a file of its own under
build/, so that nothing that is kept changes.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_jax import launch, records

KEPT, QUICK = Path("bench/results"), Path("build/bench")


def machine(*packages: str) -> dict[str, Any]:
    """What the numbers were measured on; packages: those of others that were used, by name."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    versions = launch.versions() | {name: importlib.metadata.version(name) for name in packages}
    return {"machine": _machine(), "versions": versions, "commit": commit.stdout.strip()}


def _machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{platform.machine()}, {platform.system()}"
    return f"{_cpu()}, {cores} cores, {gib:.0f} GiB, {system}"


def _cpu() -> str:
    """The model's name, where the system tells it."""
    told = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", told.read_text() if told.exists() else "", re.M)
    return found[1].strip() if found else platform.processor() or "unknown CPU"


def flags(argv: Sequence[str], name: str, doc: str, quick: str, **more: dict) -> argparse.Namespace:
    """The flags of a benchmark: --quick (what it then does), --out, and its own.

    more: own flags by name (repeats for --repeats), each with add_argument's keywords.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    kept, of_quick = KEPT / f"{name}.json", QUICK / f"{name}.quick.json"
    where = f"default {kept}, with --quick {of_quick}"
    parser.add_argument("--out", type=Path, metavar="FILE", help=where)
    for flag, keywords in more.items():
        parser.add_argument(f"--{flag}", **keywords)
    values = parser.parse_args(argv)
    values.out = values.out or (of_quick if values.quick else kept)
    return values


def peak_mebibytes() -> float:
    """The most memory that this process has had; Linux alone.

    Not ru_maxrss, which begins with what the process had that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.M)[1]) / 1024


def write(
    out: Path,
    *,
    rows: Sequence[Mapping[str, Any]],
    headline: Mapping[str, float],
    spread: Mapping[str, Sequence[float]] | None = None,
    packages: Sequence[str] = (),
    **about: Any,
) -> None:
    """Writes and prints.

    Args:
      spread: of a headline's repeats; its least and largest are written under `ranges`.
      packages: as `machine` takes them.
      about: what all rows have in common.
    """
    ranges = {name: [min(of), max(of)] for name, of in (spread or {}).items() if name in headline}
    found = {**about, "rows": rows, "headline": headline, "ranges": ranges, **machine(*packages)}
    out.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(out, found)
    for name, value in headline.items():
        of = " [{:.3g}, {:.3g}]".format(*ranges[name]) if name in ranges else ""
        print(f"{name:32} {value:.3g}{of}")
    print(out)
