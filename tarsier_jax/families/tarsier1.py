"""The first Tarsier: CLIP's vision tower, a projector, and a LLaMA or Qwen2 decoder.

config.json is that of LLaVA (`model_type: llava`) with the ids of the newline and new-image embeddings. A missing field
has the default of its Hugging Face class: the only size in Tarsier-7b's `text_config` is `vocab_size`, and the others
are those of LLaMA-7B.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tarsier_jax.config import ClipVisionConfig, ModelConfig, TextConfig
from tarsier_jax.families.decoder import (
    DECODER_NAMES,
    IGNORED_DECODER_NAMES,
    check_problems,
    check_value,
    decoder_flops,
    head_problems,
    parse_text_config,
    text_json,
    unsupported,
)
from tarsier_jax.families.family import Family, Layout, NameTable
from tarsier_jax.models.tarsier import Tarsier1
from tarsier_jax.processing.tarsier1 import load_processor

_SUPPORTED = (
    "the first Tarsier (model_type llava with a text_config of type llama or qwen2 and a vision_config of type "
    "clip_vision_model, but not the architecture LlavaForConditionalGeneration, which lacks newline embeddings)"
)

LAYOUTS = {
    "tarsier": Layout(
        "vision_tower.vision_model.",
        "multi_modal_projector.",
        "language_model.model.",
        "language_model.lm_head.weight",
    ),
}

_VISION_NAMES: NameTable = (
    ("embeddings", "embeddings", ("class_embedding",)),
    ("embeddings/position_embedding", "embeddings.position_embedding", ("weight",)),
    ("patch_embed", "embeddings.patch_embedding", ("weight",)),
    ("pre_norm", "pre_layrnorm", ("weight", "bias")),
    ("post_norm", "post_layernorm", ("weight", "bias")),
    ("blocks/norm1", "encoder.layers.{}.layer_norm1", ("weight", "bias")),
    ("blocks/norm2", "encoder.layers.{}.layer_norm2", ("weight", "bias")),
    ("blocks/attn/q", "encoder.layers.{}.self_attn.q_proj", ("weight", "bias")),
    ("blocks/attn/k", "encoder.layers.{}.self_attn.k_proj", ("weight", "bias")),
    ("blocks/attn/v", "encoder.layers.{}.self_attn.v_proj", ("weight", "bias")),
    ("blocks/attn/proj", "encoder.layers.{}.self_attn.out_proj", ("weight", "bias")),
    ("blocks/mlp/fc1", "encoder.layers.{}.mlp.fc1", ("weight", "bias")),
    ("blocks/mlp/fc2", "encoder.layers.{}.mlp.fc2", ("weight", "bias")),
)
_PROJECTOR_NAMES: NameTable = (
    ("projector/linear_1", "linear_1", ("weight", "bias")),
    ("projector/linear_2", "linear_2", ("weight", "bias")),
    ("projector/norm", "mlp.0", ("weight", "bias")),
    ("projector/fc1", "mlp.1", ("weight", "bias")),
    ("projector/fc2", "mlp.3", ("weight", "bias")),
)

# The numbers 0, 1, 2, ... of the positions, which older versions of transformers store.
_IGNORED_NAMES = (r"vision_tower\.vision_model\.embeddings\.position_ids", *IGNORED_DECODER_NAMES)

_PROJECTIONS = {"MLP": 1, "Pixel_Shuffle": 2}  # projection_head -> patches per side that are joined

# Defaults of LlamaConfig and Qwen2Config.
_TEXT_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,  # as many as attention heads
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
    },
    "qwen2": {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
    },
}
# Defaults of CLIPVisionConfig.
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-5,
}
# The vision tower without a vision_config: CLIP ViT-L/14-336. Default of LlavaConfig.
_VIT_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def is_tarsier1(raw: Mapping[str, Any]) -> bool:
    """Returns whether a config.json describes the first Tarsier."""
    # LLaVA itself has the same configuration, without newline and new-image embeddings.
    if raw.get("model_type") != "llava" or "LlavaForConditionalGeneration" in (raw.get("architectures") or ()):
        return False
    text, vision = raw.get("text_config") or {}, raw.get("vision_config") or {}
    return (
        isinstance(text, Mapping)
        and isinstance(vision, Mapping)
        and text.get("model_type", "llama") in _TEXT_DEFAULTS
        and vision.get("model_type", "clip_vision_model") == "clip_vision_model"
    )


def parse_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """Builds the configuration from the parsed content of a `config.json`; `source` names it in errors."""
    projection = raw.get("projection_head", "MLP")
    if projection not in _PROJECTIONS:
        raise unsupported("projection_head", projection, source, " and ".join(_PROJECTIONS))
    if projection == "MLP":  # the other projector does not read it
        check_value(raw, "projector_hidden_act", "gelu", source)
    check_value(raw, "vision_feature_select_strategy", "default", source)
    text = _text_config(raw.get("text_config") or {}, source)
    tower = raw.get("vision_config")
    vision = _vision_config(_VIT_L_336 if tower is None else tower, text.hidden_size, source)
    vision = dataclasses.replace(
        vision, spatial_merge_size=_PROJECTIONS[projection], feature_layer=raw.get("vision_feature_layer", -2)
    )
    image_token_id = raw.get("image_token_index", 32_000)
    config = ModelConfig(
        text,
        vision,
        image_token_id=image_token_id,
        video_token_id=image_token_id,
        vision_start_token_id=None,
        vision_end_token_id=None,
        image_newline_id=raw.get("image_newline_idx", 32_002),
        image_new_id=raw.get("image_new_idx", 32_003),
    )
    _check(text, vision, config, source)
    return config


def _text_config(raw: Mapping[str, Any], source: str) -> TextConfig:
    model_type = raw.get("model_type", "llama")
    for key in ("attention_bias", "mlp_bias"):
        check_value(raw, key, False, source)
    tied = bool(raw.get("tie_word_embeddings", False))  # the field at the top level is ignored, as in the original
    text = parse_text_config({**_TEXT_DEFAULTS[model_type], **raw}, TextConfig(), tied, source)
    return dataclasses.replace(text, mrope_section=(text.head_dim // 2, 0, 0), qkv_bias=model_type == "qwen2")


def _vision_config(raw: Mapping[str, Any], decoder_width: int, source: str) -> ClipVisionConfig:
    check_value(raw, "hidden_act", "quick_gelu", source)
    raw = {**_VISION_DEFAULTS, **raw}
    return ClipVisionConfig(
        depth=raw["num_hidden_layers"],
        embed_dim=raw["hidden_size"],
        num_heads=raw["num_attention_heads"],
        out_dim=decoder_width,
        in_channels=raw["num_channels"],
        patch_size=raw["patch_size"],
        norm_eps=raw["layer_norm_eps"],
        image_size=raw["image_size"],
        intermediate_size=raw["intermediate_size"],
    )


def _check(text: TextConfig, vision: ClipVisionConfig, config: ModelConfig, source: str) -> None:
    problems = head_problems(text)
    if vision.embed_dim % vision.num_heads:
        problems.append(f"the vision width {vision.embed_dim} is not a multiple of {vision.num_heads} heads")
    if vision.image_size % vision.patch_size:
        problems.append(f"image_size {vision.image_size} is not a multiple of patch_size {vision.patch_size}")
    if not isinstance(vision.feature_layer, int) or not -vision.depth <= vision.feature_layer <= -1:
        problems.append(f"vision_feature_layer {vision.feature_layer} is not between -{vision.depth} and -1")
    if vision.grid_size % vision.spatial_merge_size:
        problems.append(f"{vision.grid_size} patches per side cannot be joined by {vision.spatial_merge_size}")
    for name, i in _token_ids(config).items():
        if not 0 <= i < text.vocab_size:
            problems.append(f"{name} {i} is not a row of the {text.vocab_size} embeddings")
    check_problems(problems, source)


def _token_ids(config: ModelConfig) -> dict[str, Any]:
    return {
        "image_token_index": config.image_token_id,
        "image_newline_idx": config.image_newline_id,
        "image_new_idx": config.image_new_id,
    }


def config_json(config: ModelConfig, layout: str) -> dict[str, Any]:
    """Returns the content of a config.json; `parse_config` reads it back. There is one layout."""
    del layout
    text, vision = config.text, config.vision
    assert isinstance(vision, ClipVisionConfig)
    projections = {merge: name for name, merge in _PROJECTIONS.items()}
    return {
        "architectures": ["TarsierForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        **_token_ids(config),
        "projection_head": projections[vision.spatial_merge_size],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": "default",
        "text_config": {"model_type": "qwen2" if text.qkv_bias else "llama", **text_json(text)},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.embed_dim,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.num_heads,
            "num_channels": vision.in_channels,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": vision.norm_eps,
            "hidden_act": "quick_gelu",
        },
    }


def preprocessor_json(raw: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """Returns the content of a preprocessor_config.json as it is. There is one layout."""
    del layout
    return dict(raw)


def tensor_shape(path: tuple[Any, ...], shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """Returns the shape in a checkpoint of the tensor for a parameter, or for one layer of it."""
    vision = config.vision
    if "patch_embed" in path:  # a convolution in the checkpoint, a matrix here
        return (shape[0], vision.in_channels, vision.patch_size, vision.patch_size)
    return shape


def forward_flops(
    config: ModelConfig, tokens: int, token_pairs: int, patches: int, patch_pairs: int
) -> tuple[float, float]:
    """Returns the floating-point operations of the matrix products in a forward pass of (decoder, vision tower).

    Logits are not counted. Norms and softmax are not counted, as in the PaLM report (arXiv 2204.02311, appendix B). The
    blocks that are not run are not counted, the class token of each frame is.
    """
    vision = config.vision
    assert isinstance(vision, ClipVisionConfig)
    with_class = (vision.num_patches + 1) / vision.num_patches
    E, width = vision.embed_dim, vision.embed_dim * vision.merge_factor
    block = E * (4 * E + 2 * vision.mlp_dim) * with_class * patches + 2 * E * with_class**2 * patch_pairs
    projector = vision.out_dim * (width + vision.out_dim) * vision.num_tokens(patches)
    tower = vision.patch_dim * E * patches + vision.num_blocks * block + projector
    return decoder_flops(config.text, tokens, token_pairs), 2 * tower


TARSIER1 = Family(
    name="first Tarsier",
    supported=_SUPPORTED,
    vision_config=ClipVisionConfig,
    matches=is_tarsier1,
    parse_config=parse_config,
    config_json=config_json,
    preprocessor_json=preprocessor_json,
    model=Tarsier1,
    layouts=LAYOUTS,
    peft_layout="tarsier",
    vision_names=_VISION_NAMES,
    projector_names=_PROJECTOR_NAMES,
    decoder_names=DECODER_NAMES,
    ignored_names=_IGNORED_NAMES,
    tensor_shape=tensor_shape,
    load_processor=load_processor,
    forward_flops=forward_flops,
)
