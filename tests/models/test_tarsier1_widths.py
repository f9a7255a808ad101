"""The first Tarsier at its true widths against Hugging Face's CLIPVisionModel and LlamaForCausalLM.

The hidden sizes and heads are those of Tarsier-7b and 34b. The decoder's MLP, most of the parameters, is narrower.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from tarsier_jax.processing.batch import Buckets, Example, make_batch
from tests import tarsier1
from tests.reference import load_ours

ATOL = 1e-4
VOCABULARY, IMAGE, NEWLINE, NEW = 512, 500, 502, 503
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 3,  # two of them run
    "num_attention_heads": 16,
    "patch_size": 14,
}
TEXTS = {
    "7b": {"hidden_size": 4096, "intermediate_size": 2752, "num_attention_heads": 32, "num_key_value_heads": 32},
    "34b": {
        "hidden_size": 7168,
        "intermediate_size": 2560,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "rope_theta": 5e6,
    },
}
FRAMES = (2, 0, 1)  # of the samples


class Reference(torch.nn.Module):
    """CLIP, the projector and LLaMA, composed as in the original's first class."""

    def __init__(self, vision: dict[str, Any], text: dict[str, Any]):
        super().__init__()
        self.vision_tower = CLIPVisionModel(CLIPVisionConfig(**vision))
        self.linear_1 = torch.nn.Linear(vision["hidden_size"], text["hidden_size"])
        self.linear_2 = torch.nn.Linear(text["hidden_size"], text["hidden_size"])
        self.language_model = LlamaForCausalLM(LlamaConfig(**text))

    @torch.no_grad()
    def forward(self, ids: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """Returns the logits of a sample with one image token per patch, float32 (S, V)."""
        input_ids = torch.from_numpy(ids).long()
        x = self.language_model.get_input_embeddings()(input_ids)
        if len(pixels):
            states = self.vision_tower(torch.from_numpy(pixels), output_hidden_states=True).hidden_states
            features = self.linear_2(torch.nn.functional.gelu(self.linear_1(states[-2][:, 1:])))
            x[input_ids == IMAGE] = features.flatten(0, 1)
        return self.language_model(inputs_embeds=x[None]).logits[0].numpy()

    def names(self) -> dict[str, torch.Tensor]:
        """Returns the tensors with the names of a checkpoint."""
        tensors = tarsier1.rename_clip(self.vision_tower.state_dict())
        for name, linear in (("linear_1", self.linear_1), ("linear_2", self.linear_2)):
            tensors |= {f"multi_modal_projector.{name}.{kind}": value for kind, value in linear.state_dict().items()}
        return tensors | {f"language_model.{name}": value for name, value in self.language_model.state_dict().items()}


def make_reference(vision: dict[str, Any], text: dict[str, Any]) -> Reference:
    """A random model. Activations are near 1, so every part affects the logits."""
    with no_init_weights():  # which takes as long as the values below
        model = Reference(vision, text).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 1.5 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.2
            std = 1.0 if "embed" in name and p.ndim < 3 else std
            is_norm = "norm" in name or "layrnorm" in name
            p.normal_(1.0 if is_norm and name.endswith("weight") else 0.0, std, generator=generator)
    return model


def make_examples(config: Any) -> tuple[list[Example], list[np.ndarray]]:
    """Random text around random frames, and the frames."""
    rng = np.random.default_rng(0)
    examples, pixels = [], []
    for frames in FRAMES:
        ids = np.concatenate([rng.integers(3, 499, 5), [IMAGE] * frames, rng.integers(3, 499, 9)])
        size = config.vision.image_size
        pixels.append(rng.standard_normal((frames, 3, size, size)).astype(np.float32))
        examples.append(tarsier1.make_example(ids, ids, pixels[-1], config))
    return examples, pixels


@pytest.mark.slow
@pytest.mark.parametrize(("name", "image_size"), [("7b", 112), ("34b", 84)])
def test_true_widths(tmp_path: Path, name: str, image_size: int) -> None:
    vision = {**VISION, "image_size": image_size}
    text = {**TEXTS[name], "vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 64}
    raw = {
        "model_type": "llava",
        "image_token_index": IMAGE,
        "image_newline_idx": NEWLINE,
        "image_new_idx": NEW,
        "text_config": {"model_type": "llama", **text},
        "vision_config": {"model_type": "clip_vision_model", **vision},
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs = make_reference(vision, text)
    save_file(theirs.names(), tmp_path / "model.safetensors", {"format": "pt"})
    ours = load_ours(tmp_path)
    examples, pixels = make_examples(ours.config)
    expected = [theirs(example.input_ids, own) for example, own in zip(examples, pixels, strict=True)]
    del theirs
    tokens = max(len(example.input_ids) for example in examples)
    patches = ours.config.vision.num_patches
    batch = make_batch(examples, ours.config, Buckets((patches,), (sum(FRAMES),), (tokens,)))
    logits = np.asarray(jax.jit(lambda model, batch: model(batch))(ours, batch))
    for row, values in zip(logits, expected, strict=True):
        assert np.abs(values).max() > 3
        np.testing.assert_allclose(row[: len(values)], values, atol=ATOL, rtol=0)
