"""What a run is doing: `python -m trace_jax.status WORKDIR [--json]`. Reads its files alone.

Done, running and waiting stages; of the running one how far it is, its speed and when it will end;
the same of a comparison's runs; who holds the workdir; what the judge has cost. Imports no jax.
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

from trace_jax import (
    bucket,
    commands,
    compare,
    heartbeat,
    locks,
    metrics,
    records,
    stages,
    workdir,
)
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
    """{"workdir", "running", "owner", "processes", "stages", "comparison", "judge", "seconds"}.

    A stage is {"stage", "state", "seconds"}, state one of done, running, interrupted, waiting; one
    that a run of a comparison shares with all others has {"shared": True}, and no seconds.
    While it trains it has "step", "total_steps", "steps_per_second" and "seconds_left" as well.
    Whatever else the running one counts is in "what", "done", "total", "per_second" and
    "seconds_left"; a stage of several parts (answers, verdicts, likelihoods) tells of the present
    one. These are as old as the sign of life of the first process: up to ten seconds.

    The comparison over the workdir is None or {"running", "owner", "done", "total", "runs"}; a run
    is {"run", "state", "seconds"}, and while it is under way what its stage is and has. "running"
    of the whole is of the workdir's own stages alone.
    """
    path = Path(directory)
    if not (path / "config.json").exists() and not (path / ".stages").is_dir():
        raise InputError(f"{path}: no run there (no config.json, no .stages)")
    owner = owner or _owner(path)
    rows = _rows(path, owner is not None, now or time.time())
    return {
        "workdir": str(path),
        "running": owner is not None,
        "owner": owner,
        "processes": _signs(path, owner is not None),
        "stages": rows,
        "comparison": _comparison(path, now or time.time()),
        "seconds": sum(row["seconds"] or 0.0 for row in rows if row["state"] == "done"),
        "judge": judge(path),
    }


def _config(path: Path) -> dict[str, Any]:
    return records.read_json(path / "config.json") if (path / "config.json").exists() else {}


def _signs(path: Path, at_work: bool) -> list[dict[str, Any]]:
    return heartbeat.read(path) if at_work else []


def _rows(path: Path, at_work: bool, now: float) -> list[dict[str, Any]]:
    """The stages of a run."""
    config, processes = _config(path), _signs(path, at_work)
    found, run = [], _opened(path)
    names = stages.NAMES if run.shared is None else (*compare.SHARED, *compare.OWN)
    for name in names:
        done, begun = run.finished(name), path / ".stages" / f"{name}.started.json"
        row: dict[str, Any] = {"stage": name, "state": "waiting", "seconds": None}
        if name in run.shared_stages:
            row |= {"state": "done" if done is not None else "waiting", "shared": True}
        elif done is not None:
            row |= {"state": "done", "seconds": done["seconds"]}
        elif begun.exists():
            seconds = now - begun.stat().st_mtime
            row |= {"state": "running" if at_work else "interrupted", "seconds": seconds}
            row |= _work(name, processes) or _steps(path, name, config, processes)
        found.append(row)
    return found


def _opened(path: Path) -> workdir.Workdir:
    """The run in `path`. One of a comparison reads what it does not do itself where it was done."""
    here = path.resolve()
    prepared = here.parent.parent
    if here.parent.name != compare.FOLDER or not (prepared / ".stages").is_dir():
        return workdir.Workdir(path)
    begun = [any((path / ".stages").glob(f"{name}.*json")) for name in compare.CHANGEABLE]
    own = compare.CHANGEABLE[begun.index(True) :] if any(begun) else ()
    return workdir.Workdir(path, workdir.Workdir(prepared), frozenset(compare.SHARED) - set(own))


def _comparison(path: Path, now: float) -> dict[str, Any] | None:
    """The runs that were asked for last, in order, then all others that are there."""
    folder = path / compare.FOLDER
    plan = folder / compare.PLAN
    planned = records.read_json(plan)["runs"] if plan.exists() else []
    there = sorted(marks.parent.name for marks in folder.glob("*/.stages"))
    if not (planned or there):
        return None
    runs = [_run(folder / name, now) for name in dict.fromkeys([*planned, *there])]
    counted = runs[: len(planned)] or runs
    owner = _owner(folder)
    return {
        "running": owner is not None,
        "owner": owner,
        "done": sum(run["state"] == "done" for run in counted),
        "total": len(counted),
        "runs": runs,
    }


def _run(path: Path, now: float) -> dict[str, Any]:
    owner = _owner(path)
    told: dict[str, Any] = {"run": path.name, "state": "running" if owner else "waiting"}
    if not (path / ".stages").is_dir():
        return told | {"seconds": None}
    rows = _rows(path, owner is not None, now)
    here = next((row for row in rows if row["state"] != "done"), None)
    seconds = sum(row["seconds"] or 0.0 for row in rows)
    if here is None:
        return told | {"state": "running" if owner else "done", "seconds": seconds}
    return here | told | {"state": "running" if owner else "interrupted", "seconds": seconds}


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
    work = _said(stage, processes)
    if not work or _trains(stage, work):
        return {}  # of a training its metrics say it to the step
    done, total = work["done"], work["total"]
    found = {"what": work["what"], "done": done, "total": total}
    speed = _speed(work)
    if speed is None:
        return found
    left = None if total is None else max(0, total - done) / speed
    return found | {"per_second": speed, "seconds_left": left}


def _said(stage: str, processes: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the first process counts in this stage."""
    sign = next((row for row in processes if row["process"] == 0), None)
    here = sign is not None and sign["doing"].split(",")[0] == f"stage {stage}"
    return sign["work"] if here else None


