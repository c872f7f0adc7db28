"""Gemma-2-9B, re-aligned: `:full`, `:lora`, `:paper` or `:smoke`.

python -m trace_jax.launch --config=configs/gemma9b.py:lora --config.data.path=pairs.jsonl
    --config.policy.old=old.yaml --config.policy.new=new.yaml

Runs on 16 chips of v5e and more (`:full`), 8 chips of v5e or one 80 GB GPU (`:lora`).
Peak memory by `--plan`: docs/results/plans.json. Really run so far: `:smoke`, on 2 CPU cores; no
real weights and no accelerator yet.
"""

from trace_jax import backbones


def get_config(variant: str = "full"):
    """The run in one of the variants of trace_jax/backbones.py."""
    hf_config = {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": [1, 107],
        "pad_token_id": 0,
    }
    return backbones.variant(variant, path="google/gemma-2-9b-it", hf_config=hf_config)
