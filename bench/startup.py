"""How long until something happens: import, --help, --plan, the first training step.

python -m bench.startup [--quick] [--repeats 5] [--out FILE]

`import` is the package and its entry point without jax; `first step` is `launch` on a new workdir,
from the start of the process until the metrics of the first training step are on disk, with an
empty persistent compilation cache (cold) and with the one that a run before left (warm). Every
figure is of a new process; cold and warm alternate.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import frontier
from trace_jax import records

PYTHON = [sys.executable]
LAUNCH = [*PYTHON, "-m", "trace_jax.launch", "--config=configs/quickstart.py"]
COMMANDS = {
    "nothing": [*PYTHON, "-c", "pass"],
    "import": [*PYTHON, "-c", "import sys, trace_jax.launch; assert 'jax' not in sys.modules"],
    "help": [*LAUNCH, "--help"],
    "plan": [*LAUNCH, "--plan"],
}
FIRST = "base_checkpoints/metrics.jsonl"


def seconds(command: Sequence[str], **environment: str) -> float:
    """Of a command from start to end."""
    start = time.perf_counter()
    subprocess.run(
        command, env=os.environ | environment, check=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
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


def measure(repeats: int) -> dict:
    """Medians and ranges, and the headline."""
    found: dict[str, list[float]] = {name: [] for name in (*COMMANDS, "cold", "warm")}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder, "cache")
        for name in ("help", "plan"):
            seconds(COMMANDS[name])  # byte code, and what --plan compiles
        for _ in range(repeats):
            for name, command in COMMANDS.items():
                found[name].append(seconds(command))
            shutil.rmtree(cache, ignore_errors=True)
            found["cold"].append(to_first_step(cache))
            found["warm"].append(to_first_step(cache))
    median = {name: statistics.median(values) for name, values in found.items()}
    ratios = [w / c for w, c in zip(found["warm"], found["cold"], strict=True)]
    return {
        "repeats": repeats,
        "rows": [
            {"what": name, "seconds": median[name], "range": [min(values), max(values)]}
            for name, values in found.items()
        ],
        "headline": {
            "import_seconds": median["import"] - median["nothing"],
            "help_seconds": median["help"],
            "warm_over_cold": statistics.median(ratios),
        },
        **frontier.machine(),
    }


def main(argv: Sequence[str]) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench/results/startup.json"))
    values = parser.parse_args(argv)
    result = measure(1 if values.quick else values.repeats)
    for row in result["rows"]:
        low, high = row["range"]
        print(f"{row['what']:8} {row['seconds']:6.2f} s [{low:.2f}, {high:.2f}]")
    values.out.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(values.out, result)
    print(f"{values.out}: {result['headline']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
