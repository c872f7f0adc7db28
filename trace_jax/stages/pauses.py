"""Between steps of stage train: weights taken anew, evaluation, early stop, the best step."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from flax import nnx

from trace_jax import methods, metrics, policy, records, tracking
from trace_jax.errors import InputError
from trace_jax.evaluate import compliance, guard
from trace_jax.stages import context, impact, responses, scoring

_FILE = "pauses.jsonl"  # rows {"step", "kind": "weights" | "evaluation", ...}


class Pauses:
    """`fit.Pauses` as the config has them: refresh of the weights, evaluation on validation."""

    def __init__(self, run: context.Context):
        config, total = run.config.train, run.config.train.total_steps
        self._run = run
        every = 0 if run.scored_method is None else config.refresh_every
        if run.scored_method == "u2a":
            every = -(-total // run.config.u2a.rounds)
        self._refresh = _every(every, total)
        self._evaluate = _every(config.evaluate_every, total)
        if config.keep_best:
            self._evaluate.add(total)
        self.steps = sorted(self._refresh | self._evaluate)
        self._path = run.workdir.path / _FILE
        rows = records.read_jsonl(self._path) if self._path.exists() else ()
        self._done = {(row["step"], row["kind"]): row for _, row in rows}
        if self._evaluate:
            self._evaluation = _Evaluation(run)

    def __call__(
        self, step: int, module: nnx.Module | None, examples: Sequence[methods.Example]
    ) -> Sequence[methods.Example] | None:
        """See `fit.Pauses`."""
        config = self._run.config.train
        if step in self._refresh:
            examples = self._reweighed(step, module, examples)
        if step in self._evaluate and module is not None:
            row = self._row(step, "evaluation", lambda: self._evaluation.of(module, step))
            if row["kept"] < config.stop_below * row["kept_ref"]:
                metrics.say(
                    f"  step {step}: {row['kept']:.0%} of the samples keep what does not change "
                    f"(M_ref {row['kept_ref']:.0%}); training ends here, the model is that of "
                    f"{'the best' if config.keep_best else 'the'} evaluation before"
                )
                return None
            if step < config.total_steps and self._is_spent(step):
                metrics.say(
                    f"  step {step}: perplexity over the limit {config.patience} times in a row; "
                    "training ends here, the model is that of the best evaluation before"
                )
                return None
        return examples

    def _is_spent(self, step: int) -> bool:
        """Whether the last `train.patience` evaluations are over the limit, and one before is not.

        Where all are over it, a later one may be the best: that of least perplexity.
        """
        config = self._run.config.train
        if not config.keep_best or not config.patience:
            return False
        within = [is_within(row, config.perplexity_limit) for row in self._evaluations(step)]
        return any(within) and not any(within[-config.patience :])

    def _evaluations(self, until: int) -> list[dict]:
        rows = (self._done.get((step, "evaluation")) for step in sorted(self._evaluate))
        return [row for row in rows if row is not None and row["step"] <= until]

    def keeps(self, step: int) -> bool:
        """See `fit.Pauses`: every evaluation for an early stop, else the best one so far."""
        config = self._run.config.train
        if step not in self._evaluate or not (config.keep_best or config.stop_below):
            return False
        if not config.keep_best:
            return True
        return best(self._evaluations(step), config.perplexity_limit)["step"] == step

    def _row(self, step: int, kind: str, make: Callable[[], dict]) -> dict:
        """The row of an earlier try, or a new one, written at once."""
        if (step, kind) not in self._done:
            self._done[step, kind] = {"step": step, "kind": kind} | make()
            records.write_jsonl(self._path, self._done.values())
        return self._done[step, kind]

    def _reweighed(
        self, step: int, module: nnx.Module | None, examples: Sequence[methods.Example]
    ) -> list[methods.Example]:
        if module is None and (step, "weights") not in self._done:
            raise InputError(f"{self._path} has no weights of step {step}; use --redo")
        row = self._row(step, "weights", lambda: self._weights(step, module, examples))
        weights = {(i, action): w for i, action, w in row["weights"]}
        run = self._run
        fresh = run.examples(run.config.train.method, weights, with_zeros=True)
        by_key = {(e.record_id, e.action, e.y1 is None): e for e in fresh}
        return [by_key[e.record_id, e.action, e.y1 is None] for e in examples]

    def _weights(self, step: int, module: nnx.Module, examples) -> dict:
        run = self._run
        scored, encoded, gold, _ = impact.objective(run)
        omega = None
        if run.scored_method == "u2a":  # the records of the first round stay, with their weights
            before = {e.record_id: e.npo0 - e.nll for e in examples}
            kept = [i for i, e in enumerate(scored) if e.record_id in before]
            scored, encoded = [scored[i] for i in kept], [encoded[i] for i in kept]
            omega = np.array([before[e.record_id] for e in scored])
        found = scoring.scores(run, scored, encoded, gold, module)
        is_gold = np.isin([e.record_id for e in scored], [e.record_id for e in gold])
        scores, halves = found.along_J, found.stability(np.ones(len(scored), bool))
        weights = impact.weigh(run, scored, scores, is_gold, omega)
        rows = [[e.record_id, e.action, float(w)] for e, w in zip(scored, weights, strict=True)]
        metrics.say(
            f"  step {step}: weights taken anew, {np.mean(scores <= 0):.0%} of the scores "
            f"negative, rank correlation of the two gold halves {halves:.2f}"
        )
        return {"weights": rows, "negative": float(np.mean(scores <= 0)), "stability": halves}


def best(rows: Sequence[dict], limit: float) -> dict:
    """Of evaluations, that of highest guarded compliance within the limit, the first of equals.

    limit: perplexity over M_ref's on the same text. Where all are over it, that of least
    perplexity.
    """
    within = [row for row in rows if is_within(row, limit)]
    if not within:
        return min(rows, key=lambda r: (r["perplexity"], r["step"]))
    return min(within, key=lambda r: (-r["compliance_guarded"], r["step"]))


def is_within(row: dict, limit: float) -> bool:
    """Whether an evaluation's perplexity is at most `limit` times M_ref's."""
    return row["perplexity"] <= limit * row["perplexity_ref"]


def _every(n: int, total: int) -> set[int]:
    """Steps n, 2 n, ... below total; none for 0."""
    return set(range(n, total, n)) if n else set()


class _Evaluation:
    """The model in training on the first validation prompts, beside M_ref on the same."""

    def __init__(self, run: context.Context):
        if "validation" not in run.config.evaluate.splits or not run.workdir.finished("baseline"):
            raise InputError(
                "train.evaluate_every needs stage baseline on validation prompts; give "
                "--config.evaluate.splits=test,validation and run stage baseline first"
            )
        self._run = run
        prompts = [p for p in run.prompts if p["split"] == "validation"]
        self._prompts = prompts[: run.config.train.evaluate_prompts]
        ids = {p["id"] for p in self._prompts}
        before = (row for _, row in records.read_jsonl(run.file("baseline", "baseline.jsonl")))
        before = [r for r in before if r["split"] == "validation" and r["id"] in ids]
        self._base = [r for r in before if r["model"] == "base"]
        self._ref = [r for r in before if r["model"] == "ref"] or self._base
        self._guard = guard.Guard.from_json(records.read_json(run.file("baseline", "guard.json")))
        self._unchanged = policy.diff(run.old_policy, run.new_policy).unchanged

    def of(self, module: nnx.Module, step: int) -> dict:
        """Figures of `module` now: rates in 0..1; perplexity of the base model's samples."""
        run = self._run
        rows = responses.make_rows(run, module, f"step {step}", self._prompts, "sample")
        rows = compliance.with_guard(rows, self._guard)
        found = {
            "compliance_guarded": float(np.mean([r["guarded"] for r in rows])),
            "compliance": float(np.mean([r["compliant"] for r in rows])),
            "kept": compliance.kept_share(rows, self._unchanged),
            "kept_ref": compliance.kept_share(self._ref, self._unchanged),
            "perplexity": responses.perplexity(run, module, self._base, f"step {step}"),
            "perplexity_ref": self._perplexity_ref,
            "prompts": len(self._prompts),
        }
        tracking.scalars("train", step, {f"validation/{k}": v for k, v in found.items()})
        metrics.say(
            f"  step {step}: {found['compliance_guarded']:.1%} guarded, "
            f"{found['compliance']:.1%} raw, {found['kept']:.1%} kept, "
            f"perplexity {found['perplexity']:.2f}, M_ref's {found['perplexity_ref']:.2f} "
            "(validation)"
        )
        return found

    @functools.cached_property
    def _perplexity_ref(self) -> float:
        return responses.perplexity(self._run, self._run.ref, self._base, "M_ref")
