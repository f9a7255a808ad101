"""The record of one model family: the code and the tables that depend on the architecture of a checkpoint."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tarsier_jax.config import ModelConfig
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.processor import Processor

# Rows of (part of a parameter's path, part of a tensor's name, kinds such as "weight"); {} is the number of the layer.
NameTable = tuple[tuple[str, str, tuple[str, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Prefixes of the names of tensors in one layout of checkpoints.

    Attributes:
        vision: Prefix of the vision tower.
        projector: Prefix of the projector, which may be a part of the vision tower.
        decoder: Prefix of the decoder.
        lm_head: Full name of the output head.
    """

    vision: str
    projector: str
    decoder: str
    lm_head: str


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of checkpoints with one architecture.

    Attributes:
        name: Name in errors: "Use a {name} checkpoint."
        supported: The checkpoints of this family with their model_type in config.json, for errors.
        vision_config: Class of `ModelConfig.vision`, from which `family_of` finds the family of a configuration.
        matches: Content of a config.json -> whether it describes this family.
        parse_config: Content of a config.json, and its name in errors -> configuration. Raises CheckpointError.
        config_json: Configuration and layout -> content of a config.json, which `parse_config` reads back.
        preprocessor_json: Content of a preprocessor_config.json and layout -> content that loaders of the layout read.
        model: Class of the model.
        layouts: Layouts of checkpoints by name.
        peft_layout: Key of the layout with the names of modules in transformers, which LoRA adapters of PEFT contain.
        vision_names: Names of the vision tower's tensors.
        projector_names: Names of the projector's tensors. Their parameters are part of the vision tower.
        decoder_names: Names of the decoder's tensors.
        ignored_names: Regular expressions of tensors that belong to no parameter.
        tensor_shape: Path of a parameter, its shape per layer and configuration -> shape of the checkpoint's tensor.
        load_processor: Hugging Face directory and configuration -> processor. Raises CheckpointError.
        forward_flops: Configuration, tokens, pairs of tokens that attend to each other, patches and pairs of patches
            -> floating-point operations of the matrix products in a forward pass of (decoder, vision tower), without
            logits.
    """

    name: str
    supported: str
    vision_config: type
    matches: Callable[[Mapping[str, Any]], bool]
    parse_config: Callable[[Mapping[str, Any], str], ModelConfig]
    config_json: Callable[[ModelConfig, str], dict[str, Any]]
    preprocessor_json: Callable[[Mapping[str, Any], str], dict[str, Any]]
    model: type[Tarsier]
    layouts: Mapping[str, Layout]
    peft_layout: str
    vision_names: NameTable
    projector_names: NameTable
    decoder_names: NameTable
    ignored_names: tuple[str, ...]
    tensor_shape: Callable[[tuple[Any, ...], tuple[int, ...], ModelConfig], tuple[int, ...]]
    load_processor: Callable[[Path, ModelConfig], Processor]
    forward_flops: Callable[[ModelConfig, int, int, int, int], tuple[float, float]]
