"""The shape of a model: what config.json says, checked. Imports no jax."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from trace_jax import errors


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama-3.1's change to the RoPE frequencies, for contexts longer than it was trained on."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a model, under the names that Hugging Face's config.json uses.

    Attributes:
      family: "llama", "qwen2" or "gemma2" (config.json's model_type).
      sliding_window: of every other layer, from the first (Gemma 2).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Llama3Scaling | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    family: str = "llama"
    query_pre_attn_scalar: int | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise errors.InputError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise errors.InputError(
                f"head_dim={self.head_dim} is odd; RoPE rotates pairs, use an even one"
            )

    def check_shape(self, planned: Self, where: str) -> None:
        """Raises InputError where another config says other things of what is computed."""
        ids = ("bos_token_id", "eos_token_ids", "pad_token_id", "max_position_embeddings")
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(planned)
        other = [key for key in ours if key not in ids and ours[key] != theirs[key]]
        if other:
            key = other[0]
            raise errors.InputError(
                f"{where}: {key} is {ours[key]}, model.hf_config of the config says {theirs[key]}; "
                "give the model that the config is for, or mend the config"
            )

    def forward_flops(self, length: int) -> float:
        """Of the forward pass of one token in a row of `length` tokens, half of it seen."""
        q = self.num_attention_heads * self.head_dim
        kv = self.num_key_value_heads * self.head_dim
        matrices = self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size)
        attention = 2 * q * length / 2
        layers = self.num_hidden_layers * (matrices + attention)
        return 2.0 * (layers + self.hidden_size * self.vocab_size)

    @property
    def is_gemma(self) -> bool:
        """Gemma 2: norms of 1 + w before and after, scaled embeddings, GELU."""
        return self.family == "gemma2"

    @property
    def has_qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def query_scale(self) -> float:
        """What queries are multiplied with before they meet keys."""
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Self:
        """From config.json of transformers 4 or 5; InputError names what we cannot run."""
        family, defaults = _family(hf)
        hf = defaults | {k: v for k, v in hf.items() if v is not None or k in _NULL_IS_NONE}
        _check_values(family, hf)
        rope_theta, rope_scaling = _rope_from_hf(hf)
        heads = hf["num_attention_heads"]
        if not hf.get("head_dim") and hf["hidden_size"] % heads:
            raise errors.InputError(
                f"config.json: head_dim is missing, and hidden_size={hf['hidden_size']} is not a "
                f"multiple of num_attention_heads={heads}"
            )
        return cls(
            **{key: hf[key] for key in _REQUIRED},
            **{key: hf.get(key) for key in (_GEMMA2 if family == "gemma2" else ())},
            num_key_value_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=hf.get("tie_word_embeddings", False),
            bos_token_id=hf.get("bos_token_id"),
            eos_token_ids=id_tuple(hf.get("eos_token_id")),
            pad_token_id=hf.get("pad_token_id"),
            family=family,
        )

    def to_hf(self) -> dict[str, Any]:
        """For config.json. RoPE in the form of transformers 4, which 5 reads as well."""
        hf = {"architectures": [_ARCHITECTURES[self.family]], "model_type": self.family}
        hf |= _ONLY[self.family] | dataclasses.asdict(self)
        del hf["family"]
        if not self.is_gemma:
            for key in _GEMMA2:
                del hf[key]
        eos = list(hf.pop("eos_token_ids"))
        hf["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
        if self.rope_scaling is not None:
            hf["rope_scaling"] = {"rope_type": "llama3"} | hf["rope_scaling"]
        return {key: value for key, value in hf.items() if key != "quantization_config"}


def scratch(shape: Mapping[str, Any], vocab_size: int, **ids: Any) -> ModelConfig:
    """A small model of the shape that `model.scratch` of the config names."""
    of_family = {}
    if shape["family"] == "gemma2":  # windows of half the context, caps as in the real ones
        of_family = dict(zip(_GEMMA2, (None, 50.0, 30.0, shape["context"] // 2), strict=True))
        of_family["query_pre_attn_scalar"] = shape["hidden_size"] // shape["heads"]
    return ModelConfig(
        **of_family,
        family=shape["family"],
        vocab_size=vocab_size,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["hidden_size"] // shape["heads"],
        max_position_embeddings=shape["context"],
        tie_word_embeddings=True,
        **ids,
    )


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_GEMMA2 = (
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "sliding_window",
)
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}
# What config.json may leave out and means all the same, where the families differ.
_DEFAULTS = {
    "llama": {},
    "qwen2": {},
    "gemma2": {
        "head_dim": 256,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    },
}
# Of these null says that there is none; elsewhere it says as much as leaving the key out.
_NULL_IS_NONE = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
# Keys that change the computation in a way we do not offer: the one value that we run.
_ONLY = {
    "llama": {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"},
    "qwen2": {"hidden_act": "silu", "use_sliding_window": False},
    "gemma2": {
        "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh",
        "use_bidirectional_attention": False,
    },
}
_LARGEST = 2**31
_WHOLE = (*_REQUIRED, "num_key_value_heads", "head_dim", "sliding_window")
_REAL = (
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rms_norm_eps",
)


def _family(hf: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(family, what config.json means where it says nothing)."""
    family = str(hf.get("model_type"))
    names = hf.get("architectures") or _ARCHITECTURES.get(family)
    names = names if isinstance(names, list) else [names]
    if family not in _ARCHITECTURES or names != [_ARCHITECTURES[family]]:
        raise errors.InputError(
            f"config.json: architecture {', '.join(map(str, names))} (model_type {family}) is not "
            f"supported, only {', '.join(_ARCHITECTURES.values())} are"
        )
    return family, _DEFAULTS[family]


