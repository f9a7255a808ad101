"""A checkpoint that does not fit is refused, with every problem named at once."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

from tarsier_jax.errors import CheckpointError
from tarsier_jax.weights import resolve
from tests import reference
from tests.weights.conftest import Write

NORM = "language_model.model.norm.weight"
MERGER = "vision_tower.merger.mlp.0.bias"


def test_missing_extra_and_misshapen_tensors_are_told_together(write: Write) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["language_model.model.final_norm.weight"] = tensors.pop(NORM)
        tensors[MERGER] = tensors[MERGER][:-1].clone()

    with pytest.raises(CheckpointError) as error:
        reference.load_ours(write(change=change))
    message = str(error.value)
    assert f"1 tensors are missing: {NORM}" in message
    assert "1 tensors are not part of the model: language_model.model.final_norm.weight" in message
    assert f"1 tensors are misshapen: {MERGER} (127,) instead of (128,)" in message
    assert "Download the checkpoint again" in message


def test_rotary_buffers_are_ignored(write: Write) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    reference.load_ours(write(change=change))


def test_many_names_are_counted_not_listed(write: Write) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if "layers" in n]:
            del tensors[name]

    with pytest.raises(CheckpointError, match=r"36 tensors are missing: .* and 26 more"):
        reference.load_ours(write(change=change))


def test_doubly_mapped_tensor(write: Write) -> None:
    directory = write(shards=2)
    (directory / "model.safetensors.index.json").unlink()
    first = directory / "model-00001-of-00002.safetensors"
    (directory / "model-00003.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"is in both .*00001-of-00002.* and .*00003.*remove one"):
        reference.load_ours(directory)


def test_shards_without_an_index(write: Write) -> None:
    directory = write(shards=2)
    (directory / "model.safetensors.index.json").unlink()
    reference.load_ours(directory)


def test_missing_shard(write: Write) -> None:
    directory = write(shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"The shard .*model-00002-of-00003.safetensors is missing"):
        reference.load_ours(directory)


def test_index_that_promises_too_much(write: Write) -> None:
    directory = write(shards=2)
    index = directory / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["made.up"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"made.up is not in"):
        reference.load_ours(directory)
    index.write_text("{")
    with pytest.raises(CheckpointError, match=r"index.json is damaged"):
        reference.load_ours(directory)


def test_a_stale_index_beside_one_file(write: Write) -> None:
    """As transformers 5: `save_pretrained` over a download of several shards leaves the old index, and perhaps them."""
    directory = write(shards=2)
    tensors = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, directory / "model.safetensors")
    warning = f"{directory}/model.safetensors is read and {directory}/model.safetensors.index.json is not"
    with pytest.warns(UserWarning, match=warning) as warned:
        model = reference.load_ours(directory)
        np.testing.assert_array_equal(model.decoder.norm.weight[...], tensors[NORM].numpy() + 1)
        for file in directory.glob("model-*"):
            file.unlink()
        reference.load_ours(directory)
    assert sum("is read and" in str(w.message) for w in warned) == 1


def test_files_of_other_things_are_not_read(write: Write, recwarn: pytest.WarningsRecorder) -> None:
    directory = write()
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "model-00001-of-00002.safetensors"):
        (directory / name).write_bytes(b"no safetensors")
    torch.save({"x": torch.ones(1)}, directory / "pytorch_model.bin")
    reference.load_ours(directory)
    assert not [w for w in recwarn if w.category is UserWarning]


def test_shards_that_the_index_does_not_name(write: Write) -> None:
    directory = write(shards=2)
    (directory / "model-00001-of-00004.safetensors").write_bytes(b"no safetensors")
    with pytest.warns(UserWarning, match="json does not name model-00001-of-00004.safetensors; such files are not"):
        reference.load_ours(directory)


def test_shards_of_two_checkpoints_without_an_index(write: Write) -> None:
    directory = write(shards=2)
    (directory / "model.safetensors.index.json").unlink()
    (directory / "model-00001-of-00004.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"shards of different checkpoints \(-of-00002, -of-00004\) and no index"):
        reference.load_ours(directory)


def test_a_missing_shard_without_an_index(write: Write) -> None:
    directory = write(shards=3)
    (directory / "model.safetensors.index.json").unlink()
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"The shard .*model-00002-of-00003.safetensors is missing"):
        reference.load_ours(directory)


def test_an_index_of_files_in_subdirectories(write: Write) -> None:
    directory = write(shards=2)
    (directory / "shards").mkdir()
    for file in sorted(directory.glob("*.safetensors")):
        file.rename(directory / "shards" / file.name)
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]

    def write_index(prefix: str, **more: str) -> None:
        names = {name: f"{prefix}{file}" for name, file in weight_map.items()}
        index.write_text(json.dumps({"weight_map": {**names, **more}}))

    write_index("shards/")
    reference.load_ours(directory)
    write_index("shards/", missing="shards/model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"missing is not in"):
        reference.load_ours(directory)
    for prefix in ("../checkpoint/shards/", "/somewhere/"):
        write_index(prefix)
        with pytest.raises(CheckpointError, match="which is not in its directory"):
            reference.load_ours(directory)


@pytest.mark.parametrize("content", ["[]", '{"weight_map": {}}', '{"weight_map": {"x": 1}}', '{"weight_map": []}'])
def test_a_damaged_index(write: Write, content: str) -> None:
    directory = write(shards=2)
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index.json is damaged"):
        reference.load_ours(directory)


def _cut(data: bytes) -> bytes:
    return data[:-100]


def _empty(data: bytes) -> bytes:
    return b""


def _absurd_header(data: bytes) -> bytes:
    return struct.pack("<Q", 2**60) + data[8:]


def _garbled_header(data: bytes) -> bytes:
    return data[:8] + b"\xff" * 20 + data[28:]


def _wrong_size(data: bytes) -> bytes:
    return data.replace(b'"shape":[128]', b'"shape":[126]', 1)


@pytest.mark.parametrize("damage", [_cut, _empty, _absurd_header, _garbled_header, _wrong_size])
def test_damaged_file(write: Write, damage: Callable[[bytes], bytes]) -> None:
    file = write() / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a valid safetensors file .*Download it again"):
        reference.load_ours(file.parent)


def test_unsupported_dtype(write: Write) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM] = tensors[NORM].to(torch.float8_e4m3fn)

    with pytest.raises(CheckpointError, match=rf"{NORM} has dtype F8_E4M3; supported are F32, F16, BF16"):
        reference.load_ours(write(change=change))


def test_torch_shards(write: Write) -> None:
    directory = write(dtype=torch.bfloat16)
    expected = reference.load_ours(directory)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    model = reference.load_ours(directory)
    for (path, a), (_, b) in zip(
        nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(expected)), strict=True
    ):
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))


class _Evil:
    def __reduce__(self) -> tuple:
        return (print, ("code from a checkpoint ran",))


def test_code_in_a_torch_shard_is_not_run(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write()
    (directory / "model.safetensors").unlink()
    torch.save({"x": _Evil()}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin cannot be read"):
        reference.load_ours(directory)
    assert "ran" not in capsys.readouterr().out


def test_no_weights_at_all(write: Write) -> None:
    directory = write()
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"contains no \*.safetensors and no pytorch_model\*.bin"):
        reference.load_ours(directory)


def test_weights_of_another_family(write: Write) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors["transformer." + name] = tensors.pop(name)

    with pytest.raises(CheckpointError, match=r"no tensor's name starts with vision_tower., model.visual., visual."):
        reference.load_ours(write(change=change))


@pytest.mark.parametrize("path", ["/no/such/directory", "./nothing", "a/b/c", "plain"])
def test_a_path_that_is_no_hub_id(path: str) -> None:
    with pytest.raises(CheckpointError, match=f"The directory {path} does not exist. Pass a checkpoint"):
        resolve(path)


def test_a_hub_id_that_cannot_be_downloaded() -> None:
    with pytest.raises(CheckpointError, match="directory some/model does not exist, and the download of it"):
        resolve("some/model")


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("path", "message"), [("az://bucket/model", "is a URL"), ("https://host/name", "pass org/name")]
)
def test_a_url_is_no_checkpoint(path: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve(path)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"is a file\. Pass the checkpoint directory"):
        resolve(tmp_path / "model.safetensors")
