"""Model configuration: frozen dataclasses, read from a checkpoint's `config.json` and from nothing else.

Three layouts are understood; none of them ever runs code that a checkpoint brings:

* Tarsier2: `model_type: llava` around a `text_config` and a `vision_config` of type qwen2_vl. Either may lack fields
  (the defaults are Qwen2-VL-7B's) or nest the part that matters one level deeper.
* Qwen2-VL as released: decoder fields at the top level, `rope_scaling` and `rope_theta`.
* Qwen2-VL as transformers 5 writes it: decoder fields in `text_config`, with `rope_parameters`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tarsier_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The Qwen2-VL vision transformer and its patch merger. Defaults are those of Qwen2-VL-7B (and 2B, 72B)."""

    depth: int = 32
    embed_dim: int = 1280
    num_heads: int = 16
    mlp_ratio: float = 4.0
    out_dim: int = 3584  # the decoder's width; `hidden_size` in config.json
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    @property
    def patch_dim(self) -> int:
        """Values in one flattened patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def merge_factor(self) -> int:
        """Patches that the merger joins into one token."""
        return self.spatial_merge_size**2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The Qwen2 decoder. Defaults are those of Qwen2-VL-7B."""

    vocab_size: int = 152_064
    hidden_size: int = 3584
    mlp_dim: int = 18_944
    num_layers: int = 28
    num_heads: int = 28
    num_kv_heads: int = 4
    head_dim: int = 128
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, ...] = (16, 24, 24)  # frequencies turned by time, height and width, in turn
    norm_eps: float = 1e-6
    tie_embeddings: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole model: what the checkpoint fixes, and how this process runs it.

    `dtype` is what matrix products are computed in; angles, norms, softmax and logits are float32 whatever it says.
    `attention` is one of `tarsier_jax.models.attention.IMPLEMENTATIONS`. `remat` is what the backward pass recomputes:
    "none", "full" (keep only each layer's input) or "dots" (keep matrix products too).
    """

    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
    image_token_id: int = 151_655
    video_token_id: int = 151_656
    vision_start_token_id: int = 151_652
    vision_end_token_id: int = 151_653
    dtype: str = "float32"
    param_dtype: str = "float32"
    attention: str = "xla"
    remat: str = "none"


def load_config(directory: str | Path) -> ModelConfig:
    """Reads `config.json` of a Hugging Face directory.

    Raises:
        CheckpointError: the file is missing, is not JSON, or describes a model that is not supported.
    """
    path = Path(directory) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist. Give the directory of a Hugging Face checkpoint.") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read as JSON ({e}). Download the file again.") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds no JSON object. Download the file again.")
    return parse_config(raw, source=str(path))


def parse_config(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Builds the configuration from the parsed content of a `config.json`; `source` names it in errors."""
    model_type = raw.get("model_type")
    if model_type == "llava":
        text, vision = _mapping(raw, "text_config", source), _mapping(raw, "vision_config", source)
        for name, part in (("text_config", text), ("vision_config", vision)):
            if part.get("model_type") not in ("qwen2_vl", "qwen2_vl_text", "qwen2_vl_vision"):
                raise _unsupported(f"{name}.model_type", part.get("model_type"), source)
        tokens = {**text, **raw, "image_token_id": raw.get("image_token_index", text.get("image_token_id"))}
        tied = raw.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
        # Each half may be a complete Qwen2-VL config of its own, with the wanted half one level down.
        text, vision = text.get("text_config") or text, vision.get("vision_config") or vision
    elif model_type == "qwen2_vl":
        text, vision = raw.get("text_config") or raw, _mapping(raw, "vision_config", source)
        tied = raw.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
        tokens = {**text, **raw}
    else:
        raise _unsupported("model_type", model_type, source)
    text_config = _text_config(text, bool(tied), source)
    vision_config = _vision_config(vision, text_config.hidden_size)
    _check(text_config, vision_config, source)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: int(tokens[name]) for name in names if tokens.get(name) is not None}
    return dataclasses.replace(ModelConfig(text=text_config, vision=vision_config), **ids)


def _mapping(raw: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    value = raw.get(key)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{source} has no {key}. A Tarsier2 or Qwen2-VL config.json holds one; copy it again.")
    return value


def _unsupported(key: str, value: Any, source: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: {key} is {value!r}, which is not supported. Supported are Qwen2-VL (model_type qwen2_vl) and "
        "Tarsier2 (model_type llava with a text_config and a vision_config of type qwen2_vl)."
    )


def _text_config(raw: Mapping[str, Any], tied: bool, source: str) -> TextConfig:
    if raw.get("use_sliding_window"):
        raise CheckpointError(f"{source}: use_sliding_window is true; sliding-window attention is not supported.")
    if raw.get("hidden_act", "silu") != "silu":
        raise _unsupported("hidden_act", raw["hidden_act"], source)
    default = TextConfig()
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise _unsupported("rope type", kind, source)
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
    )


def _vision_config(raw: Mapping[str, Any], decoder_width: int) -> VisionConfig:
    default = VisionConfig()
    return VisionConfig(
        depth=raw.get("depth", default.depth),
        embed_dim=raw.get("embed_dim", default.embed_dim),
        num_heads=raw.get("num_heads", default.num_heads),
        mlp_ratio=raw.get("mlp_ratio", default.mlp_ratio),
        out_dim=decoder_width,  # a full Qwen2-VL config repeats the decoder's hidden_size here, or leaves it out
        in_channels=raw.get("in_channels", raw.get("in_chans", default.in_channels)),
        patch_size=raw.get("patch_size", default.patch_size),
        temporal_patch_size=raw.get("temporal_patch_size", default.temporal_patch_size),
        spatial_merge_size=raw.get("spatial_merge_size", default.spatial_merge_size),
        rope_theta=float((raw.get("rope_parameters") or {}).get("rope_theta", default.rope_theta)),
    )


def _check(text: TextConfig, vision: VisionConfig, source: str) -> None:
    problems = []
    if text.num_heads % text.num_kv_heads:
        problems.append(f"{text.num_heads} attention heads do not divide among {text.num_kv_heads} key-value heads")
    if 2 * sum(text.mrope_section) != text.head_dim:
        problems.append(f"mrope_section {text.mrope_section} does not sum to half the head width {text.head_dim}")
    if vision.embed_dim % (4 * vision.num_heads):
        problems.append(f"the vision width {vision.embed_dim} is no multiple of 4 x {vision.num_heads} heads")
    if problems:
        raise CheckpointError(f"{source} contradicts itself: {'; '.join(problems)}. Download the file again.")
