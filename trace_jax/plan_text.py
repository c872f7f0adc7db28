"""The plan of a run in tables for people; `plan` makes it."""

from typing import Any

from trace_jax import hardware, metrics
from trace_jax.hardware import GIB


def show(plan: dict[str, Any]) -> None:
    """Prints the plan for people."""
    mark = " (estimate)" if plan["tokens"]["estimated"] else ""
    metrics.table("Memory a device, GiB", [
        {"program": name} | {k: round(p[f"{k}_bytes"] / GIB, 2)
                             for k in ("argument", "output", "alias", "temp", "peak")}
        | {"TFLOP": round(p["flops"] / 1e12, 2), "compiled in s": p["compile_seconds"]}
        for name, p in plan["programs"].items()
    ])  # fmt: skip
    hours = "unknown" if plan["hours"] is None else f"{plan['hours']:.2f}"
    found = plan["records"]
    of_records = str(found["by_action"] or "not triaged yet, thirds assumed")
    if found["assumed"]:
        of_records = f"assumed (data.pairs); {found['assumed']}; {of_records}"
    share = plan["device_memory_share"]
    taken = "" if share is None else f", {share:.0%} of a GPU's ({hardware.SHARE_VARIABLES[0]})"
    device, tokens = plan["device"], plan["tokens"]
    metrics.table("Plan", [{"what": k, "value": str(v)} for k, v in {
        "devices": f"{device['count']} x {device['kind']}, mesh {device['mesh']}",
        "compiled for": device["compiled_for"],
        "memory a device": f"{plan['device_memory_bytes'] / GIB:.2f} GiB{taken}",
        "parameters": f"{plan['parameters']['total']:,}",
        "trainable": f"{plan['parameters']['trainable']:,}",
        "records": f"{found['total']:,} ({of_records})",
        "tokens an epoch": f"{tokens['per_epoch']:,}{mark}",
        "rows a step": f"{tokens['conflict_rows_per_step']} conflict, "
                       f"{tokens['retain_rows_per_step']} KL, {tokens['row_length']} tokens{mark}",
        "judge, triage": _calls(plan["judge"]),
        **{who: _at_most(asked) for who, asked in plan["judge_later"].items()},
        "hours": f"{hours} at {plan['utilisation']:.0%} utilisation",
        "verdict": plan["verdict"],
    }.items()])  # fmt: skip


def _at_most(asked: dict[str, Any]) -> str:
    if asked["calls"] is None:
        return (
            f"not known before triage; a prompt of PUNISH records at most {_calls(asked['each'])}"
        )
    return f"at most {_calls(asked)}"


def _calls(asked: dict[str, Any]) -> str:
    return f"{asked['calls']:,} calls, {asked['tokens']:,} tokens, {asked['price']:.2f} USD"
