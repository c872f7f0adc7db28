"""Impact scores against what a user has today: one backward pass a record in PyTorch.

python -m bench.impact [--quick] [--out FILE.json]

Texts cut to a length: of PKU-SafeRLHF for 128 tokens, all pairs of a prompt together as in the
data; of HH for more, those pairs with a text of more than half of that. Full parameters or LoRA
(rank 16). Every path is a process of its own, which says its peak memory; all of a case are alive
together and one works at a time, in rounds, every other one in the opposite order.

torch_loop       the paper's procedure: transformers' model, a record's loss, backward, dotted
vmap_grad@N      gradients of N examples at once (1: `lax.map(grad)`, one after the other), dotted
vmap_grad_remat  the same with layers recomputed in the backward pass
jvp@N            N examples at once in forward mode, one a row
jvp_quarters@N   the same a quarter of them at a time, as the stage has it
stage            as stage impact does it: texts in, rows packed, every response once, scores out
stage_each       the same with every response of every record
stage_cores      the stage with every core a device, where it has one device

g_J is timed apart, in PyTorch a backward pass a gold pair, ours as the stage does it. The stage
also scores 512 records again along half of the gold batch. `speedup_vs_torch_loop` is of scores
alone; `_whole` is of a run of 10,000 records with a gold batch of 300 and that second pass.

Both sides have all cores. JAX has a device a core for a small model and one device else
(`real_pairs.cpu_devices`); rows say which. Temporary memory is what the compiler says, so it does
not depend on load; a path that needs more than 4 GiB of it is not run. Peak memory is the
process's; `before_gib` of it are imports (the PyTorch process has JAX too, to make the same
tokens). Errors are against the first
path of a case, which has its own g_J where it is PyTorch's, over the rms of its scores.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import real_pairs, results
from trace_jax import records

MOST_TEMPORARIES = 4 * 2**30
RUN = {"records": 10_000, "gold": 300, "again": 512}  # of a run; the config's defaults
HEADLINE = ("torch_loop", "vmap_grad@8", "jvp@8", "stage", "stage_each")
ALL = ("torch_loop", "vmap_grad@1", "vmap_grad@8", "vmap_grad_remat@8", "jvp@8", "jvp_quarters@8",
       "stage", "stage_each")  # fmt: skip
GROWTH = tuple(f"{path}@{n}" for path in ("vmap_grad", "jvp") for n in (4, 16)) + ("jvp@1",)
SHORT = ("torch_loop", "vmap_grad@8", "jvp@8", "stage")
LINE = "{path:<18} {speed:>9} pairs/s {temp:>8} MiB, {peak_gib:5.2f} GiB  error {error:.1e}"


class Case(NamedTuple):
    """What is scored.

    slow: pairs of paths that take long, also the gold batch's. stage: pairs of the stage.
    """

    model: str
    vocabulary: int
    length: int
    adapters: str = "none"
    slow: int = 8
    stage: int = 32
    paths: tuple[str, ...] = SHORT


CASES = [
    Case("stories260k", 512, 128, slow=32, stage=256, paths=ALL + GROWTH),
    Case("16m", 32_768, 128, stage=64, paths=(*ALL, *GROWTH, "stage_cores")),
    Case("stories260k", 512, 256, paths=ALL),
    Case("stories260k", 512, 512, paths=ALL),
    Case("stories260k", 512, 1024),
    Case("16m", 32_768, 256),
    Case("16m", 32_768, 512, slow=4, stage=16),
    Case("16m", 32_768, 1024, slow=4, stage=8),
    Case("16m", 131_072, 128),
    Case("stories260k", 512, 128, "lora", slow=32, stage=256, paths=ALL),
    Case("stories260k", 512, 1024, "lora"),
    Case("16m", 32_768, 128, "lora"),
    Case("16m", 32_768, 512, "lora", slow=4, stage=16),
    Case("16m", 131_072, 128, "lora"),
]
QUICK = [
    CASES[0]._replace(slow=16, stage=128, paths=HEADLINE),
    CASES[1]._replace(stage=32, paths=HEADLINE),
]


def pairs(case: Case, tokenizer: Any) -> list[dict[str, str]]:
    """As many as the stage scores."""
    if case.length <= 128:
        found = real_pairs.read("pku")
        prompts = {text: i for i, text in enumerate(dict.fromkeys(p["prompt"] for p in found))}
        return sorted(found, key=lambda pair: prompts[pair["prompt"]])[: case.stage]
    found = []
    for pair in real_pairs.read("hh"):
        texts = tokenizer([pair["prompt"] + pair[k] for k in ("chosen", "rejected")]).input_ids
        if max(map(len, texts)) > case.length // 2:
            found.append(pair)
        if len(found) == case.stage:
            return found
    raise SystemExit(f"{len(found)} pairs of HH have so many tokens, not {case.stage}")


def devices(path: str, model: Path) -> int:
    """Of a path: one example a row is computed on one device, with all cores."""
    if path == "stage_cores":
        return min(4, len(os.sched_getaffinity(0)))
    return real_pairs.cpu_devices(model) if path.startswith("stage") else 1


def worker(path: str, file: Path) -> None:
    """Answers commands, one a line of stdin, with lines of JSON on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    from bench import impact_ours

    problem = impact_ours.Problem(**records.read_json(file))
    if path == "torch_loop":
        from bench import impact_torch

        before = _peak_gib()
        made = impact_torch.way(problem)
    else:
        import jax

        from trace_jax import sharding

        before = _peak_gib()
        jax.set_mesh(sharding.make_mesh(1, -1, 1))
        made = impact_ours.way(path.replace("stage_cores", "stage"), problem)
    scores = np.zeros(0)
    answer: dict[str, Any] = {"temp_bytes": made.temp_bytes, "before_gib": before}
    while True:
        print(json.dumps(answer), file=answers, flush=True)
        command = sys.stdin.readline().strip()
        start = time.perf_counter()
        if command == "score":
            scores = made.score()
        elif command == "gold":
            made.gold()
        else:
            break
        answer = {"seconds": time.perf_counter() - start, "pairs": len(scores)}
    print(json.dumps({"scores": scores.tolist(), "peak_gib": _peak_gib()}), file=answers)


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Worker:
    """A process that has a path ready, what it told of it, and the seconds that it took."""

    def __init__(self, path: str, model: Path, problem: Path):
        self.path, self.devices = path, devices(path, model)
        self.seconds: dict[str, list[float]] = {"score": [], "gold": []}
        self.pairs = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.impact", "--worker", path, "--problem", str(problem)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(self.devices)},
        )  # fmt: skip

    def begin(self) -> None:
        """Waits until it is ready."""
        self.told = self._answer()
        self.runs = (self.told["temp_bytes"] or 0) <= MOST_TEMPORARIES

    def work(self, command: str, *, timed: bool) -> None:
        """Does it once; the first round warms up."""
        answer = self._ask(command)
        self.pairs = answer["pairs"]
        if timed:
            self.seconds[command].append(answer["seconds"])

    def end(self) -> None:
        """Takes its scores and lets it go."""
        self.told |= self._ask("end")
        self._process.wait()

    def _ask(self, command: str) -> dict:
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.path} failed; its error is above")
        return json.loads(line)


