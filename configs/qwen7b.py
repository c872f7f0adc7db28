"""Qwen2.5-7B, re-aligned: `:full`, `:lora`, `:paper` or `:smoke`.

python -m trace_jax.launch --config=configs/qwen7b.py:lora --config.data.path=pairs.jsonl
    --config.policy.old=old.yaml --config.policy.new=new.yaml

Runs on 16 chips of v5e and more (`:full`), 8 chips of v5e or one 80 GB GPU (`:lora`).
Peak memory by `--plan`: docs/results/plans.json. Really run so far: `:smoke`, on 2 CPU cores; no
real weights and no accelerator yet.
"""

from trace_jax import backbones


def get_config(variant: str = "full"):
    """The run in one of the variants of trace_jax/backbones.py."""
    hf_config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 151643,
        "eos_token_id": [151645, 151643],
    }
    return backbones.variant(variant, path="Qwen/Qwen2.5-7B-Instruct", hf_config=hf_config)
