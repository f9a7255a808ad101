"""The first Tarsier in `convert.verify`: against transformers, in-process to save the start of a process."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import verify
from convert.backends import load_reference
from convert.references import PixelShuffle
from tarsier_jax.errors import CheckpointError
from tarsier_jax.families import load_config
from tarsier_jax.weights.streaming import convert_hf
from tests import tarsier1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "is_converted", "probes"), [("t56-gqa", False, ("video", "text")), ("ps56-qwen2", True, ("image",))]
)
def test_verify_against_transformers(
    tmp_path: Path,
    name: str,
    is_converted: bool,
    probes: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both projectors and both decoders, from both kinds of directory. Each probe compiles for seconds."""
    all_probes = verify.probes
    monkeypatch.setattr(verify, "probes", lambda processor: [p for p in all_probes(processor) if p[0] in probes])
    directory = tarsier1.write_checkpoint(tmp_path, name)
    if is_converted:
        convert_hf(directory, tmp_path / "orbax")
        directory = tmp_path / "orbax"
    assert verify.verify(str(directory), None, "float32", int8=False, max_new_tokens=6) == 0
    stdout = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in stdout.splitlines() if line.startswith("   ")}
    assert rows.keys() == {"probe", *probes}
    for probe in probes:
        differences = [float(x) for x in rows[probe][2:5] if x != "-"]
        assert differences and max(differences) < 1e-4
        assert rows[probe][-1] == "100.0%" and f"{probe}: equal" in stdout


def test_a_missing_tensor(tmp_path: Path) -> None:
    directory = tarsier1.write_checkpoint(tmp_path, "t56-gqa")
    tensors = load_file(directory / "model.safetensors")
    del tensors["multi_modal_projector.linear_1.bias"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors are missing: multi_modal_projector\.linear_1\.bias"):
        load_reference(directory, load_config(directory), (2,))


def test_the_order_of_the_pixel_shuffle(tmp_path: Path) -> None:
    """Top left, top right, bottom left, bottom right, each with all its channels."""
    config = load_config(tarsier1.write_checkpoint(tmp_path, "ps56-qwen2"))
    projector = PixelShuffle(config)
    projector.mlp = torch.nn.Sequential()
    E, side = config.vision.embed_dim, 4
    patches = np.arange(side * side * E, dtype=np.float32).reshape(1, side, side, E)
    blocks = [
        [patches[0, 2 * row + i, 2 * column + j] for i in range(2) for j in range(2)]
        for row in range(2)
        for column in range(2)
    ]
    ours = projector(torch.from_numpy(patches.reshape(1, -1, E)))
    np.testing.assert_array_equal(ours[0].numpy(), np.stack([np.concatenate(block) for block in blocks]))