def measure(case: Case, model: Path, folder: Path, repeats: int) -> list[dict]:
    """A row a path."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    problem = folder / "problem.json"
    about = {"folder": str(model), "length": case.length, "adapters": case.adapters}
    found = pairs(case, tokenizer)
    records.write_json(problem, about | {"pairs": found, "slow": case.slow})
    workers = [Worker(path, model, problem) for path in case.paths]
    for one in workers:
        one.begin()
    for i in range(repeats + 1):
        for one in workers[:: -1 if i % 2 else 1]:
            if one.runs:
                one.work("score", timed=i > 0)
            if one.path in ("torch_loop", "stage"):
                one.work("gold", timed=i > 0)
    for one in workers:
        one.end()
    return [row(case, one, workers[0]) for one in workers]


def row(case: Case, one: Worker, first: Worker) -> dict:
    """Figures of a path."""
    truth, scores = np.array(first.told["scores"]), np.array(one.told["scores"])
    both = min(len(truth), len(scores))
    error = np.abs(scores[:both] - truth[:both]).max(initial=0.0)
    seconds, gold = (
        real_pairs.spread(one.seconds[key]) if one.seconds[key] else None for key in one.seconds
    )
    return {
        **{k: v for k, v in case._asdict().items() if k not in ("paths", "slow", "stage")},
        "path": one.path,
        "devices": one.devices,
        "pairs": one.pairs,
        "seconds": seconds,
        "pairs_per_second": one.pairs / seconds[1] if seconds else None,
        "gold_pairs": case.slow if gold else None,
        "gold_seconds": gold,
        "temp_bytes": one.told["temp_bytes"],
        "peak_gib": one.told["peak_gib"],
        "before_gib": one.told["before_gib"],
        "max_error_over_rms": float(error / np.sqrt(np.mean(np.square(truth)))) if both else None,
    }


def headline(rows: Sequence[dict]) -> dict[str, float]:
    """Named ratios of 128 tokens and full parameters: of the small model, and of the larger one."""
    found = {}
    full = [r for r in rows if r["length"] == 128 and r["adapters"] == "none"]
    for vocabulary, end in ((512, ""), (32_768, "_16m")):
        of = {r["path"]: r for r in full if r["vocabulary"] == vocabulary}
        loop, stage, each = (of[path] for path in ("torch_loop", "stage", "stage_each"))
        found |= {
            f"speedup_vs_torch_loop{end}": _speedup(stage, loop),
            f"speedup_vs_torch_loop_each{end}": _speedup(each, loop),
            f"speedup_vs_torch_loop_whole{end}": run_seconds(loop, again=0)
            / run_seconds(stage, again=RUN["again"]),
            f"speedup_of_gold{end}": loop["gold_seconds"][1] / stage["gold_seconds"][1],
            f"speedup_vs_vmap_grad{end}": _speedup(of["jvp@8"], of["vmap_grad@8"]),
            f"temp_vs_vmap_grad{end}": of["jvp@8"]["temp_bytes"] / of["vmap_grad@8"]["temp_bytes"],
        }
        if "jvp_quarters@8" in of:
            few = of["jvp_quarters@8"]["temp_bytes"]
            found |= {
                f"temp_vs_vmap_grad_quarters{end}": few / of["vmap_grad@8"]["temp_bytes"],
                f"temp_vs_vmap_grad_remat{end}": few / of["vmap_grad_remat@8"]["temp_bytes"],
                f"speedup_vs_lax_map_grad{end}": _speedup(stage, of["vmap_grad@1"]),
            }
    errors = [r["max_error_over_rms"] for r in rows if r["max_error_over_rms"] is not None]
    return found | {"max_relative_error": max(errors)}


def _speedup(one: dict, other: dict) -> float:
    return one["pairs_per_second"] / other["pairs_per_second"]


def run_seconds(of: dict, *, again: int) -> float:
    """Of g_J and the scores of a whole run at a path's speeds; again: records scored twice."""
    gold = RUN["gold"] * of["gold_seconds"][1] / of["gold_pairs"]
    return gold + (RUN["records"] + again) / of["pairs_per_second"]


