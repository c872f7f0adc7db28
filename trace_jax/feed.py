"""What a training run reads: examples in pack plans, with their reference log-probs, as steps."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np

from trace_jax import batches, logprobs, methods, metrics, packing, processes, records, sharding


class Steps:
    """Grain source: step -> train.Step of both kinds of batches.

    members: of each kind, the places of its examples in the list of all.
    """

    def __init__(
        self, conflict: batches.StepSource | None, retain: batches.StepSource | None, members: dict
    ):
        self.conflict, self.retain, self._members = conflict, retain, members

    def __len__(self) -> int:
        return len(self.conflict or self.retain)

    def __getitem__(self, step: int) -> batches.Step:
        return batches.Step(*(None if s is None else s[step] for s in (self.conflict, self.retain)))

    def record_ids(self, step: int) -> list[str]:
        return [
            i for s in (self.conflict, self.retain) if s is not None for i in s.record_ids(step)
        ]

    def reweigh(self, examples: Sequence[methods.Example]) -> None:
        """The same examples with other coefficients, from the next `iterator` on."""
        for name, members in self._members.items():
            if members:
                getattr(self, name).examples = [examples[i] for i in members]

    def iterator(self, begin: int, end: int):
        """Steps begin..end-1, read ahead; its position can be checkpointed."""
        data = grain.MapDataset.source(self).slice(slice(begin, end))
        return iter(data.to_iter_dataset(grain.ReadOptions(1, 2)))


@dataclasses.dataclass(frozen=True)
class Kept:
    """Where log-probs under theta_ref are kept.

    of: of which theta_ref, for a folder that several runs share; empty: the folder says it, as a
    stage whose model changed does not continue there.
    """

    directory: Path
    of: str = ""

    def path(self, key: str) -> Path:
        """The file of texts with this key."""
        return self.directory / (f"{key[:16]}.npz" if self.of else "reference_logprobs.npz")


def steps(module, examples, encoded, settings, kept: Kept, progress) -> Steps:
    """Pack plans and step sources of the conflict and the KL examples.

    settings: `fit.Settings`.
    """

    members = {"conflict": [i for i, e in enumerate(examples) if not e.kl],
               "retain": [i for i, e in enumerate(examples) if e.kl]}  # fmt: skip
    per_step = {"conflict": settings.examples_per_step, "retain": settings.retain_per_step}
    texts = {name: [encoded[i] for i in of] for name, of in members.items() if of}
    plans = packing.plan_steps(
        [([e.row_length for e in of], per_step[name]) for name, of in texts.items()],
        total_steps=settings.total_steps,
        seed=settings.seed,
        balanced=settings.balance_steps,
        row_length=settings.row_length,
        micro_rows=settings.micro_rows,
        shards=sharding.shards_in_context(),
        flops=module.position_flops(max(e.row_length for e in encoded)),
    )
    row_length = settings.row_length or batches.longest_row(encoded)
    found = dict.fromkeys(members)
    for name, plan in zip(texts, plans, strict=True):
        used = [examples[i] for i in members[name]]
        ref = np.zeros((len(used), 2), np.float32)
        if any(e.pref or e.npo0 or e.npo1 for e in used):
            ref = reference_logprobs(
                module, texts[name], row_length, settings.micro_rows, kept, progress
            )
        found[name] = batches.StepSource(plan, texts[name], used, ref)
    return Steps(**found, members=members)


def reference_logprobs(
    module, encoded, row_length: int, micro_rows: int, kept: Kept, progress
) -> np.ndarray:
    """log p_ref of both responses, [n, 2]; kept, keyed by the tokens and by what `kept` is of."""
    texts = [(e.prompt, e.branches, e.skip) for e in encoded]
    key = hashlib.sha256((kept.of + json.dumps(texts)).encode()).hexdigest()
    path = kept.path(key)
    found = _stored(path)
    if found is not None and str(found[0]) == key:
        return found[1]
    with progress(len(encoded), "reference log-probs") as bar:
        logp = logprobs.of_texts(
            module, encoded, row_length=row_length, micro_rows=micro_rows, progress=bar.advance
        )
    if processes.is_first():
        kept.directory.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")  # of runs side by side
        np.savez(temporary, key=key, logp=logp)
        records.sync(temporary)
        temporary.replace(path)
    return logp


def _stored(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Key and log-probs of a file; None where there is none, or it is damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path) as stored:
            return stored["key"], stored["logp"]
    except Exception:  # numpy and zipfile raise whatever the damage makes of it
        metrics.say(f"  warning: {path} is damaged; its log-probs are computed anew")
        return None


def real_token_share(source: Steps) -> float:
    """Tokens of examples over tokens computed, of both kinds of batches together."""
    kinds = [s for s in (source.conflict, source.retain) if s is not None]
    positions = [s.plan.positions([e.row_length for e in s.encoded]) for s in kinds]
    real, computed = np.sum(positions, axis=0)
    return float(real / computed)