def _trains(stage: str, work: dict[str, Any]) -> bool:
    return stage in _TRAINING and work["what"] == f"train {_TRAINING[stage][2]}"


def _speed(work: dict[str, Any]) -> float | None:
    """Since the first count: what came before it was compiled, too."""
    made = work["done"] - work["first"]
    return made / max(1e-9, work["seconds"]) if made > 0 else None


def _steps(
    path: Path, stage: str, config: dict[str, Any], processes: list[dict[str, Any]]
) -> dict[str, Any]:
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
    work, made = _said(stage, processes), step - begin["step"]
    speed = _speed(work) if work and _trains(stage, work) else None
    if speed is None and made > 1:  # nobody says it; the first step compiled, and is counted
        speed = made / max(1e-9, file.stat().st_mtime - begin["time"])
    if speed is None:
        return found
    return found | {"steps_per_second": speed, "seconds_left": (total - step) / speed}


def judge(path: Path) -> dict[str, Any] | None:
    """What the judgement store of the run has counted, None where there is none."""
    store = workdir.store(path, _config(path))
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
    comparison = found["comparison"] or {"running": False}
    if found["comparison"]:
        title = f"comparison: {comparison['done']} of {comparison['total']} runs done"
        lines = [{"run": row["run"]} | _line({"stage": ""} | row) for row in comparison["runs"]]
        metrics.table(title, lines)
    for told, what in ((found, "at work"), (comparison, "a comparison is at work")):
        if told["running"]:
            owner = told["owner"]
            by = owner and f": process {owner['process']} on {owner['host']} since {owner['since']}"
            metrics.show(what + (by or ""))
    if not (found["running"] or comparison["running"]):
        metrics.show(f"nobody is at work; {_next(found)}")
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


def _next(found: dict[str, Any]) -> str:
    comparison = found["comparison"]
    rest = [row["stage"] for row in found["stages"] if row["state"] != "done"]
    begun = any(row["state"] == "interrupted" for row in found["stages"])
    if comparison and (not rest or (rest[0] == compare.OWN[0] and not begun)):
        left = comparison["total"] - comparison["done"]
        if left:
            return f"next: {left} of the comparison's runs, by its command"
        return "the comparison is done" if rest else "all is done"
    return f"next: {rest[0]}" if rest else "all is done"


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
        "of": row.get("what", "steps" if "step" in row else "shared" if "shared" in row else ""),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
