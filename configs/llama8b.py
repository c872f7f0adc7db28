"""Llama-3.1-8B, re-aligned: `:full`, `:lora`, `:paper` or `:smoke`.

python -m trace_jax.launch --config=configs/llama8b.py:lora --config.data.path=pairs.jsonl
    --config.policy.old=old.yaml --config.policy.new=new.yaml

Runs on 16 chips of v5e and more (`:full`), 8 chips of v5e or one 80 GB GPU (`:lora`).
Peak memory by `--plan`: docs/results/plans.json. Really run so far: `:smoke`, on 2 CPU cores; no
real weights and no accelerator yet.
"""

from trace_jax import backbones


def get_config(variant: str = "full"):
    """The run in one of the variants of trace_jax/backbones.py."""
    hf_config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
    }
    return backbones.variant(variant, path="meta-llama/Llama-3.1-8B-Instruct", hf_config=hf_config)
