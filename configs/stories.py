"""A real trained model (stories260k) and a children's-story publisher whose policy changes.

python -m trace_jax.launch --config=configs/stories.py --workdir=runs/stories
    --config.model.path=../shared/models/stories260k

2 CPU cores, a few minutes. Expect guarded compliance with the new policy of about 8 % for M_ref and
about 70 % re-aligned.
"""

from trace_jax import config


def get_config():
    """The stories run."""
    c = config.base_config()
    c.cpu_devices = 0
    c.data.source = "self_sampled"
    c.data.append_stop = False  # continuations are cut at 80 tokens, mostly before the story ends
    c.data.max_length = 128
    c.data.pairs = 2000
    c.data.openings = 1100
    c.model.stop_ids = (1, 2)  # this model ends a story with BOS
    c.policy.old = "stories_old"
    c.policy.new = "stories_new"
    c.align.total_steps = 100
    # The default of trace: the same here and in configs/quickstart.py.
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
