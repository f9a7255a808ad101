"""Weights of the first Tarsier: strict in both directions, and back bit for bit with the tensors that are not run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

from tarsier_jax.errors import CheckpointError
from tarsier_jax.families import load_config, parse_config
from tarsier_jax.models.tarsier import Tarsier1
from tarsier_jax.sharding import parameter_path, parameter_spec
from tarsier_jax.weights import convert_to_hf, export_hf
from tarsier_jax.weights.names import abstract_state, parameters
from tarsier_jax.weights.streaming import convert_hf
from tests import tarsier1
from tests.reference import load_ours
from tests.weights.conftest import bits

CLIP = "vision_tower.vision_model."
PROJECTOR = "multi_modal_projector."


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for name in tarsier1.NAMES:
        tarsier1.write_checkpoint(directory, name)
    return directory


def write_changed(
    checkpoints: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], name: str = "t56-gqa"
) -> Path:
    """A copy of a checkpoint in one file, with other tensors."""
    (tmp_path / "config.json").write_bytes((checkpoints / name / "config.json").read_bytes())
    tensors = load_file(checkpoints / name / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("name", tarsier1.NAMES)
def test_every_bit_comes_back(checkpoints: Path, tmp_path: Path, name: str) -> None:
    """In float32 and bfloat16, from one file and two, with both projectors and both decoders."""
    checkpoint = convert_hf(checkpoints / name, tmp_path / "orbax")
    convert_to_hf(tmp_path / "orbax", tmp_path / "back")
    expected = bits(checkpoints / name)
    assert f"{CLIP}post_layernorm.weight" in expected
    assert f"{CLIP}encoder.layers.2.mlp.fc1.weight" in expected  # the last of three blocks, which is not run
    assert bits(tmp_path / "back") == expected
    assert sum(len(tensors) for _, tensors in checkpoint.sources) == len(expected)
    assert (tmp_path / "back" / "tokenizer.model").exists()


def test_both_kinds_of_directory_load_the_same_model(checkpoints: Path, tmp_path: Path) -> None:
    convert_hf(checkpoints / "t56-gqa", tmp_path / "orbax")
    states = [nnx.to_flat_state(nnx.state(load_ours(path))) for path in (checkpoints / "t56-gqa", tmp_path / "orbax")]
    for (path, a), (_, b) in zip(*states, strict=True):
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))


def test_a_loaded_model_is_exported_bit_for_bit(checkpoints: Path, tmp_path: Path) -> None:
    """As after training."""
    model = load_ours(checkpoints / "t56-gqa")
    assert isinstance(model, Tarsier1)
    export_hf(model, tmp_path, "tarsier")
    assert bits(tmp_path) == bits(checkpoints / "t56-gqa")


def test_the_layout_of_another_family(checkpoints: Path, tmp_path: Path) -> None:
    convert_hf(checkpoints / "t56-gqa", tmp_path / "orbax")
    with pytest.raises(CheckpointError, match=r"is a first Tarsier checkpoint, which has no layout qwen2_vl\. Choose"):
        convert_to_hf(tmp_path / "orbax", tmp_path / "back", layout="qwen2_vl")
    assert not (tmp_path / "back").exists()


def test_missing_extra_and_misshapen_tensors(checkpoints: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["language_model.model.layers.0.self_attn.q_proj.bias"] = torch.zeros(128)
        del tensors[f"{CLIP}encoder.layers.2.layer_norm1.bias"]
        tensors[f"{CLIP}embeddings.position_embedding.weight"] = torch.zeros(16, 96)

    with pytest.raises(CheckpointError) as error:
        load_ours(write_changed(checkpoints, tmp_path, change))
    message = str(error.value)
    assert f"1 tensors are missing: {CLIP}encoder.layers.2.layer_norm1.bias" in message
    assert "not part of the model: language_model.model.layers.0.self_attn.q_proj.bias" in message
    assert f"{CLIP}embeddings.position_embedding.weight (16, 96) instead of (17, 96)" in message


def test_the_projector_of_the_other_kind(checkpoints: Path, tmp_path: Path) -> None:
    """`projection_head` decides about the projector, and the names of its tensors have to follow."""
    directory = write_changed(checkpoints, tmp_path, lambda tensors: None, "ps56-qwen2")
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace("Pixel_Shuffle", "MLP"))
    with pytest.raises(CheckpointError) as error:
        load_ours(directory)
    assert f"4 tensors are missing: {PROJECTOR}linear_1.bias" in str(error.value)
    assert f"6 tensors are not part of the model: {PROJECTOR}mlp.0.bias" in str(error.value)


def test_numbers_of_positions_and_rotary_buffers_are_ignored(checkpoints: Path, tmp_path: Path) -> None:
    """Older versions of transformers store them, the former as integers."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{CLIP}embeddings.position_ids"] = torch.arange(17)[None]
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    directory = write_changed(checkpoints, tmp_path, change)
    load_ours(directory)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    load_ours(directory)


def test_the_tensors_of_tarsier_7b() -> None:
    """686 tensors: 391 of CLIP, with the 18 that are not run, 4 of the projector and 291 of the decoder."""
    names = [name for parameter in parameters(parse_config(tarsier1.TARSIER_7B), "tarsier") for name in parameter.names]
    counts = [sum(name.startswith(prefix) for name in names) for prefix in (CLIP, PROJECTOR, "language_model.")]
    assert counts == [391, 4, 291]
    assert len(set(names)) == 686


@pytest.mark.parametrize("name", ["t56-gqa", "ps56-qwen2"])
def test_every_parameter_has_one_sharding_rule(checkpoints: Path, name: str) -> None:
    _, state = abstract_state(load_config(checkpoints / name))
    for path, leaf in nnx.to_flat_state(state):
        assert len(parameter_spec(parameter_path(path))) <= leaf.ndim


def test_large_parameters_of_tarsier_7b_are_split_both_ways() -> None:
    _, state = abstract_state(parse_config(tarsier1.TARSIER_7B))
    for path, leaf in nnx.to_flat_state(state):
        if leaf.size * 4 > 2**24:
            assert {"fsdp", "tensor"} <= set(parameter_spec(parameter_path(path))), path
