"""Qwen2-VL, and Tarsier2, which is a fine-tuned Qwen2-VL.

Three layouts of config.json are supported, without running code of a checkpoint:

* Tarsier2: `model_type: llava` around a `text_config` and a `vision_config` of type qwen2_vl. Either may lack fields
  (the defaults are Qwen2-VL-7B's) or contain the half of interest one level deeper.
* Qwen2-VL as released: decoder fields at the top level, `rope_scaling` and `rope_theta`.
* Qwen2-VL as transformers 5 writes it: decoder fields in `text_config`, with `rope_parameters`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tarsier_jax.config import ModelConfig, Qwen2VisionConfig, TextConfig
from tarsier_jax.errors import CheckpointError
from tarsier_jax.families.decoder import (
    DECODER_NAMES,
    IGNORED_DECODER_NAMES,
    check_problems,
    decoder_flops,
    head_problems,
    parse_text_config,
    text_json,
    unsupported,
)
from tarsier_jax.families.family import Family, Layout, NameTable
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.processor import load_processor

_MODEL_TYPES = ("qwen2_vl", "qwen2_vl_text", "qwen2_vl_vision")
_SUPPORTED = (
    "Qwen2-VL (model_type qwen2_vl) and Tarsier2 (model_type llava with a text_config and a vision_config of type "
    "qwen2_vl)"
)

LAYOUTS = {
    "tarsier2": Layout(
        "vision_tower.", "vision_tower.merger.", "language_model.model.", "language_model.lm_head.weight"
    ),
    "qwen2_vl_new": Layout("model.visual.", "model.visual.merger.", "model.language_model.", "lm_head.weight"),
    "qwen2_vl": Layout("visual.", "visual.merger.", "model.", "lm_head.weight"),
}

_VISION_NAMES: NameTable = (
    ("patch_embed", "patch_embed.proj", ("weight",)),
    ("blocks/norm1", "blocks.{}.norm1", ("weight", "bias")),
    ("blocks/norm2", "blocks.{}.norm2", ("weight", "bias")),
    ("blocks/attn/qkv", "blocks.{}.attn.qkv", ("weight", "bias")),
    ("blocks/attn/proj", "blocks.{}.attn.proj", ("weight", "bias")),
    ("blocks/mlp/fc1", "blocks.{}.mlp.fc1", ("weight", "bias")),
    ("blocks/mlp/fc2", "blocks.{}.mlp.fc2", ("weight", "bias")),
)
_MERGER_NAMES: NameTable = (
    ("merger/norm", "ln_q", ("weight", "bias")),
    ("merger/fc1", "mlp.0", ("weight", "bias")),
    ("merger/fc2", "mlp.2", ("weight", "bias")),
)


def is_qwen2_vl(raw: Mapping[str, Any]) -> bool:
    """Returns whether a config.json describes Qwen2-VL, or a Tarsier2 with at least one half of Qwen2-VL."""
    halves = (raw.get("text_config"), raw.get("vision_config"))
    types = [half.get("model_type") for half in halves if isinstance(half, Mapping)]
    return raw.get("model_type") == "qwen2_vl" or (
        raw.get("model_type") == "llava" and any(model_type in _MODEL_TYPES for model_type in types)
    )


def parse_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """Builds the configuration from the parsed content of a `config.json`; `source` names it in errors."""
    if raw["model_type"] == "llava":
        text, vision = _mapping(raw, "text_config", source), _mapping(raw, "vision_config", source)
        for name, part in (("text_config", text), ("vision_config", vision)):
            if part.get("model_type") not in _MODEL_TYPES:
                raise unsupported(f"{name}.model_type", part.get("model_type"), source, _SUPPORTED)
        tokens = {**text, **raw, "image_token_id": raw.get("image_token_index", text.get("image_token_id"))}
        tied = raw.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
        # Each half may be a complete Qwen2-VL config itself, with the half of interest one level deeper.
        text, vision = text.get("text_config") or text, vision.get("vision_config") or vision
    else:
        text, vision = raw.get("text_config") or raw, _mapping(raw, "vision_config", source)
        tied = raw.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
        tokens = {**text, **raw}
    text_config = parse_text_config(text, TextConfig(), bool(tied), source)
    vision_config = _vision_config(vision, text_config.hidden_size)
    _check(text_config, vision_config, source)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: int(tokens[name]) for name in names if tokens.get(name) is not None}
    return dataclasses.replace(ModelConfig(text=text_config, vision=vision_config), **ids)


def _mapping(raw: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    value = raw.get(key)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{source} lacks {key}, which Tarsier2 and Qwen2-VL need. Download the file again.")
    return value


def _vision_config(raw: Mapping[str, Any], decoder_width: int) -> Qwen2VisionConfig:
    default = Qwen2VisionConfig()
    return Qwen2VisionConfig(
        depth=raw.get("depth", default.depth),
        embed_dim=raw.get("embed_dim", default.embed_dim),
        num_heads=raw.get("num_heads", default.num_heads),
        mlp_ratio=raw.get("mlp_ratio", default.mlp_ratio),
        out_dim=decoder_width,  # a full Qwen2-VL config repeats the decoder's hidden_size here, or omits it
        in_channels=raw.get("in_channels", raw.get("in_chans", default.in_channels)),
        patch_size=raw.get("patch_size", default.patch_size),
        temporal_patch_size=raw.get("temporal_patch_size", default.temporal_patch_size),
        spatial_merge_size=raw.get("spatial_merge_size", default.spatial_merge_size),
        rope_theta=float((raw.get("rope_parameters") or {}).get("rope_theta", default.rope_theta)),
    )


def _check(text: TextConfig, vision: Qwen2VisionConfig, source: str) -> None:
    problems = head_problems(text)
    if 2 * sum(text.mrope_section) != text.head_dim:
        problems.append(f"mrope_section {text.mrope_section} does not sum to half the head width {text.head_dim}")
    if vision.embed_dim % (4 * vision.num_heads):
        problems.append(f"the vision width {vision.embed_dim} is not a multiple of 4 x {vision.num_heads} heads")
    check_problems(problems, source)


def config_json(config: ModelConfig, layout: str) -> dict[str, Any]:
    """Returns the content of a config.json for `layout`; `parse_config` reads it back."""
    text, vision = config.text, config.vision
    assert isinstance(vision, Qwen2VisionConfig)
    decoder = {
        "model_type": "qwen2_vl",
        **text_json(text),
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.mrope_section)},
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
    }
    tower = {
        "model_type": "qwen2_vl",
        "depth": vision.depth,
        "embed_dim": vision.embed_dim,
        "num_heads": vision.num_heads,
        "mlp_ratio": int(vision.mlp_ratio),
        "hidden_size": vision.out_dim,
        "in_channels": vision.in_channels,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "spatial_merge_size": vision.spatial_merge_size,
    }
    if layout != "tarsier2":
        return {"architectures": ["Qwen2VLForConditionalGeneration"], **decoder, "vision_config": tower}
    return {
        "architectures": ["TarsierForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token_id,
        "projection_head": None,
        "tie_word_embeddings": text.tie_embeddings,
        "text_config": decoder,
        "vision_config": tower,
    }


def preprocessor_json(raw: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """Returns a preprocessor_config.json whose pixel limits have the names that Qwen2-VL's loaders read."""
    size = raw.get("size") or {}
    if layout == "tarsier2" or "min_pixels" not in size:
        return dict(raw)
    return {**raw, "size": {"shortest_edge": size["min_pixels"], "longest_edge": size["max_pixels"]}}


