"""Variants of the configs of real backbones: full fine-tuning, LoRA, the paper's, a smoke run.

full    every parameter trains, fp32 master weights over mesh.fsdp (16 chips of v5e and more)
lora    adapters of rank 16 on every matrix; one 80 GB GPU or 8 chips of v5e
paper   the hyper-parameters of arXiv 2511.02623: LoRA of rank 32 on q and v, dual NPO
smoke   a 2-layer model of the same family, trained from scratch on SynthValueBench: minutes on
        2 CPU cores, no download
"""

import ml_collections

from trace_jax import config
from trace_jax.errors import InputError

VARIANTS = ("full", "lora", "paper", "smoke")


def variant(name: str, *, path: str, hf_config: dict) -> ml_collections.ConfigDict:
    """The config of one backbone in one variant; path is on the hub, or a local folder."""
    if name not in VARIANTS:
        raise InputError(f"variant {name!r} is unknown; use one of {', '.join(VARIANTS)}")
    c = config.base_config()
    if name == "smoke":
        return _smoke(c, hf_config["model_type"])
    c.model.path = path
    with c.unlocked():
        c.model.hf_config = hf_config
    c.model.dtype = "bfloat16"
    c.model.head_chunk = 128
    c.data.max_length = 512
    c.data.row_length = 1024
    c.policy.old, c.policy.new = "synth_old", "synth_new"  # give your own policies here
    c.align.enabled = False  # the model at model.path already follows the old policy
    c.evaluate.max_new_tokens = 256
    c.evaluate.batch_rows = 64
    c.impact.micro_rows = 4
    c.train.total_steps = 1000
    c.train.warmup_steps = 100
    c.train.examples_per_step = 32
    c.train.retain_per_step = 32
    {"full": _full, "lora": _lora, "paper": _paper}[name](c.train)
    if name == "paper":
        _paper_objective(c)
    return c


def _full(train: ml_collections.ConfigDict) -> None:
    train.micro_rows = 2  # one conflict row and one KL row a chip
    train.learning_rate = 1e-6
    train.mu_dtype = "bfloat16"


def _lora(train: ml_collections.ConfigDict) -> None:
    train.micro_rows = 2
    train.adapters = "lora"
    train.learning_rate = 2e-5


def _paper(train: ml_collections.ConfigDict) -> None:
    train.adapters = "lora"
    train.lora.rank, train.lora.alpha, train.lora.targets = 32, 16.0, "q,v"
    train.micro_rows = 2
    train.beta = 0.3
    train.alpha_kl = 0.1
    train.learning_rate = 1e-4
    train.weight_decay = 0.0
    train.clip_norm = 1.0
    train.examples_per_step = 12  # 1 x 4 accumulation x 3 GPUs; the paper mixes the three kinds
    train.retain_per_step = 12
    train.final_fraction = 0.0
    train.punish = "dual_npo"
    train.alpha_nll = 0.0
    train.retain_pairs = False


def _paper_objective(c: ml_collections.ConfigDict) -> None:
    c.seed = 42
    c.data.max_length = 256
    c.data.too_long = "drop"
    c.correct.source = "none"
    c.correct.max_new_tokens = 80
    c.evaluate.max_new_tokens = 192
    c.evaluate.temperature = 1.0
    c.impact.gold_size = 100
    c.impact.gold_beta = 0.3
    c.impact.normalisation = "sum_to_one"
    c.impact.strength = 1.0


def _smoke(c: ml_collections.ConfigDict, family: str) -> ml_collections.ConfigDict:
    """The quickstart's task, smaller."""
    c.data.source = "synth"
    c.data.max_length = 96
    c.data.pairs = 600
    c.data.validation_prompts = 50
    c.data.test_prompts = 100
    s = c.model.scratch
    s.family, s.layers, s.documents = family, 2, 4000
    s.training.total_steps = 150
    s.training.examples_per_step = 64
    s.training.learning_rate = 3e-3
    s.training.b2 = 0.98
    c.align.total_steps = 30
    c.train.total_steps = 50
    c.train.beta = 0.5
    c.impact.gold_size = 100
    return c
