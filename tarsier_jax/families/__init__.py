"""Model families. A family is one record in `FAMILIES`. Other code does not depend on the name of a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import CheckpointError
from tarsier_jax.families.family import Family
from tarsier_jax.families.qwen2_vl import QWEN2_VL
from tarsier_jax.families.tarsier1 import TARSIER1
from tarsier_jax.processing.image import read_json

FAMILIES = (QWEN2_VL, TARSIER1)


def load_config(directory: str | Path) -> ModelConfig:
    """Returns the configuration in `config.json` of a Hugging Face directory.

    Raises:
        CheckpointError: the file is missing, is not JSON, or describes a model that is not supported.
    """
    path = Path(directory) / "config.json"
    raw = read_json(path)
    if raw is None:
        raise CheckpointError(f"{path} does not exist. Pass the directory of a Hugging Face checkpoint.")
    return parse_config(raw, source=str(path))


def parse_config(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Builds the configuration from the parsed content of a `config.json`; `source` names it in errors.

    Raises:
        CheckpointError: no family supports the model, or the values contradict each other.
    """
    return family_of_json(raw, source).parse_config(raw, source)


def family_of_json(raw: Mapping[str, Any], source: str = "config.json") -> Family:
    """Returns the family that the content of a `config.json` describes; `source` names it in errors.

    Raises:
        CheckpointError: no family supports the model.
    """
    for family in FAMILIES:
        if family.matches(raw):
            return family
    types = {"model_type": raw.get("model_type")}
    for key in ("text_config", "vision_config"):
        half = raw.get(key)
        if isinstance(half, Mapping) and "model_type" in half:
            types[f"{key}.model_type"] = half["model_type"]
    raise CheckpointError(
        f"{source}: {', '.join(f'{key} is {value!r}' for key, value in types.items())}, which is not supported. "
        f"Supported are {', '.join(family.supported for family in FAMILIES)}."
    )


def family_of(config: ModelConfig) -> Family:
    """Returns the family of a configuration."""
    return next(family for family in FAMILIES if isinstance(config.vision, family.vision_config))
