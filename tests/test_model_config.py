import dataclasses
import json

import pytest
import transformers

from trace_jax import errors, models
from trace_jax.models import model_config

TINY = models.ModelConfig(61, 24, 40, 3, 4, 2, 6, 64)
GEMMA = dataclasses.replace(
    TINY, family="gemma2", tie_word_embeddings=True, sliding_window=8, query_pre_attn_scalar=9,
    attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
)  # fmt: skip
HF = TINY.to_hf()
QWEN2 = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"])
GEMMA2 = dict(model_type="gemma2", architectures=["Gemma2ForCausalLM"])
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)


def test_config_survives_the_round_trip():
    scaled = dataclasses.replace(TINY, rope_scaling=model_config.Llama3Scaling(8.0, 1.0, 4.0, 32))
    full = dataclasses.replace(scaled, bos_token_id=1, eos_token_ids=(2, 3), rope_theta=5e5)
    qwen2 = dataclasses.replace(full, rope_scaling=None, family="qwen2")
    for config in (TINY, scaled, full, qwen2, GEMMA):
        assert models.ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_both_forms_of_rope_say_the_same():
    old = models.ModelConfig.from_hf(HF | dict(rope_theta=5e5, rope_scaling=LLAMA3))
    plain = {key: HF[key] for key in HF if not key.startswith("rope")}
    new = models.ModelConfig.from_hf(plain | dict(rope_parameters=LLAMA3 | dict(rope_theta=5e5)))
    assert old == new
    assert new.rope_theta == 5e5 and new.rope_scaling.factor == 8.0


def test_absent_keys_are_derived():
    short = {key: HF[key] for key in HF if key not in ("head_dim", "num_key_value_heads")}
    config = models.ModelConfig.from_hf(short)
    assert (config.head_dim, config.num_key_value_heads) == (6, 4)


UNSAID = {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}


@pytest.mark.parametrize("key", UNSAID)
def test_what_gemma_leaves_unsaid_is_what_transformers_assumes(key):
    """A cap or a window that is null is off; one that is absent has the default."""
    short = {k: v for k, v in GEMMA.to_hf().items() if k != key}
    assert getattr(models.ModelConfig.from_hf(short), key) == UNSAID[key]
    is_off = key.endswith(("softcapping", "window"))
    null = models.ModelConfig.from_hf(short | {key: None})
    assert getattr(null, key) == (None if is_off else UNSAID[key])


def test_the_defaults_of_gemma_are_those_of_transformers():
    assert UNSAID == {key: getattr(transformers.Gemma2Config(), key) for key in UNSAID}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="mistral", architectures=["MistralForCausalLM"]), "MistralForCausalLM"),
        (dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (dict(architectures="MistralForCausalLM"), "architecture MistralForCausalLM "),
        (dict(model_type=["llama"]), r"model_type \['llama'\]"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(mlp_bias=True), "mlp_bias"),
        (dict(hidden_act="gelu"), "gelu"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor"),
        (dict(quantization_config=dict(bits=4)), "quantization_config"),
        (dict(layer_types=["sliding_attention"] * 3), "layer_types.* only full_attention"),
        (QWEN2 | dict(use_sliding_window=True), "use_sliding_window"),
        (QWEN2 | dict(layer_types=["sliding_attention"] * 3), "layer_types"),
        (QWEN2 | dict(architectures=["Qwen2ForTokenClassification"]), "Qwen2ForTokenClass"),
        (GEMMA2 | dict(hidden_activation="gelu"), "hidden_activation"),
        (GEMMA2 | dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
        (GEMMA2 | dict(layer_types=["full_attention"] * 3), "layer_types"),
        (GEMMA2 | dict(layer_types=["sliding_attention"]), "layer_types.* for 3 layers"),
        (dict(model_type="gemma3_text", architectures=["Gemma3ForCausalLM"]), "Gemma3ForCausalLM"),
    ],
)
def test_what_we_cannot_run_is_refused_by_name(change, message):
    with pytest.raises(errors.InputError, match=message):
        models.ModelConfig.from_hf(HF | change)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_other_rope_types_are_refused_by_name(kind, key):
    with pytest.raises(errors.InputError, match=f"RoPE type '{kind}' is not supported"):
        models.ModelConfig.from_hf(HF | dict(rope_scaling={key: kind, "factor": 2.0}))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(head_dim=5), "head_dim"),
        (dict(head_dim=0), "head_dim=0 is not a positive integer"),
        (dict(head_dim="6"), "head_dim='6'"),
        (dict(head_dim=None, hidden_size=25), "head_dim"),
        (dict(num_key_value_heads=3), "num_key_value_heads"),
        (dict(num_key_value_heads="2"), "num_key_value_heads='2'"),
        (dict(num_key_value_heads=-2), "num_key_value_heads=-2"),
        (dict(vocab_size=None), "vocab_size"),
        (dict(num_hidden_layers="three"), "num_hidden_layers"),
        (dict(num_hidden_layers=True), "num_hidden_layers=True"),
        (dict(rms_norm_eps="1e-6"), "rms_norm_eps='1e-6' is not a positive number"),
        (dict(rope_theta="x"), "rope_theta='x'"),
        (dict(tie_word_embeddings="false"), "tie_word_embeddings='false'"),
        (dict(eos_token_id="2"), "eos_token_id"),
        (dict(rope_scaling="llama3"), "RoPE parameters 'llama3' are not an object"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=2.0)), "low_freq_factor"),
        (dict(rope_scaling=LLAMA3 | dict(factor="8")), "llama3 RoPE scaling, factor='8'"),
        (dict(rope_scaling=LLAMA3 | dict(high_freq_factor=1.0)), "not above low_freq_factor=1.0"),
        (GEMMA2 | dict(sliding_window=0), "sliding_window=0"),
        (GEMMA2 | dict(attn_logit_softcapping="5"), "attn_logit_softcapping='5'"),
        (GEMMA2 | dict(query_pre_attn_scalar=0), "query_pre_attn_scalar=0"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(change, message):
    with pytest.raises(errors.InputError, match=message):
        models.ModelConfig.from_hf(HF | change)
