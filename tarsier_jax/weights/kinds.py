"""Directories that are not loadable checkpoints, recognised by their files. Each error names the conversion."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tarsier_jax.errors import CheckpointError

_ADAPTER = (
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),  # PEFT
    *("adapters.safetensors", "pytorch_lora_weights.safetensors"),  # MLX, diffusers
)
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "tarsier_jax.json")
_MAX_LISTED = 3  # subdirectories that an error names


def check_kind(directory: Path) -> None:
    """Checks that a directory is a kind of checkpoint that can be loaded.

    Raises:
        CheckpointError: the directory is an adapter, a quantised model, or training state of another program.
    """
    if any((directory / name).exists() for name in _ADAPTER):
        raise CheckpointError(_adapter(directory))
    config = _read(directory / "config.json")
    text = _mapping(config.get("text_config"))
    if quantization := config.get("quantization_config") or text.get("quantization_config"):
        method = _mapping(quantization).get("quant_method", "an unknown method")
        raise CheckpointError(
            f"{directory} is quantised ({method}, according to quantization_config in its config.json). Use the "
            "original checkpoint in bfloat16 or float32."
        )
    if not _contains(directory, _WEIGHTS) and (kind := _other_kind(directory)):
        raise CheckpointError(f"{directory} contains {kind}")
    if not config and (inner := _checkpoints_in(directory)):
        raise CheckpointError(
            f"{directory} does not contain a config.json. Use {' or '.join(map(str, inner))}, which does."
        )


def _checkpoints_in(directory: Path) -> list[Path]:
    """Returns a few subdirectories with a config.json, such as those of a training run.

    Raises:
        CheckpointError: a subdirectory is an adapter.
    """
    inner = [path for path in sorted(directory.iterdir()) if path.is_dir()]
    for path in inner:
        if (path / "adapter_config.json").is_file():
            raise CheckpointError(_adapter(path))
    return [path for path in inner if (path / "config.json").is_file()][:_MAX_LISTED]


def _adapter(directory: Path) -> str:
    config = _read(directory / "adapter_config.json")
    base = config.get("base_model_name_or_path") or "its base model"
    beside = " beside a whole model" if _contains(directory, ("model*.safetensors", "pytorch_model*.bin")) else ""
    remedy = (
        f"Pass the base model as --model and {directory} as --adapter. For programs without --adapter: Merge it into "
        "the base model first (`python -m convert.merge_lora`; PEFT: `merge_and_unload`; LLaMA-Factory: "
        "`llamafactory-cli export`; ms-swift: `swift export --merge_lora true`), and use the merged directory."
    )
    if beside:
        remedy += " If the whole model is meant, move adapter_config.json and adapter_model.* elsewhere."
    return f"{directory} contains a {config.get('peft_type', 'LoRA')} adapter of {base}{beside}. {remedy}"


def _other_kind(directory: Path) -> str:
    """Returns a description of weights in a format that is not supported, or "" if there are none."""
    if _contains(directory, ("*.gguf",)):
        return "a GGUF file, which is not supported. Use the original Hugging Face checkpoint."
    if _contains(directory, ("zero_to_fp32.py", "global_step*", "*_optim_states.pt")):
        return (
            f"DeepSpeed state. Convert it to a checkpoint: `python zero_to_fp32.py {directory} OUT "
            "--safe_serialization`."
        )
    if _contains(directory, ("*.distcp", "pytorch_model_fsdp*")):
        return "FSDP shards. Convert them to a checkpoint: `accelerate merge-weights`."
    if _contains(directory, ("model_index.json",)):
        return "a diffusers pipeline instead of a video-description model. Use a Tarsier2 or Qwen2-VL checkpoint."
    return ""


def _contains(directory: Path, patterns: Sequence[str]) -> bool:
    return any(path.name not in _ADAPTER for pattern in patterns for path in directory.glob(pattern))


def _read(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file, or {} if it is missing or damaged, which `load_config` reports."""
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