def checkpoint(case: Case, stories: Path, folder: Path) -> Path:
    """The case's model, written once for all cases that have it."""
    if case.model == "stories260k":
        return stories
    model = folder / f"{case.model}-{case.vocabulary}"
    if not model.exists():
        texts = [text for pair in real_pairs.read("pku") for text in pair.values()]
        real_pairs.write_llama(
            model, texts, shape=case.model, context=2048, vocabulary=case.vocabulary
        )
    return model


def main(argv: Sequence[str]) -> int:
    """Prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("../shared/models/stories260k"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/impact.json"))
    parser.add_argument("--quick", action="store_true", help="the headline's cases, one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--problem", type=Path, help=argparse.SUPPRESS)
    values = parser.parse_args(argv)
    if values.worker:
        worker(values.worker, values.problem)
        return 0
    rows, repeats = [], 1 if values.quick else values.repeats
    with tempfile.TemporaryDirectory() as folder:
        for case in QUICK if values.quick else CASES:
            print(f"{case.model}, {case.vocabulary} entries, {case.length} tokens, {case.adapters}")
            model = checkpoint(case, values.model, Path(folder))
            for one in measure(case, model, Path(folder), repeats):
                rows.append(one)
                print(_line(one), flush=True)
    found = {"headline": headline(rows), "rows": rows, "of_a_run": RUN, "repeats": repeats}
    values.out.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(values.out, found | results.machine())
    print(", ".join(f"{k} {v:.3g}" for k, v in found["headline"].items()))
    return 0


def _line(one: dict) -> str:
    speed, temp = one["pairs_per_second"], one["temp_bytes"]
    return LINE.format(
        speed="not run" if speed is None else f"{speed:.1f}",
        temp="" if temp is None else f"{temp / 2**20:.1f}",
        error=one["max_error_over_rms"] or 0.0,
        **{k: one[k] for k in ("path", "peak_gib")},
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
