"""What a stage gets: config, workdir; models, policies and judge, loaded when first asked for."""

import contextlib
import functools
from pathlib import Path

import ml_collections
import numpy as np

from trace_jax import config as config_lib
from trace_jax import (
    judges,
    methods,
    metrics,
    model_folder,
    noise,
    policy,
    processes,
    records,
    remote,
    triage,
    workdir,
)
from trace_jax.errors import InputError
from trace_jax.sources import files


class Context:
    """One run. Nothing is loaded, and jax is not imported, before a stage asks for it."""

    def __init__(self, config: ml_collections.ConfigDict, directory: workdir.Workdir):
        self.config = config
        self.workdir = directory
        self.flat_config = config_lib.flatten(config)
        self.progress = metrics.progress
        self.intact: set[str] = set()  # stages whose artefacts were seen to be as they were left

    def load_judges(self) -> None:
        """Loads both policies and their judges now, so that what is wrong there shows at once."""
        _ = self.judge, self.old_judge
        if self.config.correct.source == "gemini":
            from trace_jax.judges import gemini_service

            gemini_service.check_access(self.config.asking.vertex_project)

    def content_hashes(self, stage: str) -> dict[str, str]:
        """Hashes of what config keys only name: policies, the model's and the data's files."""
        found = {}
        if stage in ("triage", "baseline", "correct", "evaluate"):
            found["policy.new/hash"] = self.new_policy.hash
            judging = self.config.judge.local.model
            if self.config.judge.name != "rules" and judging and Path(judging).exists():
                found["judge.local.model/hash"] = model_folder.content_hash(Path(judging))
        if stage == "triage" and self.config.triage.overrides:
            overrides = Path(self.config.triage.overrides)
            found["triage.overrides/hash"] = workdir.hash_path(overrides)
        if stage == "correct" and self.config.correct.local_model:
            writer = Path(self.config.correct.local_model)
            found["correct.local_model/hash"] = model_folder.content_hash(writer)
        if stage in ("prepare", "baseline", "evaluate"):
            found["policy.old/hash"] = self.old_policy.hash
        if stage == "prepare":
            keys = ("model.path", "model.ref_path", "data.path", "data.prompts_path")
            if self.config.data.source == "parent":
                parent, keys = Path(self.config.parent), keys[:2]
                for name in ("triage.jsonl", "corrections.jsonl", "prompts.jsonl"):
                    found[f"parent/{name}"] = workdir.hash_path(parent / name)
            for key in keys:
                path = str(self.flat_config[key])
                if path and model_folder.is_adapter(Path(path)):
                    found[f"{key}/hash"] = model_folder.content_hash(Path(path))
                elif path:
                    found[f"{key}/hash"] = files.digest(path)
        if stage == "export" and (evaluated := self.workdir.finished("evaluate")):
            found["evaluate/eval.json"] = evaluated["outputs"]["eval.json"]  # for the model card
        if stage == "train" and self.config.train.evaluate_every:
            judged = self.workdir.finished("baseline")
            found["baseline"] = judged["outputs"]["baseline.jsonl"] if judged else ""
        if stage == "impact":
            found["impact/examples"] = self.scored_method or "none"
        return found

    @property
    def scored_method(self) -> str | None:
        """Whose examples stage impact scores; None where the method takes no weights."""
        method = self.config.train.method
        if self.config.impact.weights == "uniform" or method not in methods.WEIGHTED:
            return None
        return method if method in ("trace_no_triage", "u2a") else "trace"

    def examples(self, method: str, weights: dict | None, **options: bool) -> list:
        """Examples of a method over the triaged records, as the config has it.

        Raises:
          InputError: dpo_gold (or dpo_gold_nll) without any correction: another method.
        """
        config, alpha = self.config, self.config.train.alpha_kl
        if method == "u2a":
            alpha = config.u2a.alpha_kl
        elif config.train.alpha_scale == "per_conflict":
            alpha /= max(1, sum(t.action in methods.CONFLICTS for t in self.used))
        punished = sum(t.action == "PUNISH" for t in self.used)
        if method in ("dpo_gold", "dpo_gold_nll") and punished and not self.corrections:
            raise InputError(
                f"{method} needs corrections, and none of {punished} PUNISH records has one: make "
                "some (--config.correct.source=self), or train dpo_gold_uncorrected"
            )
        return methods.examples(
            method,
            self.used,
            corrections=self.corrections,
            weights=weights,
            alpha_kl=alpha,
            punish=config.train.punish,
            inner=config.u2a.inner,
            retain_pairs=config.train.retain_pairs,
            alpha_nll=config.train.alpha_nll,
            **options,
        )

    def file(self, stage: str, name: str) -> Path:
        """Path of an artefact of a stage."""
        return self.workdir.file(stage, name)

    @functools.cached_property
    def old_policy(self) -> policy.Policy:
        return policy.load(self.config.policy.old)

    @functools.cached_property
    def new_policy(self) -> policy.Policy:
        return policy.load(self.config.policy.new)

    @functools.cached_property
    def judge(self) -> judges.Judge:
        """The judge of the new policy."""
        return self._judge(self.new_policy)

    @functools.cached_property
    def triage_judge(self) -> judges.Judge:
        """Who triages and accepts corrections: the judge, or in a study one that errs."""
        config = self.config.triage
        if not config.error:
            return self.judge
        return noise.DoubtfulJudge(self.judge, error=config.error, seed=config.noise_seed)

    @functools.cached_property
    def old_judge(self) -> judges.Judge:
        """The judge of the old policy."""
        return self._judge(self.old_policy)

    def _judge(self, rules: policy.Policy) -> judges.Judge:
        config = self.config
        return judges.make(
            config.judge.name,
            rules,
            config.judge.to_dict(),
            asking=config.asking.to_dict(),
            store=self.store_path,
            load_model=self.load_other,
        )

    @property
    def store_path(self) -> Path:
        """The judgement store."""
        return workdir.store(self.workdir.path, self.config)

    def load_other(self, path: str, dtype: str):
        """Another model than the one re-aligned, on this run's mesh, and its tokenizer."""
        from trace_jax import models
        from trace_jax.models import hf_weights

        directory = model_folder.resolve(path)
        tokenizer = self._tokenizer_at(directory)
        module = models.load(directory, dtype=dtype, mesh=self.mesh)
        hf_weights.check_tokenizer(module.config, tokenizer)
        return module, tokenizer

    @property
    def base_directory(self) -> Path:
        """Hugging Face directory of the deployed model; of a model of the hub, its local copy."""
        return self._given if self.config.model.path else self.file("prepare", "base")

    @functools.cached_property
    def _given(self) -> Path:
        return model_folder.resolve(self.config.model.path)

    def base_identity(self) -> dict[str, object]:
        """What the base model is and how texts meet it; later stages are redone when it changes."""
        keys = ("model.dtype", "model.stop_ids", "data.max_length", "data.append_stop")
        values = {key: self.flat_config[key] for key in (*keys, "data.too_long")}
        values["hash"] = model_folder.content_hash(self.base_directory)
        if self.config.model.ref_path:
            values["ref_hash"] = model_folder.content_hash(self.ref_directory)
        return values

    @functools.cached_property
    def tokenizer(self):
        """The base model's tokenizer."""
        return self._tokenizer_at(self.base_directory)

    def _tokenizer_at(self, directory: Path):
        from trace_jax import encoding

        return encoding.load_tokenizer(directory)

    @functools.cached_property
    def encoder(self):
        """Texts to tokens, under the one format used for training, scoring and evaluation alike."""
        from trace_jax import encoding

        data = self.config.data
        ends = self._ends if data.append_stop else (None, None)
        return encoding.Encoder(
            self.tokenizer,
            max_length=data.max_length,
            end_id=ends[0],
            turn_end_id=ends[1],
            cut_responses=data.too_long == "cut",
        )

    @functools.cached_property
    def _ends(self) -> tuple[int, int]:
        """What ends a text, and an answer in a chat."""
        from trace_jax import encoding

        if self.config.model.stop_ids:
            return (self.config.model.stop_ids[0],) * 2
        return encoding.ends(self.tokenizer)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: the tokenizer's, the chat template's, those of the model."""
        from trace_jax.models import hf_weights

        if self.config.model.stop_ids:
            return tuple(self.config.model.stop_ids)
        of_model = hf_weights.read_config(self.base_directory).eos_token_ids
        return tuple(dict.fromkeys((*self._ends, *of_model)))

    @functools.cached_property
    def mesh(self):
        """The devices of the run, or None where it is one device of one process."""
        from trace_jax import sharding

        mesh = sharding.make_mesh(**self.config.mesh.to_dict())
        return None if mesh.size == 1 and processes.count() == 1 else mesh

    @contextlib.contextmanager
    def devices(self):
        """With the mesh in context, for everything that computes."""
        import jax

        if self.mesh is None:
            yield
            return
        with jax.set_mesh(self.mesh):
            yield

    def load_model(self, directory: Path):
        """A model in Hugging Face layout, on the mesh, in this run's dtype."""
        from trace_jax import models
        from trace_jax.models import hf_weights

        module = models.load(directory, dtype=self.activation_dtype, mesh=self.mesh)
        hf_weights.check_tokenizer(module.config, self.tokenizer)
        self._check_planned(module.config, directory)
        return self.as_configured(module)

    def check_base(self) -> None:
        """Raises InputError where the model given is not whole, not supported or not as planned.

        It reads headers alone: a wrong checkpoint is found before a judge is paid.
        """
        from trace_jax.models import hf_weights

        ref = self.config.model.ref_path
        for directory in (self.base_directory, *([remote.local(ref)] if ref else [])):
            found = hf_weights.check(directory)
            hf_weights.check_tokenizer(found, self.tokenizer)
            self._check_planned(found, directory)

    def _check_planned(self, found, directory: Path) -> None:
        from trace_jax import models

        planned = self.config.model.hf_config.to_dict()
        if planned:
            found.check_shape(models.ModelConfig.from_hf(planned), str(directory))

    def as_configured(self, module):
        """The module with this run's dtype, remat and head chunk, fit for this run's mesh."""
        from trace_jax import sharding

        if self.mesh is not None:
            sharding.check_model(self.mesh, module.config)
        module.dtype = self.activation_dtype
        module.remat = self.config.model.remat
        module.attention_block = self.config.model.attention_block
        module.head_chunk = self.config.model.head_chunk
        module.layer_rows = self.config.train.layer_rows
        return module

    def release_models(self) -> None:
        """Forgets loaded models: the next stage may need their memory, and loads what it needs."""
        for name in ("base", "ref"):
            self.__dict__.pop(name, None)

    @property
    def activation_dtype(self):
        import jax.numpy as jnp

        return jnp.dtype(self.config.model.dtype)

    @functools.cached_property
    def base(self):
        """The deployed model before it was aligned to the old policy."""
        return self.load_model(self.base_directory)

    @functools.cached_property
    def ref(self):
        """M_ref: aligned to the old policy."""
        return self.load_model(self.ref_directory) if self.has_ref else self.base

    @property
    def has_ref(self) -> bool:
        """Whether M_ref is another model than the base."""
        return bool(self.config.align.enabled or self.config.model.ref_path)

    @property
    def ref_directory(self) -> Path:
        """Hugging Face directory of M_ref."""
        if self.config.align.enabled:
            return self.file("align", "ref")
        if not self.has_ref:
            return self.base_directory
        return remote.local(self.config.model.ref_path)

    @functools.cached_property
    def trained(self):
        """The re-aligned model, from the newest checkpoint of stage train."""
        from trace_jax import fit

        return fit.restore(self.ref, self.settings("train"), self.file("train", "checkpoints"))

    def settings(self, section: str):
        """Training settings of a config section ("align", "train" or "model.scratch.training")."""
        from trace_jax import fit

        found = self.config
        for part in section.split("."):
            found = found[part]
        if section == "train" and found.method == "u2a" and self.config.u2a.inner == "ga":
            found = found.copy_and_resolve_references()
            found.drift = self.config.u2a.drift
        return fit.Settings.of(found, row_length=self.config.data.row_length, seed=self.config.seed)

    @functools.cached_property
    def prompts(self) -> list[dict]:
        """Held-out prompts: {"id", "prompt", "split"}."""
        return [row for _, row in records.read_jsonl(self.file("prepare", "prompts.jsonl"))]

    @functools.cached_property
    def triaged(self) -> list[records.TriagedRecord]:
        return triage.read(self.file("triage", "triage.jsonl"))

    @functools.cached_property
    def used(self) -> list[records.TriagedRecord]:
        """The triaged records that are scored and trained on: train.data_share of all."""
        share, n = self.config.train.data_share, len(self.triaged)
        if share == 1:
            return self.triaged
        rng = np.random.default_rng([self.config.train.data_seed, 0xDA7A])
        return [self.triaged[i] for i in sorted(rng.permutation(n)[: round(share * n)])]

    @functools.cached_property
    def fitting(self) -> list[records.TriagedRecord]:
        """The used records that fit data.max_length: all, unless data.too_long is drop."""
        from trace_jax import batches

        pairs = [
            methods.Example(r.id, "", r.prompt, r.chosen, r.rejected)
            for r in (t.record for t in self.used)
        ]
        dropped: list[str] = []
        batches.encode_examples(self.encoder, pairs, on_drop=self.on_drop(dropped))
        return [t for t in self.used if t.record.id not in set(dropped)]

    @functools.cached_property
    def corrections(self) -> dict[str, records.Text]:
        """Record id -> y_c."""
        rows = (row for _, row in records.read_jsonl(self.file("correct", "corrections.jsonl")))
        return {row["id"]: row["response"] for row in rows if row["response"] is not None}

    def on_drop(self, dropped: list[str]):
        """What to do with an example that is too long: None makes it an error."""
        return dropped.append if self.config.data.too_long == "drop" else None
