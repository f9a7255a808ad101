"""How each parameter of ours is called in a Hugging Face checkpoint: one table, three layouts, both directions.

Weights keep PyTorch's layout, so that a tensor and its parameter hold the same values in the same order; only their
shapes may differ, and one parameter holds the tensors of all layers.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from flax import nnx

from tarsier_jax.config import ModelConfig
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.sharding import parameter_path


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a checkpoint puts the vision tower, the decoder and the output head."""

    vision: str
    decoder: str
    lm_head: str


LAYOUTS = {
    "tarsier2": Layout("vision_tower.", "language_model.model.", "language_model.lm_head.weight"),
    "qwen2_vl_new": Layout("model.visual.", "model.language_model.", "lm_head.weight"),
    "qwen2_vl": Layout("visual.", "model.", "lm_head.weight"),
}

# Parts of our paths -> parts of theirs; {} is the number of the layer.
_VISION = (
    ("patch_embed", "patch_embed.proj", ("weight",)),
    ("blocks/norm1", "blocks.{}.norm1", ("weight", "bias")),
    ("blocks/norm2", "blocks.{}.norm2", ("weight", "bias")),
    ("blocks/attn/qkv", "blocks.{}.attn.qkv", ("weight", "bias")),
    ("blocks/attn/proj", "blocks.{}.attn.proj", ("weight", "bias")),
    ("blocks/mlp/fc1", "blocks.{}.mlp.fc1", ("weight", "bias")),
    ("blocks/mlp/fc2", "blocks.{}.mlp.fc2", ("weight", "bias")),
    ("merger/norm", "merger.ln_q", ("weight", "bias")),
    ("merger/fc1", "merger.mlp.0", ("weight", "bias")),
    ("merger/fc2", "merger.mlp.2", ("weight", "bias")),
)
_DECODER = (
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

# Tensors that a checkpoint may hold and that no parameter takes.
IGNORED = {r".*\.rotary_emb\.inv_freq": "rotary frequencies are computed from the config"}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One of our parameters, and the tensors that it is made of, one a layer (or one, without layers)."""

    path: tuple[Any, ...]
    shape: tuple[int, ...]  # with the layer dimension, where there is one
    stacked: bool
    names: tuple[str, ...]
    tensor_shape: tuple[int, ...]  # of each tensor, in the checkpoint


def abstract_state(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure and the shapes of its parameters; takes no memory."""
    return nnx.split(nnx.eval_shape(lambda: Tarsier(config, nnx.Rngs(0))))


def parameters(config: ModelConfig, layout: str) -> list[Parameter]:
    """Every parameter of the model, with the names that `layout` gives its tensors."""
    _, state = abstract_state(config)
    names = _templates(LAYOUTS[layout])
    found = []
    for path, leaf in nnx.to_flat_state(state):
        template = names[parameter_path(path)]
        stacked = "{}" in template
        per_layer = leaf.shape[1:] if stacked else leaf.shape
        tensors = tuple(template.format(i) for i in range(leaf.shape[0])) if stacked else (template,)
        found.append(Parameter(path, leaf.shape, stacked, tensors, _tensor_shape(path, per_layer, config)))
    return found


def _templates(layout: Layout) -> dict[str, str]:
    table = {"decoder/lm_head/weight": layout.lm_head}
    for tower, prefix, rows in (("vision", layout.vision, _VISION), ("decoder", layout.decoder, _DECODER)):
        for ours, theirs, kinds in rows:
            table |= {f"{tower}/{ours}/{kind}": f"{prefix}{theirs}.{kind}" for kind in kinds}
    return table


def _tensor_shape(path: tuple[Any, ...], shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    vision = config.vision
    if "patch_embed" in path:  # a convolution there, a matrix here
        return (shape[0], vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    if "qkv" in path:  # [3 * E, ...] there, [3, E, ...] here, so that heads can be split among devices
        return (shape[0] * shape[1], *shape[2:])
    return shape


def detect_layout(names: Iterable[str]) -> str | None:
    """The layout whose vision tower a checkpoint's tensors name, or None."""
    names = list(names)
    return next((key for key, layout in LAYOUTS.items() if any(n.startswith(layout.vision) for n in names)), None)
