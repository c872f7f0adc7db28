"""Cost as the data grows tenfold: seconds and memory of every stage.

python -m bench.growth [--quick] [--pairs 1500] [--times 10] [--out FILE]

The quickstart's run with --pairs records and with --times as many, every stage a process of its
own, the steps of training and the prompts of the evaluation the same number in both. A run of each
size goes before and fills the compilation cache, so neither compiles. Seconds are the stage's own
as its mark has them, without the start of the process.

Memory is the peak of the process above that of one that only imports what the stage imports and
takes the devices: of most stages nearly all is libraries, which would hide what grows. It is told
by Linux. Headlines are the largest over the stages: growth of seconds over that of the records,
growth of memory (1 is constant), bytes that each more record takes. In ratios less than 16 MiB or
0.2 s counts as that, or a stage that does next to nothing would decide.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import results
from trace_jax import stages, workdir

FEW_STEPS = (
    "--config.model.scratch.training.total_steps=60",
    "--config.align.total_steps=20",
    "--config.train.total_steps=20",
)
QUICK = ("--config.model.scratch.layers=1", "--config.model.scratch.documents=1000",
         "--config.data.validation_prompts=20", "--config.data.test_prompts=20")  # fmt: skip
LEAST, LEAST_SECONDS = 16.0, 0.2  # MiB above the imports; less is taken for as much in ratios
PEAK = "from bench import results; print(results.peak_mebibytes())"
RUN = f"""import sys
from trace_jax import launch
status = launch.main(sys.argv)
{PEAK}
sys.exit(status)
"""
IMPORTS = "import trace_jax.launch; from trace_jax.stages import {stage}; "
DEVICES = "import jax, trace_jax.fit, trace_jax.sampling, transformers; jax.devices(); "
ON_HOST = ("triage", "report")  # stages that start no device
LINE = (
    "{stage:9} {records:6} records: {seconds:7.1f} s, {mebibytes:6.0f} MiB, {own_mebibytes:6.0f} "
    "of them its own"
)


def peak(code: str, *arguments: str, **environment: str) -> float:
    """MiB of a process of its own, which prints them last."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{arguments or code} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def run(folder: Path, pairs: int, only: str, cache: Path, more: Sequence[str]) -> float:
    """MiB of a process that runs the stages `only` (all for "")."""
    return peak(
        RUN, "--config=configs/quickstart.py", f"--workdir={folder}", f"--stages={only}",
        f"--config.data.pairs={pairs}", *FEW_STEPS, *more, JAX_COMPILATION_CACHE_DIR=str(cache),
    )  # fmt: skip


def measure(few: int, times: int, more: Sequence[str]) -> list[dict]:
    """Rows of both sizes, the smaller one first."""
    imports = {
        name: peak(IMPORTS.format(stage=name) + DEVICES * (name not in ON_HOST) + PEAK)
        for name in stages.NAMES
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder, "cache")
        for pairs in (few, few * times):
            run(Path(folder, f"first{pairs}"), pairs, "", cache, more)
        for pairs in (few, few * times):
            where = Path(folder, str(pairs))
            for name in stages.NAMES:
                found = run(where, pairs, name, cache, more)
                rows.append(
                    {
                        "stage": name,
                        "records": pairs,
                        "seconds": workdir.Workdir(where).finished(name)["seconds"],
                        "mebibytes": found,
                        "own_mebibytes": max(0.0, found - imports[name]),
                    }
                )
                print(LINE.format(**rows[-1]), flush=True)
    return rows


def headline(rows: Sequence[dict]) -> dict[str, float]:
    """The largest over the stages."""
    half = len(rows) // 2
    pairs = list(zip(rows[:half], rows[half:], strict=True))
    times = pairs[0][1]["records"] / pairs[0][0]["records"]
    more = pairs[0][1]["records"] - pairs[0][0]["records"]
    own = [(a["own_mebibytes"], b["own_mebibytes"]) for a, b in pairs]
    return {
        "growth_of_seconds": max(b["seconds"] / max(a["seconds"], LEAST_SECONDS) for a, b in pairs)
        / times,
        "growth_of_memory": max(max(b, LEAST) / max(a, LEAST) for a, b in own),
        "bytes_per_record": max(b - a for a, b in own) * 2**20 / more,
    }


def main(argv: Sequence[str]) -> int:
    """Runs both, prints and writes."""
    values = results.flags(
        argv, "growth", __doc__, "60 records and ten times as many, one layer, 20 prompts",
        pairs={"type": int, "default": 1500}, times={"type": int, "default": 10},
    )  # fmt: skip
    few, more = (60, QUICK) if values.quick else (values.pairs, ())
    rows = measure(few, values.times, more)
    results.write(values.out, rows=rows, headline=headline(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
