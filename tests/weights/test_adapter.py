"""Adapters of PEFT: merged weights equal PEFT's own, and what cannot be merged is refused by name."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

from tarsier_jax.errors import CheckpointError
from tarsier_jax.families import load_config
from tarsier_jax.sharding import parameter_path
from tarsier_jax.weights import load_weights
from tarsier_jax.weights.adapter import read_adapter
from tarsier_jax.weights.streaming import convert_hf
from tests import reference
from tests.weights.conftest import renamed

DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS: dict[str, dict[str, Any]] = {
    "decoder": {"r": 4, "lora_alpha": 16, "target_modules": DECODER, "lora_dropout": 0.1},
    "all linear layers": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    "patch embedding and head": {"r": 2, "target_modules": ["patch_embed.proj", "lm_head"]},
    "some layers": {"r": 4, "target_modules": ["q_proj", "fc1"], "layers_to_transform": [1]},
    "patterns and rsLoRA": {
        "r": 4,
        "target_modules": DECODER,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
        "alpha_pattern": {"v_proj": 3, r"layers\.2.*k_proj": 7},
        "use_rslora": True,
    },
}


def make_peft(directory: Path, **options: Any) -> Any:
    """A model of PEFT over the model of `make_reference`, with random A and B."""
    model = reference.make_reference(directory, reference.TINY)
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(**options, init_lora_weights=False))


def arrays(directory: Path, **options: Any) -> dict[str, np.ndarray]:
    model = load_weights(directory, load_config(directory), **options)
    return {parameter_path(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_merged_weights_equal_those_of_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    model = make_peft(tmp_path / "base", **options)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ours = arrays(tmp_path / "base", adapter=tmp_path / "adapter")
    plain = arrays(tmp_path / "base")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for path, expected in arrays(tmp_path / "merged").items():
        np.testing.assert_allclose(ours[path], expected, atol=2e-6, err_msg=path)
    changed = [path for path in ours if not np.array_equal(ours[path], plain[path])]
    assert changed and all(np.abs(ours[path] - plain[path]).max() > 1e-3 for path in changed)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ and adapter/ with the decoder's layers."""
    directory = tmp_path_factory.mktemp("adapter")
    make_peft(directory / "base", **OPTIONS["decoder"]).save_pretrained(directory / "adapter")
    return directory


def change(adapter: Path, out: Path, tensors: Callable[[dict], dict] = dict, **options: Any) -> Path:
    """A copy of the adapter with changed tensors and options."""
    out.mkdir()
    source = adapter / "adapter"
    save_file(tensors(load_file(source / "adapter_model.safetensors")), out / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, **options}))
    return out


@pytest.mark.parametrize("layout", ["qwen2_vl", "tarsier2"])
def test_names_of_other_layouts(adapter: Path, tmp_path: Path, layout: str) -> None:
    """transformers 4, and Tarsier2's own model class."""
    prefix = "base_model.model."

    def rename(tensors: dict) -> dict:
        return {prefix + renamed(name.removeprefix(prefix), layout): x for name, x in tensors.items()}

    other = change(adapter, tmp_path / "other", rename)
    expected = arrays(adapter / "base", adapter=adapter / "adapter")
    for path, x in arrays(adapter / "base", adapter=other).items():
        np.testing.assert_array_equal(x, expected[path])


def test_a_converted_base_and_bin_files(adapter: Path, tmp_path: Path) -> None:
    convert_hf(adapter / "base", tmp_path / "orbax")
    old = change(adapter, tmp_path / "old")
    torch.save(load_file(old / "adapter_model.safetensors"), old / "adapter_model.bin")
    (old / "adapter_model.safetensors").unlink()
    expected = arrays(adapter / "base", adapter=adapter / "adapter")
    for path, x in arrays(tmp_path / "orbax", adapter=old).items():
        np.testing.assert_array_equal(x, expected[path])


def test_int8_quantizes_the_merged_weights(adapter: Path, tmp_path: Path) -> None:
    config = load_config(adapter / "base")
    one = load_weights(adapter / "base", config, int8=True, adapter=adapter / "adapter")
    peft_model = make_peft(tmp_path / "base", **OPTIONS["decoder"])
    peft_model.merge_and_unload().save_pretrained(tmp_path / "merged")
    other = load_weights(tmp_path / "merged", config, int8=True)
    for a, b in zip(jax.tree.leaves(nnx.state(one)), jax.tree.leaves(nnx.state(other)), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=1.01)
        assert np.mean(np.asarray(a) != np.asarray(b)) < 0.01 or a.dtype != np.int8


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication \[\[0, 2\]\]"),
        ({"an_option_of_tomorrow": 1}, "an_option_of_tomorrow 1"),
    ],
)
def test_options_that_are_not_supported(adapter: Path, tmp_path: Path, options: dict[str, Any], name: str) -> None:
    with pytest.raises(CheckpointError, match=f"has {name}, which is not supported. Merge the adapter with PEFT"):
        arrays(adapter / "base", adapter=change(adapter, tmp_path / "other", **options))


def drop(tensors: dict) -> dict:
    return {name: x for name, x in tensors.items() if "layers.1.mlp.up_proj.lora_B" not in name}


def narrow(tensors: dict) -> dict:
    return {
        name: x[:, :-1].contiguous() if "layers.0" in name and "k_proj.lora_A" in name else x
        for name, x in tensors.items()
    }


def add(tensors: dict) -> dict:
    return {**tensors, "base_model.model.score.weight": torch.ones(2)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (drop, r"layers\.1\.mlp\.up_proj is not a matrix of the model with lora_A and lora_B"),
        (narrow, r"layers\.0\.self_attn\.k_proj has A \(4, 63\) and B \(16, 4\) for a weight \(16, 64\)"),
        (add, r"score\.weight is not a matrix of the model"),
        (lambda _: {}, "it contains no lora_A and lora_B"),
    ],
)
def test_tensors_that_do_not_fit(adapter: Path, tmp_path: Path, tensors: Any, message: str) -> None:
    other = change(adapter, tmp_path / "other", tensors)
    with pytest.raises(CheckpointError, match=f"{message}.*Pass the base model of the adapter as --model"):
        read_adapter(other, load_config(adapter / "base"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is not a LoRA adapter: it contains no adapter_config.json"),
        ({"adapter_config.json": "{"}, "adapter_config.json cannot be read"),
        ({"adapter_config.json": '{"peft_type": "IA3", "r": 1, "lora_alpha": 1}'}, "has peft_type IA3"),
        ({"adapter_config.json": '{"peft_type": "LORA", "r": 8}'}, "cannot be read .KeyError.'lora_alpha'"),
        ({"adapter_config.json": '{"peft_type": "LORA", "r": 8, "lora_alpha": 8}'}, "contains no adapter_model"),
    ],
)
def test_directories_that_are_no_adapters(adapter: Path, tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(tmp_path))}.*{message}"):
        read_adapter(tmp_path, load_config(adapter / "base"))
