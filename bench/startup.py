"""How long until something happens: import, --help, --plan, the first training step.

python -m bench.startup [--quick] [--repeats 5] [--out FILE]

Every figure is the whole of a new process, nothing taken off; `nothing` is Python alone. `import`
is `import trace_jax`, `import launch` is `import trace_jax.launch` (the entry point), both without
jax. `first step` is `launch` on a new workdir, from the start of the process until the metrics of
the first training step are on disk, with an empty persistent compilation cache (cold) and with the
one that a run before left (warm); cold and warm alternate.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import results

PYTHON = [sys.executable]
LAUNCH = [*PYTHON, "-m", "trace_jax.launch", "--config=configs/quickstart.py"]
WITHOUT_JAX = "import sys, {}; assert 'jax' not in sys.modules"
COMMANDS = {
    "nothing": [*PYTHON, "-c", "pass"],
    "import": [*PYTHON, "-c", WITHOUT_JAX.format("trace_jax")],
    "import launch": [*PYTHON, "-c", WITHOUT_JAX.format("trace_jax.launch")],
    "help": [*LAUNCH, "--help"],
    "plan": [*LAUNCH, "--plan"],
}
HEADLINES = {"import": "import_seconds", "import launch": "import_launch_seconds",
             "help": "help_seconds"}  # fmt: skip
FIRST = "base_checkpoints/metrics.jsonl"


def seconds(command: Sequence[str]) -> float:
    """Of a command from start to end."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def to_first_step(cache: Path) -> float:
    """Of a run until its first step is told; the run is stopped then."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen(
            [*LAUNCH, f"--workdir={folder}/run", "--stages=prepare"],
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        told = Path(folder, "run", FIRST)
        while not (told.exists() and told.stat().st_size):
            if process.poll() is not None:
                raise SystemExit("the run ended before its first step; try the command by hand")
            time.sleep(0.005)
        found = time.perf_counter() - start
        process.kill()
        process.wait()
        return found


def measure(repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat."""
    found: dict[str, list[float]] = {name: [] for name in (*COMMANDS, "cold", "warm")}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder, "cache")
        for name in ("help", "plan"):
            seconds(COMMANDS[name])  # byte code, and what --plan compiles
        for repeat in range(repeats):
            for name in list(COMMANDS)[:: -1 if repeat % 2 else 1]:
                found[name].append(seconds(COMMANDS[name]))
            shutil.rmtree(cache, ignore_errors=True)
            found["cold"].append(to_first_step(cache))
            found["warm"].append(to_first_step(cache))
    return found


def main(argv: Sequence[str]) -> int:
    """Measures, prints and writes."""
    values = results.flags(
        argv, "startup", __doc__, "two repeats", repeats={"type": int, "default": 5}
    )
    found = measure(2 if values.quick else values.repeats)
    rows = [
        {"what": name, "seconds": statistics.median(of), "range": [min(of), max(of)]}
        for name, of in found.items()
    ]
    for row in rows:
        low, high = row["range"]
        print(f"{row['what']:13} {row['seconds']:6.2f} s [{low:.2f}, {high:.2f}]")
    spread = {headline: found[name] for name, headline in HEADLINES.items()}
    spread["warm_over_cold"] = [w / c for w, c in zip(found["warm"], found["cold"], strict=True)]
    results.write(
        values.out,
        rows=rows,
        headline={name: statistics.median(of) for name, of in spread.items()},
        spread=spread,
        repeats=len(found["cold"]),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
