"""The harness over several models, with paired differences to the first on the same documents."""

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from trace_jax import metrics
from trace_jax.errors import InputError
from trace_jax.evaluate import capability, capability_tasks, subject


def evaluate(
    subjects: Iterable[subject.Subject],
    tasks: Sequence[str | dict[str, Any]],
    *,
    include: Path | None,
    limit: int | None,
    chat: bool,
    batch_rows: int,
) -> dict[str, Any]:
    """{"models": {name: {task: {metric: {"value", "n", "to_first"...}}}}, "first", "harness"}.

    A metric is called as the harness does, "metric,filter"; "metric" where the filter is "none".

    Raises:
      InputError: the harness knows no such task; no model is loaded before.
    """
    manager = TaskManager(include_path=str(include) if include else None)
    _check_known(tasks, manager.all_tasks)
    first: dict[str, list[dict]] | None = None
    models: dict[str, Any] = {}
    for one in subjects:
        model = capability.HarnessModel(
            one.module, one.tokenizer, stop_ids=one.stop_ids, batch_rows=batch_rows
        )
        for task in tasks:  # before hours of others
            if isinstance(task, dict) and "generation_kwargs" in task:
                model.check_room(task["generation_kwargs"]["max_gen_toks"], task["task"])
        metrics.say(f"[{one.name}]")
        with one.devices():
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                apply_chat_template=chat,
                log_samples=True,
                bootstrap_iters=0,
            )
        first = first or found["samples"]
        models[one.name] = {
            task: _of_task(rows, first[task], is_first=first is found["samples"])
            for task, rows in found["samples"].items()
        }
    names = list(models)
    return {"first": names[0], "models": models, "harness": lm_eval.__version__}


def _check_known(tasks: Sequence[str | dict[str, Any]], known: Sequence[str]) -> None:
    """Names are those of `known`, or files of tasks (YAML)."""
    for name in tasks:
        if isinstance(name, dict) or name in known or os.path.isfile(os.path.expanduser(name)):
            continue
        near = difflib.get_close_matches(name, known)
        hint = f"the nearest are {', '.join(near)}" if near else "`lm-eval ls tasks` lists them"
        raise InputError(f"--tasks={name}: neither a task of the harness nor of --include; {hint}")


def _of_task(rows: list[dict], first: list[dict], *, is_first: bool) -> dict[str, Any]:
    """The harness logs a row for every document and filter; filters are metrics of their own."""
    out: dict[str, Any] = {}
    for name in dict.fromkeys(row["filter"] for row in rows):
        of, of_first = ([r for r in every if r["filter"] == name] for every in (rows, first))
        for metric, found in _of_filter(of, of_first, is_first=is_first).items():
            out[metric if name == "none" else f"{metric},{name}"] = found
    return out


def _of_filter(rows: list[dict], first: list[dict], *, is_first: bool) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for metric in rows[0]["metrics"]:
        values = [row[metric] for row in rows]
        if not all(isinstance(value, int | float) for value in values):
            continue
        out[metric] = {"value": sum(map(float, values)) / len(values), "n": len(values)}
        if not is_first:
            out[metric] |= {"to_first": capability.paired(rows, first, metric)}
        groups = capability_tasks.by_group(rows, metric)
        if groups:
            out[metric]["by_group"] = groups
    return out


def markdown(found: dict[str, Any]) -> str:
    """A line a task and metric, a column a model, differences to the first with intervals."""
    names = list(found["models"])
    lines = ["| task | metric | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for task, of_task in found["models"][names[0]].items():
        for metric in of_task:
            cells = [_cell(found["models"][name][task][metric]) for name in names]
            lines.append(f"| {task} | {metric} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "Percent; in brackets the difference to the first model [95 %]."])


def _cell(value: dict[str, Any]) -> str:
    shown = f"{100 * value['value']:.1f}"
    if "to_first" in value:
        d = value["to_first"]
        shown += f" ({100 * d['difference']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}])"
    return shown
