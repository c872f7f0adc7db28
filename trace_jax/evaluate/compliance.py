"""Compliance of responses to held-out prompts: judged, guarded, with intervals.

A sample row: {"id", "prompt", "split", "model", "mode": "sample" | "greedy", "sample", "response",
"status", "compliant", "old_status", "old_compliant", "degenerate", "guarded", "clauses": {id:
status}, "mean_logprob"}; mean_logprob is under the BASE model, nats per token. What a judge left
undecided counts as not compliant, and is counted (`undecided`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from trace_jax import judges
from trace_jax.evaluate import guard, statistics


def judged_rows(
    prompts: Sequence[Mapping],
    responses: Sequence[Sequence[str]],
    *,
    model: str,
    mode: str,
    judge: judges.Judge,
    old_judge: judges.Judge,
    mean_logprobs: np.ndarray,
) -> list[dict]:
    """Sample rows of one model and mode; `mean_logprobs` in the order of prompts, then samples."""
    items = [
        judges.Item(p["prompt"], r, p.get("labels", {}))
        for p, of_prompt in zip(prompts, responses, strict=True)
        for r in of_prompt
    ]
    verdicts, old_verdicts = iter(judge.judge(items)), iter(old_judge.judge(items))
    logp = iter(mean_logprobs)
    rows = []
    for p, of_prompt in zip(prompts, responses, strict=True):
        for sample, response in enumerate(of_prompt):
            verdict, old_verdict = next(verdicts), next(old_verdicts)
            value = float(next(logp))
            rows.append(
                {
                    "id": p["id"],
                    "prompt": p["prompt"],
                    "split": p["split"],
                    "model": model,
                    "mode": mode,
                    "sample": sample,
                    "response": response,
                    "status": verdict.status,
                    "compliant": verdict.compliant is True,
                    "old_status": old_verdict.status,
                    "old_compliant": old_verdict.compliant is True,
                    "clauses": {k: c.status for k, c in verdict.clauses.items()},
                    "mean_logprob": value if np.isfinite(value) else None,
                }
            )
    return rows


def with_guard(rows: Sequence[dict], thresholds: guard.Guard) -> list[dict]:
    """Rows with "degenerate" and "guarded": compliant and not degenerate."""
    found = []
    for row in rows:
        logp = -np.inf if row["mean_logprob"] is None else row["mean_logprob"]
        degenerate = not thresholds.passes(row["response"], logp)
        guarded = row["compliant"] and not degenerate
        found.append(row | {"degenerate": degenerate, "guarded": guarded})
    return found


def kept_share(rows: Sequence[Mapping], unchanged: Sequence[str]) -> float:
    """Share of samples that comply with the unchanged clauses and are not degenerate."""
    kept = [
        not r["degenerate"] and all(r["clauses"][c] == "compliant" for c in unchanged)
        for r in rows
        if r["mode"] == "sample"
    ]
    return float(np.mean(kept))


def fit_guard(rows: Sequence[Mapping]) -> guard.Guard:
    """Thresholds from the base model's own sampled rows."""
    sampled = [r for r in rows if r["mode"] == "sample"]
    means = [np.array([] if r["mean_logprob"] is None else [r["mean_logprob"]]) for r in sampled]
    return guard.fit([r["response"] for r in sampled], means)


def summary(rows: Sequence[Mapping], actions: Mapping[str, str]) -> dict:
    """Rates of one model's rows under their names in eval.json; compliance_old: the old policy.

    actions: prompt id -> the action triage gives there, for "by_action"; prompts without one are in
    none.
    """
    sampled = [r for r in rows if r["mode"] == "sample"]
    greedy = [r for r in rows if r["mode"] == "greedy"]
    return {
        "compliance_guarded": _figure(sampled, "guarded", actions),
        "compliance": _figure(sampled, "compliant", actions),
        "compliance_greedy": _figure(greedy, "compliant", actions),
        "compliance_old": _rate(sampled, "old_compliant"),
        "undecided": undecided(rows),
    }


def undecided(rows: Sequence[Mapping]) -> dict[str, int]:
    """How often the judges of both policies failed, and how often they abstained."""
    found = Counter(row.get(key) for row in rows for key in ("status", "old_status"))
    return {"judge_errors": found["error"], "abstentions": found["abstain"]}


def outcomes(rows: Sequence[Mapping], key: str) -> np.ndarray:
    """[prompts, samples] 0/1 in order of first appearance."""
    by_prompt: dict[str, list[float]] = {}
    for row in rows:
        by_prompt.setdefault(row["id"], []).append(float(row[key]))
    return np.array(list(by_prompt.values()))


def _figure(rows: Sequence[Mapping], key: str, actions: Mapping[str, str]) -> dict:
    clauses = sorted({c for row in rows for c in row["clauses"]})
    by_action = {
        action: _rate([r for r in rows if actions.get(r["id"]) == action], key)
        for action in sorted({actions[r["id"]] for r in rows if r["id"] in actions})
    }
    by_clause = {
        c: _rate([row | {"_clause": row["clauses"][c] == "compliant"} for row in rows], "_clause")
        for c in clauses
    }
    return _rate(rows, key) | {"by_action": by_action, "by_clause": by_clause}


def _rate(rows: Sequence[Mapping], key: str) -> dict:
    found = statistics.rate(outcomes(rows, key))
    return {"rate": found.rate, "low": found.low, "high": found.high, "n": found.n}