def _check_values(family: str, hf: dict[str, Any]) -> None:
    for key, only in (_ONLY[family] | {"quantization_config": None}).items():
        if hf.get(key, only) != only:
            raise errors.InputError(
                f"config.json: {key}={hf[key]!r} is not supported, only {only!r} is"
            )
    for key in (*_WHOLE, *_REAL):
        _check_positive(hf, key, whole=key in _WHOLE, required=key in _REQUIRED)
    if not isinstance(hf.get("tie_word_embeddings", False), bool):
        raise errors.InputError(
            f"config.json: tie_word_embeddings={hf['tie_word_embeddings']!r} is not true or false"
        )
    kinds = hf.get("layer_types")
    turn = ("sliding_attention", "full_attention") if family == "gemma2" else ("full_attention",)
    if kinds is not None and (
        not isinstance(kinds, list)
        or len(kinds) != hf["num_hidden_layers"]
        or any(kind != turn[n % len(turn)] for n, kind in enumerate(kinds))
    ):
        raise errors.InputError(
            f"config.json: layer_types={kinds} is not supported, only {', '.join(turn)} in turn "
            f"for {hf['num_hidden_layers']} layers is"
        )


def _check_positive(
    hf: Mapping[str, Any], key: str, *, whole: bool, required: bool, where: str = ""
) -> None:
    """A bool is no number; null stands where a key may be left out."""
    value = hf.get(key)
    if value is None and not required:
        return
    if type(value) not in ((int,) if whole else (int, float)) or not 0 < value < _LARGEST:
        kind = "integer" if whole else "number"
        raise errors.InputError(
            f"config.json: {where}{key}={value!r} is not a positive {kind} below 2^31"
        )


def id_tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    """Token ids as Hugging Face writes them: nothing, one, or several."""
    if ids is None:
        return ()
    ids = ids if isinstance(ids, list) else [ids]
    if any(type(i) is not int for i in ids):
        raise errors.InputError(f"eos_token_id={ids!r} is neither a token id nor a list of them")
    return tuple(ids)


def _rope_from_hf(hf: dict[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """(theta, scaling) from transformers 5's `rope_parameters` or 4's two keys."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise errors.InputError(f"config.json: the RoPE parameters {rope!r} are not an object")
    rope = {key: value for key, value in rope.items() if value is not None}
    rope.setdefault("rope_theta", hf.get("rope_theta", 10000.0))
    _check_positive(rope, "rope_theta", whole=False, required=True)
    theta = rope.pop("rope_theta")
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    if kind not in ("default", "llama3"):
        raise errors.InputError(
            f"config.json: RoPE type {kind!r} is not supported, only default and llama3 are"
        )
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise errors.InputError(
            "config.json: partial_rotary_factor is not supported, heads are rotated whole"
        )
    if kind == "default":
        return theta, None
    fields = [field.name for field in dataclasses.fields(Llama3Scaling)]
    for name in fields:
        _check_positive(rope, name, whole=False, required=True, where="llama3 RoPE scaling, ")
    if rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise errors.InputError(
            f"config.json: llama3 RoPE scaling, high_freq_factor={rope['high_freq_factor']} is not "
            f"above low_freq_factor={rope['low_freq_factor']}"
        )
    return theta, Llama3Scaling(**{name: rope[name] for name in fields})
