"""The parts of a family's record that depend on the decoder, which is that of Qwen2 or LLaMA in every family."""

from collections.abc import Mapping, Sequence
from typing import Any

from tarsier_jax.config import TextConfig
from tarsier_jax.errors import CheckpointError
from tarsier_jax.families.family import NameTable

DECODER_NAMES: NameTable = (
    ("embed", "embed_tokens", ("weight",)),
    ("layers/input_norm", "layers.{}.input_layernorm", ("weight",)),
    ("layers/post_norm", "layers.{}.post_attention_layernorm", ("weight",)),
    ("layers/attn/q", "layers.{}.self_attn.q_proj", ("weight", "bias")),
    ("layers/attn/k", "layers.{}.self_attn.k_proj", ("weight", "bias")),
    ("layers/attn/v", "layers.{}.self_attn.v_proj", ("weight", "bias")),
    ("layers/attn/o", "layers.{}.self_attn.o_proj", ("weight",)),
    ("layers/mlp/gate", "layers.{}.mlp.gate_proj", ("weight",)),
    ("layers/mlp/up", "layers.{}.mlp.up_proj", ("weight",)),
    ("layers/mlp/down", "layers.{}.mlp.down_proj", ("weight",)),
    ("norm", "norm", ("weight",)),
)

# transformers computes the rotary frequencies from the config; older checkpoints contain them.
IGNORED_DECODER_NAMES = (r".*\.rotary_emb\.inv_freq",)


def parse_text_config(raw: Mapping[str, Any], default: TextConfig, tied: bool, source: str) -> TextConfig:
    """Builds the configuration of a decoder.

    Args:
        raw: Fields with the names of a Hugging Face config.
        default: Values of missing fields.
        tied: Whether the output head is the embedding.
        source: Name of the file in errors.

    Raises:
        CheckpointError: the decoder has a part that is not supported.
    """
    if raw.get("use_sliding_window"):
        raise CheckpointError(f"{source}: use_sliding_window is true; sliding-window attention is not supported.")
    check_value(raw, "hidden_act", "silu", source)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise unsupported("rope type", kind, source, "default and mrope")
    hidden_size = raw.get("hidden_size", default.hidden_size)
    num_heads = raw.get("num_attention_heads", default.num_heads)
    return TextConfig(
        vocab_size=raw.get("vocab_size", default.vocab_size),
        hidden_size=hidden_size,
        mlp_dim=raw.get("intermediate_size", default.mlp_dim),
        num_layers=raw.get("num_hidden_layers", default.num_layers),
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads", default.num_kv_heads) or num_heads,
        head_dim=raw.get("head_dim") or hidden_size // num_heads,
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta", default.rope_theta)),
        mrope_section=tuple(rope.get("mrope_section", default.mrope_section)),
        norm_eps=raw.get("rms_norm_eps", default.norm_eps),
        tie_embeddings=tied,
        qkv_bias=default.qkv_bias,
    )


def text_json(text: TextConfig) -> dict[str, Any]:
    """Returns the fields of a Hugging Face config, without those of multimodal RoPE."""
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.mlp_dim,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "rms_norm_eps": text.norm_eps,
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": text.tie_embeddings,
    }


def check_value(raw: Mapping[str, Any], key: str, supported: Any, source: str) -> None:
    """Raises CheckpointError if a field is present with another value than the supported one."""
    if raw.get(key, supported) != supported:
        raise unsupported(key, raw[key], source, repr(supported))


def unsupported(key: str, value: Any, source: str, supported: str) -> CheckpointError:
    """Returns the error for a value of a config.json that is not supported."""
    return CheckpointError(f"{source}: {key} is {value!r}, which is not supported. Supported are {supported}.")


def head_problems(text: TextConfig) -> list[str]:
    """Returns the contradictions between the numbers of heads."""
    if text.num_heads % text.num_kv_heads == 0:
        return []
    return [f"{text.num_heads} attention heads do not divide among {text.num_kv_heads} key-value heads"]


def check_problems(problems: Sequence[str], source: str) -> None:
    """Raises CheckpointError if there are problems."""
    if problems:
        raise CheckpointError(f"{source} contradicts itself: {'; '.join(problems)}. Download the file again.")


def decoder_flops(text: TextConfig, tokens: int, token_pairs: int) -> float:
    """Returns the floating-point operations of the decoder's matrix products in a forward pass, without logits."""
    heads = (text.num_heads + text.num_kv_heads) * 2 * text.head_dim  # q, o and k, v
    layer = text.hidden_size * (heads + 3 * text.mlp_dim)
    return 2 * text.num_layers * (layer * tokens + 2 * text.num_heads * text.head_dim * token_pairs)
