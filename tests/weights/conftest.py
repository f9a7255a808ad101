"""Small checkpoints in every layout, with the tensors of a live Hugging Face model."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tarsier_jax.families.qwen2_vl import LAYOUTS
from tests import reference

Write = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint written by transformers 5, with the names of the layout `qwen2_vl_new`, or the old ones."""
    directory = tmp_path_factory.mktemp("saved")
    reference.make_reference(directory, reference.TINY)
    return directory


def renamed(name: str, layout: str) -> str:
    """A name that transformers wrote, in `layout`."""
    target = LAYOUTS[layout]
    for source in (LAYOUTS["qwen2_vl_new"], LAYOUTS["qwen2_vl"]):
        if name == source.lm_head:
            return target.lm_head
        for old, new in ((source.vision, target.vision), (source.decoder, target.decoder)):
            if name.startswith(old):
                return new + name.removeprefix(old)
    raise AssertionError(name)


@pytest.fixture
def write(checkpoint: Path, tmp_path: Path) -> Write:
    """Writes a checkpoint: write(layout, dtype, shards, change) -> directory. `change` edits the dict of tensors."""

    def write(
        layout: str = "tarsier2",
        dtype: torch.dtype = torch.float32,
        shards: int = 1,
        change: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None,
    ) -> Path:
        directory = tmp_path / "checkpoint"
        directory.mkdir()
        raw = json.loads((checkpoint / "config.json").read_text())
        if layout == "tarsier2":
            halves = {"text_config": {**raw["text_config"], "model_type": "qwen2_vl"}}
            halves |= {"vision_config": {**raw["vision_config"], "model_type": "qwen2_vl"}}
            raw = {"model_type": "llava", "image_token_index": raw["image_token_id"], **halves}
        (directory / "config.json").write_text(json.dumps(raw))
        (directory / "generation_config.json").write_text('{"eos_token_id": [2]}')
        (directory / "modeling_evil.py").write_text("raise SystemExit")
        tensors = {renamed(k, layout): v.to(dtype) for k, v in load_file(checkpoint / "model.safetensors").items()}
        change(tensors)
        names = sorted(tensors)
        if shards == 1:
            save_file(tensors, directory / "model.safetensors", {"format": "pt"})
            return directory
        weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
        for file in sorted(set(weight_map.values())):
            part = {name: tensors[name] for name in names if weight_map[name] == file}
            save_file(part, directory / file, {"format": "pt"})
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return directory

    return write


def bits(directory: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Every tensor of a directory as (dtype, shape, bytes)."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return {k: (v.dtype, tuple(v.shape), v.flatten().view(torch.uint8).numpy().tobytes()) for k, v in tensors.items()}


def values(directory: Path) -> dict[str, np.ndarray]:
    return {k: v.float().numpy() for k, v in load_file(directory / "model.safetensors").items()}
