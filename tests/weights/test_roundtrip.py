"""Hugging Face -> Orbax -> Hugging Face restores every tensor, bit for bit."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen2VLForConditionalGeneration

from tarsier_jax.errors import CheckpointError, InputError
from tarsier_jax.families import load_config
from tarsier_jax.families.qwen2_vl import LAYOUTS
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.chat import BARE_CHATML, load_chat_template, render_template
from tarsier_jax.weights import convert_to_hf, export_hf, hf_tensors, load_weights, save_checkpoint, streaming
from tarsier_jax.weights import orbax as orbax_module
from tarsier_jax.weights.streaming import convert_hf
from tests import reference
from tests.devices import simulated_devices
from tests.weights.conftest import Write, bits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_comes_back(write: Write, tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    def zeros_and_nans(tensors: dict[str, torch.Tensor]) -> None:
        first, second, *_ = sorted(tensors)
        tensors[first] = torch.zeros_like(tensors[first])  # a chunk of zeros is data like any other
        tensors[second] = torch.full_like(tensors[second], -0.0)
        tensors[second].view(-1)[0] = float("nan")

    source = write(layout, dtype, shards=3, change=zeros_and_nans)
    convert_hf(source, tmp_path / "orbax")
    convert_to_hf(tmp_path / "orbax", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(source)
    assert (tmp_path / "back" / "config.json").read_text() == (source / "config.json").read_text()
    assert (tmp_path / "back" / "generation_config.json").exists()
    assert not (tmp_path / "back" / "modeling_evil.py").exists()  # code never comes along


@pytest.mark.parametrize("path", ["../out", "./out/", "a/../out", "link/out", "n#1 50%?x=a&b", "früh.d", "empty"])
def test_paths(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    source, here = write(), tmp_path / "here"
    for directory in ("a", "b", "empty"):
        (here / directory).mkdir(parents=True)
    (here / "link").symlink_to(here / "b")
    monkeypatch.chdir(here)
    convert_hf(Path("../checkpoint/."), Path(path))
    reference.load_ours(Path(path))
    convert_to_hf(Path(path), Path("link/../back"))  # as in the system: ".." of the link's target
    assert bits(here / "back") == bits(source)
    assert not [file for file in tmp_path.rglob(".*") if file.name.endswith((".lock", ".partial"))]


def test_layers_of_one_parameter_may_not_mix_dtypes(write: Write, tmp_path: Path) -> None:
    def mix(tensors: dict[str, torch.Tensor]) -> None:
        name = "language_model.model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].bfloat16()

    with pytest.raises(CheckpointError, match=r"different dtypes from layer to layer: language_model.model.layers.0"):
        convert_hf(write(change=mix), tmp_path / "orbax")


@pytest.mark.parametrize("with_head", [True, False])
def test_tied_embeddings_with_and_without_a_head(tmp_path: Path, with_head: bool) -> None:
    from safetensors.torch import load_file, save_file

    source = tmp_path / "hf"
    reference.make_reference(source, reference.TINY, tied=True)
    tensors = load_file(source / "model.safetensors")
    embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors.pop("lm_head.weight", None)
    if with_head:
        tensors["lm_head.weight"] = tensors[embedding].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert_hf(source, tmp_path / "orbax")
    convert_to_hf(tmp_path / "orbax", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(source)
    if with_head:
        tensors["lm_head.weight"] += 1
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match="ties the output head to the embedding, but their tensors differ"):
            convert_hf(source, tmp_path / "other")


def parameters(model: Tarsier) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_both_kinds_of_directory_load_the_same_model(write: Write, tmp_path: Path, param_dtype: str) -> None:
    source = write()
    convert_hf(source, tmp_path / "orbax")
    ours = reference.load_ours(source, param_dtype=param_dtype)
    again = reference.load_ours(tmp_path / "orbax", param_dtype=param_dtype)
    for path, expected in parameters(ours).items():
        assert expected.dtype == param_dtype
        np.testing.assert_array_equal(parameters(again)[path], expected)


def test_a_model_saved_by_orbax_exports_like_a_converted_one(write: Write, tmp_path: Path) -> None:
    """As in training: save device arrays, then export."""
    source = write()
    convert_hf(source, tmp_path / "orbax")
    model = reference.load_ours(source)
    trained = tmp_path / "trained"
    trained.mkdir()
    save_checkpoint(trained / orbax_module.PARAMS, model)
    for name in ("config.json", orbax_module.MANIFEST):
        (trained / name).write_bytes((tmp_path / "orbax" / name).read_bytes())
    convert_to_hf(trained, tmp_path / "back")
    assert bits(tmp_path / "back") == bits(source)
    export_hf(model, tmp_path / "orbax", layout="tarsier2")
    assert bits(tmp_path / "orbax") == bits(source)


@pytest.mark.parametrize("source_layout", ["tarsier2", "qwen2_vl_new"])
def test_the_other_layout_loads_in_transformers(write: Write, tmp_path: Path, source_layout: str) -> None:
    source = write(source_layout)
    (source / "preprocessor_config.json").write_text('{"size": {"min_pixels": 3136, "max_pixels": 50176}}')
    counting = BARE_CHATML.replace("item.num_vision_tokens is defined", "true")
    (source / "chat_template.jinja").write_text(counting)
    convert_hf(source, tmp_path / "orbax")
    convert_to_hf(tmp_path / "orbax", tmp_path / "qwen", layout="qwen2_vl")
    theirs, info = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "qwen", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    example = reference.make_example([5, (3, 4, 6), 9], load_config(source))
    ours = reference.load_ours(source)
    batch = reference.make_batch([example], ours.config, reference.BUCKETS)
    logits = np.asarray(ours(batch))[0, : len(example.input_ids)]
    np.testing.assert_allclose(logits, reference.reference_logits(theirs.eval(), example), atol=1e-4, rtol=0)
    size = json.loads((tmp_path / "qwen" / "preprocessor_config.json").read_text())["size"]
    assert size == {"shortest_edge": 3136, "longest_edge": 50176}
    assert load_chat_template(tmp_path / "qwen") == counting  # the one that transformers reads needs no counts
    image = [{"role": "user", "content": [{"type": "image"}]}]
    assert "<|image_pad|>" in render_template((tmp_path / "qwen" / "chat_template.jinja").read_text(), image)[0]
    convert_to_hf(tmp_path / "orbax", tmp_path / "tarsier", layout="tarsier2")
    assert load_config(tmp_path / "tarsier") == load_config(source) == load_config(tmp_path / "qwen")


def test_values_are_rounded_to_another_dtype(write: Write, tmp_path: Path) -> None:
    source = write("tarsier2", torch.float32)
    convert_hf(source, tmp_path / "orbax")
    convert_to_hf(tmp_path / "orbax", tmp_path / "back", dtype="bfloat16")
    whole, rounded = (dict(hf_tensors(directory, "tarsier2")) for directory in (source, tmp_path / "back"))
    assert set(whole) == set(rounded)
    for name, values in whole.items():
        np.testing.assert_array_equal(rounded[name], values.astype("bfloat16"))


def test_what_exists_is_not_overwritten(write: Write, tmp_path: Path) -> None:
    source = write()
    convert_hf(source, tmp_path / "orbax")
    with pytest.raises(CheckpointError, match="orbax exists already"):
        convert_hf(source, tmp_path / "orbax")
    with pytest.raises(CheckpointError, match="checkpoint exists already"):
        convert_to_hf(tmp_path / "orbax", source)


def test_a_full_disk_leaves_nothing(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match=r"needs 0.0 GiB, but only 0.0 GiB are free"):
        convert_hf(source, tmp_path / "orbax")
    monkeypatch.undo()

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streaming, "copy_assets", no_space)
    with pytest.raises(CheckpointError, match=r"The disk filled up while .*orbax was written"):
        convert_hf(source, tmp_path / "orbax")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.slow
def test_a_killed_conversion_is_never_taken_for_whole(write: Write, tmp_path: Path) -> None:
    source = write()
    code = (
        "import sys, time; from pathlib import Path; from tarsier_jax.weights.streaming import convert_hf\n"
        "def wait(done, total): print('wrote', flush=True); time.sleep(60)\n"
        "convert_hf(Path(sys.argv[1]), Path(sys.argv[2]), wait)"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "orbax")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "wrote\n"
        time.sleep(0.2)
        with pytest.raises(InputError, match=r"Another run is writing .*orbax"):
            convert_hf(source, tmp_path / "orbax")
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "orbax").exists()
    assert (tmp_path / ".orbax.partial").exists()
    convert_hf(source, tmp_path / "orbax")  # run again, it cleans up
    assert not (tmp_path / ".orbax.partial").exists()
    convert_to_hf(tmp_path / "orbax", tmp_path / "back")
    assert bits(tmp_path / "back") == bits(source)


def test_a_damaged_converted_directory_is_named(write: Write, tmp_path: Path) -> None:
    source = write()
    convert_hf(source, tmp_path / "orbax")
    params = tmp_path / "orbax" / "params"
    (params / "decoder.layers.mlp.up.weight" / "c" / "1" / "0" / "0").unlink()
    (params / "vision.merger.norm.bias" / "c" / "0").write_bytes(b"cut")
    (params / "decoder.norm.weight" / "zarr.json").unlink()
    with pytest.raises(CheckpointError) as error:
        reference.load_ours(tmp_path / "orbax")
    for problem in ("mlp/up/weight is damaged", "merger/norm/bias is damaged", "norm/weight is missing"):
        assert problem in str(error.value)
    (params / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="Convert it again"):
        reference.load_ours(tmp_path / "orbax")


@pytest.mark.slow
def test_sharded_loading(write: Write, tmp_path: Path) -> None:
    """On eight simulated devices, from both kinds of directory: the rules' shardings, and the values of one device."""
    source = write()
    convert_hf(source, tmp_path / "orbax")
    code = Path(__file__).with_name("sharded.py")
    for directory in (source, tmp_path / "orbax"):
        command = [sys.executable, "-m", f"tests.weights.{code.stem}", str(directory)]
        done = subprocess.run(command, env=simulated_devices(8), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        ours = reference.load_ours(source)
        total = sum(float(np.abs(x).sum(dtype=np.float64)) for x in parameters(ours).values())
        assert float(done.stdout.split()[-1]) == pytest.approx(total, rel=1e-12)


def test_load_weights_reads_either_kind(write: Write, tmp_path: Path) -> None:
    source = write()
    convert_hf(source, tmp_path / "orbax")
    for directory in (source, tmp_path / "orbax"):
        assert isinstance(load_weights(directory, load_config(directory)), Tarsier)
    assert jax.device_count() == 1
