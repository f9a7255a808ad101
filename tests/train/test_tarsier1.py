"""Training the first Tarsier: ten steps of PyTorch with a frozen vision tower, and a run of a recipe."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert.references import Tarsier1Reference
from tarsier_jax.config import ClipVisionConfig, ModelConfig
from tarsier_jax.families import family_of, load_config
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.packing import RowShape
from tarsier_jax.weights import convert_to_hf, hf_tensors
from tests import tarsier1
from tests.train import programs
from tests.train.packs import make_run, pack
from tests.train.test_parity import OPTIMIZER, STEPS, answer_log_prob, torch_optimizer, torch_step
from train.losses import sft_loss
from train.mesh import global_batch
from train.state import make_train_step

FREEZE = (r"vision/(?!projector/).*",)
FRAMES = ((2, 5, 9), (0, 12, 6), (3, 2, 12), (1, 4, 3), (4, 7, 20))  # of each sample, and tokens before and after them
SHAPE = RowShape(tokens=192, bins=4, patches=32, frames=2, samples=4)  # two frames per bin


def make_examples(config: ModelConfig, seed: int) -> list[Example]:
    """Random text and pixels; the second half of the text after the frames is the answer."""
    rng, vision = np.random.default_rng(seed), config.vision
    assert isinstance(vision, ClipVisionConfig)
    examples = []
    for frames, before, after in FRAMES:
        words = rng.integers(3, 1000, before + after)
        ids = np.concatenate([words[:before], [config.image_token_id] * frames, words[before:]])
        labels = np.where(np.arange(len(ids)) >= len(ids) - after // 2, ids, -100)
        pixels = rng.standard_normal((frames, 3, vision.image_size, vision.image_size)).astype(np.float32)
        examples.append(tarsier1.make_example(ids, labels, pixels, config))
    return examples


@pytest.mark.parametrize("name", ["t56-gqa", "ps56-qwen2"])
def test_ten_steps_of_sft(tmp_path: Path, name: str) -> None:
    """Losses and gradient norms, with both projectors and both decoders."""
    directory = tarsier1.write_checkpoint(tmp_path, name)
    spec, state = make_run(directory, dataclasses.replace(OPTIMIZER, freeze=FREEZE), remat="full")
    reference = Tarsier1Reference(directory, spec.config, (2,))
    theirs: Any = reference.model
    for module in (theirs.model.multi_modal_projector, theirs.model.language_model, theirs.lm_head):
        module.requires_grad_(True)
    optimizer = torch_optimizer(theirs, lambda *_: 1.0)
    step_function = make_train_step(spec, sft_loss)
    ours, expected = [], []
    for step in range(STEPS):
        examples = make_examples(spec.config, seed=step % 2)
        rows = [pack([[e] for e in row], spec.config, SHAPE) for row in (examples[:3], examples[3:])]
        state, metrics = step_function(state, global_batch(rows, 1, spec.mesh))
        ours.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        sums = [answer_log_prob(theirs, example, reference.inputs) for example in examples]
        loss = -torch.stack([s for s, _ in sums]).sum() / sum(n for _, n in sums)
        norm = torch_step(theirs, optimizer, step, loss)
        expected.append((float(loss.detach()), norm))
    assert expected[-1][0] < expected[1][0] - 0.1  # it learned something
    # The loss decreases to 0.015, where its rounding error, of the order of that of the logits, exceeds 1e-4 of it.
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_recipe_from_start_to_export(tmp_path: Path) -> None:
    """Learns from pairs, captions held-out clips, and exports. The frozen vision tower, with its unused tensors, does
    not change a bit; every other tensor changes.
    """
    evaluation = ("--config.eval_captions=1", "--config.eval_every=3")
    flags = ("--config.num_train_steps=3", "--config.data.seq_len=448", *evaluation)
    output = programs.finish(programs.start(tmp_path / "run", *flags, program="dpo", recipe="tarsier1_stage1"))
    assert len(programs.curve(tmp_path / "run")) == 3, output
    convert_to_hf(tmp_path / "run" / "model", tmp_path / "back")
    before, after = (dict(hf_tensors(tmp_path / name, "tarsier")) for name in ("run/random_model", "back"))
    assert before.keys() == after.keys()
    for name, values in before.items():
        is_equal = np.array_equal(values.astype(np.float32), after[name].astype(np.float32))
        assert is_equal == name.startswith("vision_tower."), name
    raw = json.loads((tmp_path / "back" / "config.json").read_text())
    assert raw == json.loads((tmp_path / "run" / "random_model" / "config.json").read_text())
    config = load_config(tmp_path / "back")
    assert len(family_of(config).load_processor(tmp_path / "back", config).decode([70, 71])) > 0
