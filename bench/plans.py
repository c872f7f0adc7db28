"""What fits where: `--plan` of every backbone on TPU slices and one GPU, by the real compilers.

python -m bench.plans [--only gemma9b] [--out FILE]

Writes docs/results/plans.json, of which `bench.pages` makes a table. Needs libtpu (pip install
'trace_jax[tpu]'), and no TPU. Each plan is a process of its own, as a user would start it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from bench import results
from trace_jax import records

FULL = ("v5e:4x4", "v5p:2x2x1", "v5e:16x16", "v5p:4x4x4")
LORA = ("v5e:2x4", "h100:1")
BACKBONES = ("gemma9b", "llama8b", "qwen7b")
PLANS = [
    *((name, "full", topology) for topology in FULL for name in BACKBONES),
    *((name, "lora", topology) for topology in LORA for name in BACKBONES),
    ("gemma2b", "lora", "v5e:2x2"),
]
GIB = 2**30
RESULTS = Path("docs/results/plans.json")


def plan(name: str, variant: str, topology: str) -> dict:
    """The JSON of one `--plan`."""
    command = [
        sys.executable, "-m", "trace_jax.launch", f"--config=configs/{name}.py:{variant}",
        "--plan", "--json", f"--topology={topology}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def row(key: str, found: dict) -> str:
    """A line of the table."""
    programs = found["programs"]
    peaks = " | ".join(
        f"{programs[name]['peak_bytes'] / GIB:.2f}" if name in programs else "-"
        for name in ("train", "impact", "prefill", "sample")  # plans of before have no prefill
    )
    limit = found["device_memory_bytes"] / GIB
    tokens = found["tokens"]["per_step"] // 1024
    verdict = "yes" if found["fits"] else "no"
    seconds = programs["train"]["compile_seconds"]
    return f"| {key} | {tokens} x 1024 | {peaks} | {limit:.2f} | {verdict} | {seconds:.0f} |"


def table() -> str:
    """Markdown of the committed plans."""
    plans = records.read_json(RESULTS)["plans"]
    lines = [
        "| | tokens a step | train | impact | prefill | sample | limit | fits "
        "| train compiled in s |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row(key, plans[key]) for key in map(_key, PLANS) if key in plans),
    ]
    return "\n".join(lines)


def _key(of: tuple[str, str, str]) -> str:
    name, variant, topology = of
    return f"{name}:{variant} on {topology}"


def main(argv: list[str]) -> int:
    """Goes on where an earlier run stopped; --only makes the plans anew whose name contains it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="")
    parser.add_argument("--out", default=str(RESULTS))
    args = parser.parse_args(argv[1:])
    out = Path(args.out)
    plans = records.read_json(out)["plans"] if out.exists() else {}
    for which in PLANS:
        key = _key(which)
        if args.only not in key:
            continue
        if key not in plans or args.only:
            plans[key] = plan(*which) | {"commit": results.machine()["commit"]}
            records.write_json(out, {"plans": plans, **results.machine()})
        print(row(key, plans[key]), flush=True)
    return 0 if all(found["fits"] for found in plans.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
