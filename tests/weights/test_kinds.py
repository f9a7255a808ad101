"""Directories that are not loadable checkpoints cause errors that name the conversion."""

import json
from pathlib import Path

import pytest

from tarsier_jax.errors import CheckpointError
from tarsier_jax.weights import resolve
from tarsier_jax.weights.kinds import check_kind

ADAPTER = json.dumps({"peft_type": "LORA", "r": 8, "base_model_name_or_path": "Qwen/Qwen2-VL-7B-Instruct"})
MERGE = "as --adapter.*Merge it into the base model first .*merge_lora"
MERGE += ".*merge_and_unload.*llamafactory-cli export.*swift export --merge_lora true"


def make(directory: Path, *names: str, **contents: str) -> Path:
    """A directory of files; `contents` are those of .json files."""
    for name in (*names, *(f"{name}.json" for name in contents)):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(contents.get(name.removesuffix(".json"), ""))
    return directory


@pytest.mark.parametrize(
    ("names", "whole"),
    [
        ((), False),
        (("adapter_model.safetensors", "tokenizer.json"), False),
        (("adapter_model.bin", "config.json"), False),
        (("adapter_model.safetensors", "config.json", "model.safetensors"), True),
        (("adapter_model.safetensors", "config.json", "model-00001-of-00002.safetensors"), True),
        (("adapter_model.bin", "config.json", "pytorch_model.bin"), True),
    ],
)
def test_an_adapter(tmp_path: Path, names: tuple[str, ...], whole: bool) -> None:
    make(tmp_path, *names, adapter_config=ADAPTER)
    with pytest.raises(CheckpointError, match=f"LORA adapter of Qwen/Qwen2-VL-7B-Instruct.*{MERGE}") as error:
        resolve(tmp_path)
    assert ("beside a whole model" in str(error.value)) == whole


@pytest.mark.parametrize("name", ["adapters.safetensors", "pytorch_lora_weights.safetensors"])
def test_an_adapter_without_a_config(tmp_path: Path, name: str) -> None:
    make(tmp_path, name)
    with pytest.raises(CheckpointError, match=f"LoRA adapter of its base model.*{MERGE}"):
        resolve(tmp_path)


def test_an_adapter_without_a_readable_configuration(tmp_path: Path) -> None:
    for name in ("adapter_model.bin", "adapter_config.json"):
        with pytest.raises(CheckpointError, match="contains a LoRA adapter of its base model"):
            resolve(make(tmp_path / name, name))


def test_adapters_in_the_directories_of_a_run(tmp_path: Path) -> None:
    """As ms-swift and LLaMA-Factory leave them."""
    make(tmp_path / "checkpoint-500", "adapter_model.safetensors", adapter_config=ADAPTER)
    with pytest.raises(CheckpointError, match=f"checkpoint-500 contains a LORA adapter.*{MERGE}"):
        resolve(make(tmp_path, "args.json", "trainer_state.json"))


def test_a_directory_of_checkpoints(tmp_path: Path) -> None:
    make(tmp_path, "run.json", "model/config.json", "random_model/config.json", "checkpoints/2/state")
    with pytest.raises(CheckpointError, match=r"does not contain a config.json. Use .*/model or .*/random_model"):
        resolve(tmp_path)


@pytest.mark.parametrize("where", ["{}", '{"text_config": {}}'])
@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes"])
def test_a_quantised_checkpoint(tmp_path: Path, method: str, where: str) -> None:
    config = json.loads(where)
    config.get("text_config", config)["quantization_config"] = {"quant_method": method}
    with pytest.raises(CheckpointError, match=rf"is quantised \({method}.*Use the original checkpoint in bfloat16"):
        resolve(make(tmp_path, "model.safetensors", config=json.dumps(config)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tarsier2-q4_k_m.gguf", "contains a GGUF file"),
        ("global_step500/zero_pp_rank_0_mp_rank_00_optim_states.pt", "contains DeepSpeed state.*zero_to_fp32.py"),
        ("zero_to_fp32.py", "contains DeepSpeed state"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "contains FSDP shards.*accelerate merge-weights"),
        ("model_index.json", "contains a diffusers pipeline"),
    ],
)
def test_weights_in_another_form(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve(make(tmp_path, name, "config.json"))
    check_kind(make(tmp_path, "model.safetensors"))  # whole weights beside it


def test_a_damaged_configuration_is_reported_by_its_reader(tmp_path: Path) -> None:
    for content in ("{", "[]"):
        check_kind(make(tmp_path, "model.safetensors", config=content))
