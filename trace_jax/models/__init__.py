"""Language models in flax.nnx, read from and written to Hugging Face checkpoints. Imports jax."""

from trace_jax.models.decoder import Decoder, init
from trace_jax.models.hf_export import save, save_adapter
from trace_jax.models.hf_weights import load
from trace_jax.models.model_config import ModelConfig, scratch

__all__ = ["Decoder", "ModelConfig", "init", "load", "save", "save_adapter", "scratch"]
