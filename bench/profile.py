"""Where the time and the memory go in what falls short of its target: train step, impact, start-up.

python -m bench.profile [--quick] [--parts train,impact,startup] [--before 2abdd23] [--out FILE]

Each part is a process of its own, for stories260k and for a 16M Llama with 32,768 entries, with the
devices that `real_pairs.cpu_devices` gives them.

train    8 pairs of HH a step as in `bench.trl`: seconds of what comes before the steps, of
         compiling, of a step and of making its batch; whether the device waits for the host; memory
         after each. --before: the same at another commit, in a worktree of its own
impact   the stage of `bench.impact` at 128 tokens: seconds on the host and on the device; positions
         and FLOPs a pair against the PyTorch loop's, and what the machine can do of them at most
startup  the quickstart until its first training step, with an empty compilation cache and with the
         one that this left: by looking at what the run's thread does

Shares of a program are from a jax.profiler trace: time in operations, each put down to the function
that asked for it (the stack in the compiled program's text), loops and calls without what is in
them. Operations side by side on several devices add up; `in_operations` is their sum over the time
that passed times the devices. `speedup_at_equal_gflops` is what the stage would gain over the
PyTorch loop if both made as many FLOPs a second: only what it does not compute.

Writes bench/results/profile.json and a table beside it (.md).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PARTS = ("train", "impact", "startup")
MODELS = ("stories260k", "16m")


def worker(part: str, model: Path, rows: Path, quick: bool) -> None:
    """What a process measures, as its last line."""

    def report(found: dict) -> None:
        print(json.dumps(found), flush=True)
        os._exit(0)  # a run that is looked at until its first step would go on

    if part == "startup":
        from bench import profile_startup

        profile_startup.startup(report)
        raise SystemExit("the run ended before its first step; try the quickstart by hand")
    from bench import profile_parts

    measure = {"train": profile_parts.training_run, "impact": profile_parts.impact_run}[part]
    report(measure(model, json.loads(rows.read_text()), 2 if quick else 6))


def run(part: str, root: Path, *, cache: Path, model: Path, rows: Path, quick: bool) -> dict:
    """A part in a process of its own, with the trace_jax that is in `root`."""
    from bench import real_pairs

    environment = {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    if part != "startup":
        environment["JAX_NUM_CPU_DEVICES"] = str(real_pairs.cpu_devices(model))
    command = [sys.executable, "-m", "bench.profile", "--worker", part, "--model", str(model)]
    command += ["--rows", str(rows)] + ["--quick"] * quick
    done = subprocess.run(
        command, cwd=root, stdout=subprocess.PIPE, text=True, check=True,
        env=os.environ | environment,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def worktree(commit: str, folder: Path) -> Path:
    """The repository at a commit, with the benchmarks of now."""
    root = folder / "before"
    subprocess.run(["git", "worktree", "add", "--detach", str(root), commit], check=True)
    shutil.copytree("bench", root / "bench", dirs_exist_ok=True)
    return root


def measure(values: argparse.Namespace, folder: Path) -> list[dict]:
    """A row a part and model, and for training another of the commit before."""
    import transformers

    from bench import impact, real_pairs

    found = []
    for name in MODELS if {"train", "impact"} & set(values.parts) else ():
        case = impact.CASES[MODELS.index(name)]
        model = impact.checkpoint(case, values.model.resolve(), folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        data = {
            "train": real_pairs.fitting(
                real_pairs.read("hh"), tokenizer, limit=512, n=8 * (3 if values.quick else 8)
            ),
            "impact": impact.pairs(case._replace(stage=32 if values.quick else 64), tokenizer),
        }
        for part in [part for part in ("train", "impact") if part in values.parts]:
            rows = folder / f"{part}-{name}.json"
            rows.write_text(json.dumps(data[part]))
            places = {"now": Path.cwd()}
            if part == "train" and values.before:
                places["before"] = folder / "before"
            for when, root in places.items():
                cache = folder / f"cache-{part}-{name}-{when}"
                made = run(part, root, cache=cache, model=model, rows=rows, quick=values.quick)
                found.append({"part": part, "model": name, "when": when, **made})
                print(markdown(found[-1:]), flush=True)
    if "startup" in values.parts:
        cache = folder / "cache-startup"
        for when in ("cold", "warm"):
            made = run(
                "startup", Path.cwd(), cache=cache, model=values.model, rows=folder, quick=False
            )
            found.append({"part": "startup", "model": "quickstart", "when": when, **made})
            print(markdown(found[-1:]), flush=True)
    return found


def markdown(rows: Sequence[dict]) -> str:
    """A table a row: seconds by phase, shares of the program, memory, and figures."""
    lines = []
    for row in rows:
        lines += [f"## {row['part']}, {row['model']}, {row['when']}", ""]
        lines += ["| what | seconds | GiB after it |", "|---|---|---|"]
        for what, seconds in row["seconds"].items():
            after = row.get("gib_after", {}).get(what)
            lines.append(f"| {what} | {seconds:.3g} | {'' if after is None else f'{after:.2f}'} |")
        if "shares" in row:
            lines += ["", "| of the program | share |", "|---|---|"]
            ordered = sorted(row["shares"].items(), key=lambda item: -item[1])
            lines += [f"| {what} | {100 * share:.0f} % |" for what, share in ordered]
        if "figures" in row:
            lines += ["", "| figure | |", "|---|---|"]
            lines += [f"| {name} | {value:.3g} |" for name, value in row["figures"].items()]
        lines.append("")
    return "\n".join(lines)


def headline(rows: Sequence[dict]) -> dict[str, float]:
    """What stands in the way, named: the largest share of each program, and the bounds."""
    found = {}
    for row in rows:
        name = f"{row['part']}_{row['model']}_{row['when']}"
        if row["part"] == "startup":
            total = sum(row["seconds"].values())
            found |= {f"{name}_{what}": s / total for what, s in row["seconds"].items()}
        else:
            found |= {f"{name}_{k}": v for k, v in row["figures"].items()}
            found |= {f"{name}_share_{what}": share for what, share in row["shares"].items()}
    return {name.replace(" ", "_").replace(",", ""): value for name, value in found.items()}


def main(argv: Sequence[str]) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("../shared/models/stories260k"))
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--before", help="a commit, to profile its train step as well")
    parser.add_argument("--quick", action="store_true", help="fewer pairs and steps")
    parser.add_argument("--out", type=Path, default=Path("bench/results/profile.json"))
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    values = parser.parse_args(argv)
    if values.worker:
        worker(values.worker, values.model, values.rows, values.quick)
        return 0
    from bench import results
    from trace_jax import records

    with tempfile.TemporaryDirectory() as folder:
        if values.before:
            worktree(values.before, Path(folder))
        try:
            rows = measure(values, Path(folder))
        finally:
            if values.before:
                remove = ["git", "worktree", "remove", "--force", str(Path(folder, "before"))]
                subprocess.run(remove, check=True)
    values.out.parent.mkdir(parents=True, exist_ok=True)
    found = {"headline": headline(rows), "rows": rows, "before": values.before}
    records.write_json(values.out, found | results.machine())
    values.out.with_suffix(".md").write_text("# Where the time goes\n\n" + markdown(rows))
    print(values.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