def tensor_shape(path: tuple[Any, ...], shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """Returns the shape in a checkpoint of the tensor for a parameter, or for one layer of it."""
    vision = config.vision
    if "patch_embed" in path:  # a convolution in the checkpoint, a matrix here
        return (shape[0], vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    if "qkv" in path:  # [3 * E, ...] in the checkpoint; [3, E, ...] here, to split heads among devices
        return (shape[0] * shape[1], *shape[2:])
    return shape


def forward_flops(
    config: ModelConfig, tokens: int, token_pairs: int, patches: int, patch_pairs: int
) -> tuple[float, float]:
    """Returns the floating-point operations of the matrix products in a forward pass of (decoder, vision tower).

    Logits are not counted. Norms and softmax are not counted, as in the PaLM report (arXiv 2204.02311, appendix B).
    """
    vision = config.vision
    block = vision.embed_dim * (4 * vision.embed_dim + 2 * vision.mlp_dim)
    width = vision.embed_dim * vision.merge_factor
    merger = width * (width + vision.out_dim) / vision.merge_factor
    patch = vision.patch_dim * vision.embed_dim + vision.depth * block + merger
    tower = patch * patches + 2 * vision.depth * vision.embed_dim * patch_pairs
    return decoder_flops(config.text, tokens, token_pairs), 2 * tower


QWEN2_VL = Family(
    name="Tarsier2 or Qwen2-VL",
    supported=_SUPPORTED,
    vision_config=Qwen2VisionConfig,
    matches=is_qwen2_vl,
    parse_config=parse_config,
    config_json=config_json,
    preprocessor_json=preprocessor_json,
    model=Tarsier,
    layouts=LAYOUTS,
    peft_layout="qwen2_vl_new",
    vision_names=_VISION_NAMES,
    projector_names=_MERGER_NAMES,
    decoder_names=DECODER_NAMES,
    ignored_names=IGNORED_DECODER_NAMES,
    tensor_shape=tensor_shape,
    load_processor=load_processor,
    forward_flops=forward_flops,
)
