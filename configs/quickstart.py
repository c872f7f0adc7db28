"""SynthValueBench, a decoder trained from scratch, one policy change: TRACE without a download.

python -m trace_jax.launch --config=configs/quickstart.py --workdir=runs/quickstart

2 to 5 minutes on 2 cores. Expect guarded compliance with the new policy of about 40 % for
M_ref and 78 % re-aligned.
"""

from trace_jax import config


def get_config():
    """The quickstart run."""
    c = config.base_config()
    c.cpu_devices = 0
    c.data.source = "synth"
    c.data.max_length = 96
    c.data.pairs = 3000
    c.data.validation_prompts = 150
    c.data.test_prompts = 300
    c.model.scratch.training.total_steps = 400
    c.model.scratch.training.examples_per_step = 64
    c.model.scratch.training.learning_rate = 3e-3
    c.model.scratch.training.warmup_steps = 30
    c.model.scratch.training.b2 = 0.98
    c.align.total_steps = 60
    # The default of trace: the same here and in configs/stories.py.
    c.train.learning_rate = 2e-4
    c.train.beta = 0.05
    c.train.total_steps = 150
    c.train.retain_per_step = 8
    c.train.keep_best = True
    c.train.patience = 2
    c.train.evaluate_every = 15
    c.train.evaluate_prompts = 100
    c.evaluate.splits = ("test", "validation")
    return c
