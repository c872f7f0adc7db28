"""Cost as the data grows tenfold: seconds and peak memory of every stage.

python -m bench.growth [--quick] [--pairs 1500] [--times 10] [--out FILE]

The quickstart's run with --pairs records and with --times as many, every stage a process of its
own, the steps of training the same number in both. Seconds are the stage's own as its mark has
them, so without the start of the process; compilation is in them, and it is the same in both: what
grows with the records is the difference. Peak memory is the process's, told by the kernel.
Headlines: the largest growth of a stage's seconds over that of the records, and the growth of the
run's peak.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import frontier
from trace_jax import records, workdir

STAGES = ("prepare", "align", "triage", "baseline", "correct", "impact", "train")
FEW_STEPS = (
    "--config.model.scratch.training.total_steps=60",
    "--config.align.total_steps=20",
    "--config.train.total_steps=20",
)
LINE = "{stage:8} {records:6} records: {seconds:7.1f} s, {peak_gib:5.2f} GiB at most"


def stage(name: str, pairs: int, folder: Path) -> dict:
    """One stage in a process of its own."""
    process = subprocess.Popen(
        [
            sys.executable, "-m", "trace_jax.launch", "--config=configs/quickstart.py",
            f"--workdir={folder}", f"--stages={name}", f"--config.data.pairs={pairs}", *FEW_STEPS,
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    told = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"stage {name} failed:\n{told[-2000:]}")
    mark = workdir.Workdir(folder).finished(name)
    return {
        "stage": name,
        "records": pairs,
        "seconds": mark["seconds"],
        "peak_gib": usage.ru_maxrss / 2**20,
    }


def main(argv: Sequence[str]) -> int:
    """Runs both, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="300 records and ten times as many")
    parser.add_argument("--pairs", type=int, default=1500)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("bench/results/growth.json"))
    values = parser.parse_args(argv)
    few = 300 if values.quick else values.pairs
    rows = []
    for pairs in (few, few * values.times):
        with tempfile.TemporaryDirectory() as folder:
            for name in STAGES:
                rows.append(stage(name, pairs, Path(folder) / "run"))
                print(LINE.format(**rows[-1]), flush=True)
    small, large = rows[: len(STAGES)], rows[len(STAGES) :]
    headline = {
        "growth_of_seconds": max(
            b["seconds"] / a["seconds"] for a, b in zip(small, large, strict=True)
        )
        / values.times,
        "growth_of_peak_memory": max(b["peak_gib"] for b in large)
        / max(a["peak_gib"] for a in small),
    }
    values.out.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(values.out, {"headline": headline, "rows": rows, **frontier.machine()})
    print(f"{values.out}: {headline}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
