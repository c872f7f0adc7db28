"""What a run is doing: `python -m trace_jax.status WORKDIR [--json]`. Reads its files alone.

Done, running and waiting stages; of the running one how far it is, its speed and when it will end;
who holds the workdir; what the judge has cost. Imports no jax.
"""

import argparse
import fcntl
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trace_jax import bucket, commands, heartbeat, locks, metrics, records, stages, workdir
from trace_jax.errors import InputError

# Of each stage that trains: its section of the config, its metrics and its checkpoints.
_TRAINING = {
    "prepare": (
        ("model", "scratch", "training"), "base_checkpoints/metrics.jsonl", "base_checkpoints"
    ),
    "align": (("align",), "ref_checkpoints/metrics.jsonl", "ref_checkpoints"),
    "train": (("train",), "metrics.jsonl", "checkpoints"),
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Exit code 0 told, 2 no run there."""
    parser = argparse.ArgumentParser(prog="python -m trace_jax.status", description=__doc__)
    parser.add_argument("workdir", help="a folder, or gs://bucket/name")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(run=_tell)
    return commands.run(parser, argv)


def of(
    directory: Path, now: float | None = None, owner: dict[str, Any] | None = None
) -> dict[str, Any]:
    """{"workdir", "running", "owner", "processes", "stages": [...], "judge", "seconds"}.

    A stage is {"stage", "state", "seconds"}, state one of done, running, interrupted, waiting.
    While it trains it has "step", "total_steps", "steps_per_second" and "seconds_left" as well.
    Whatever else the running one counts is in "what", "done", "total", "per_second" and
    "seconds_left"; a stage of several parts (answers, verdicts, likelihoods) tells of the present
    one. These are as old as the sign of life of the first process: up to ten seconds.
    """
    path = Path(directory)
    if not (path / "config.json").exists() and not (path / ".stages").is_dir():
        raise InputError(f"{path}: no run there (no config.json, no .stages)")
    config = records.read_json(path / "config.json") if (path / "config.json").exists() else {}
    owner = owner or _owner(path)
    processes = heartbeat.read(path) if owner is not None else []
    found, run = [], workdir.Workdir(path)
    for name in stages.NAMES:
        done, begun = run.finished(name), path / ".stages" / f"{name}.started.json"
        row: dict[str, Any] = {"stage": name, "state": "waiting", "seconds": None}
        if done is not None:
            row |= {"state": "done", "seconds": done["seconds"]}
        elif begun.exists():
            seconds = (now or time.time()) - begun.stat().st_mtime
            row |= {"state": "running" if owner else "interrupted", "seconds": seconds}
            row |= _work(name, processes) or _steps(path, name, config)
        found.append(row)
    return {
        "workdir": str(path),
        "running": owner is not None,
        "owner": owner,
        "processes": processes,
        "stages": found,
        "seconds": sum(row["seconds"] or 0.0 for row in found if row["state"] == "done"),
        "judge": _judge(path, config),
    }


def _owner(path: Path) -> dict[str, Any] | None:
    """Who holds the workdir now, None if nobody does."""
    lock = path / locks.NAME
    if not lock.exists():
        return None
    descriptor = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        text = lock.read_text()
        return json.loads(text) if text else {}
    finally:
        os.close(descriptor)
    return None


def _work(stage: str, processes: list[dict[str, Any]]) -> dict[str, Any]:
    """How far the first process says that it is in this stage; {} in a training or if it is silent.

    Speed is that of this try.
    """
    sign = next((row for row in processes if row["process"] == 0), None)
    work = sign and sign["work"]
    if not work or sign["doing"].split(",")[0] != f"stage {stage}":
        return {}
    what, done, total = work["what"], work["done"], work["total"]
    if stage in _TRAINING and what == f"train {_TRAINING[stage][2]}":
        return {}  # its metrics say it to the step
    found = {"what": what, "done": done, "total": total}
    made = done - work["first"]
    if made <= 0:
        return found
    speed = made / max(1e-9, work["seconds"])
    left = None if total is None else max(0, total - done) / speed
    return found | {"per_second": speed, "seconds_left": left}


def _steps(path: Path, stage: str, config: dict[str, Any]) -> dict[str, Any]:
    """Where a training is; its speed is that of this try, not of those before it."""
    if stage not in _TRAINING:
        return {}
    section, name, checkpoints = _TRAINING[stage]
    file, began = path / name, path / checkpoints / "began.json"
    for key in section:
        config = config.get(key, {})
    if not file.exists() or not began.exists() or "total_steps" not in config:
        return {}
    rows, begin, total = metrics.read_metrics(file), records.read_json(began), config["total_steps"]
    step = int(rows[-1]["step"]) if rows else 0
    found = {"step": step, "total_steps": total}
    made = step - begin["step"]
    if made <= 0:
        return found
    speed = made / max(1e-9, file.stat().st_mtime - begin["time"])
    return found | {"steps_per_second": speed, "seconds_left": (total - step) / speed}


def _judge(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """What the judgement store of the run has counted, None where there is none."""
    store = workdir.store(path, config)
    if not store.exists():
        return None
    from trace_jax.judges import store as stores

    kept = stores.Store(store, read_only=True)
    spent = kept.spent()
    kept.close()
    return {"calls": spent.calls, "input_tokens": spent.input_tokens,
            "output_tokens": spent.output_tokens, "price_usd": spent.price}  # fmt: skip


def _tell(arguments: argparse.Namespace) -> None:
    with bucket.opened(arguments.workdir, read_only=True) as path:
        found = of(path, owner=bucket.owner(arguments.workdir))
    found["workdir"] = arguments.workdir
    if arguments.json:
        metrics.show(json.dumps(found))
        return
    metrics.table(found["workdir"], [_line(row) for row in found["stages"]])
    owner = found["owner"]
    if owner:
        metrics.show(
            f"at work: process {owner['process']} on {owner['host']} since {owner['since']}"
        )
    elif found["running"]:
        metrics.show("at work")
    else:
        rest = [row["stage"] for row in found["stages"] if row["state"] != "done"]
        metrics.show("nobody is at work; " + (f"next: {rest[0]}" if rest else "all is done"))
    for row in found["processes"]:
        still = metrics.duration(max(0.0, time.time() - row["since"]))
        gone = "; gives no sign of life" if heartbeat.is_dead(row) else ""
        metrics.show(
            f"process {row['process']} on {row['host']}: {row['doing']} "
            f"(last progress {still} ago{gone})"
        )
    if found["judge"]:
        j = found["judge"]
        metrics.show(f"judge: {j['calls']} calls, {j['price_usd']:.4f} US dollars")


def _line(row: dict[str, Any]) -> dict[str, str]:
    left, speed = row.get("seconds_left"), row.get("steps_per_second", row.get("per_second"))
    done, total = row.get("step", row.get("done")), row.get("total_steps", row.get("total"))
    return {
        "stage": row["stage"],
        "state": row["state"],
        "time": "" if row["seconds"] is None else metrics.duration(row["seconds"]),
        "done": "" if done is None else str(done) if total is None else f"{done}/{total}",
        "a second": "" if speed is None else f"{speed:.2f}",
        "left": "" if left is None else metrics.duration(left),
        "of": row.get("what", "steps" if "step" in row else ""),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
