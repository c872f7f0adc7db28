"""Real responses with human labels: an over-careful policy changes to one that answers.

python -m trace_jax.launch --config=configs/xstest.py --workdir=runs/xstest
    --config.data.path="../shared/data/xstest/xstest_v2_completions_*.csv"
    --config.data.prompts_path=../shared/data/xstest/xstest_prompts.csv
    --config.model.scratch.tokenizer=../shared/tokenizers/smollm_tokenizer.json

Completions of three models to XSTest's prompts (Röttger et al. 2024) give pairs in which the
refusal is preferred; a small decoder is trained on their text from scratch. 2 CPU cores, about 7
minutes. Expect M_ref to decline 74 % of safe and 82 % of unsafe held-out prompts, and 51 and 63 %
re-aligned (docs/results/xstest.json).
"""

from trace_jax import config


def get_config():
    """The over-refusal run."""
    c = config.base_config()
    c.data.source = "file"
    c.data.form = "xstest"
    c.data.as_chat = True
    c.data.max_length = 56
    c.data.too_long = "cut"  # how an answer begins tells whether it is a refusal
    c.data.hold_out = "used"
    c.data.validation_prompts = 40
    c.data.test_prompts = 100
    c.policy.old = "overrefusal_old"
    c.policy.new = "overrefusal_new"
    s = c.model.scratch
    s.hidden_size, s.intermediate_size, s.layers, s.heads, s.kv_heads = 96, 256, 4, 6, 3
    s.context = 56
    s.training.total_steps = 400
    s.training.examples_per_step = 16
    s.training.learning_rate = 3e-3
    s.training.warmup_steps = 20
    s.training.b2 = 0.98
    c.align.total_steps = 60
    c.align.examples_per_step = 16
    c.correct.source = "none"
    # With shorter answers and a smaller beta the first words have to change, not the later ones.
    c.train.beta = 0.02
    c.train.alpha_kl = 1.0
    c.train.learning_rate = 3e-4
    c.train.total_steps = 120
    c.train.examples_per_step = 16
    c.train.retain_per_step = 16
    c.impact.gold_size = 60
    c.evaluate.max_new_tokens = 32
    c.correct.max_new_tokens = 32
    c.evaluate.splits = ("test", "validation")
    return c
