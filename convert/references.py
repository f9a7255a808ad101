"""The PyTorch models in transformers that `convert.verify` compares with. Needs torch."""

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tarsier_jax.config import ClipVisionConfig, ModelConfig
from tarsier_jax.errors import CheckpointError
from tarsier_jax.families import family_of
from tarsier_jax.families.qwen2_vl import QWEN2_VL
from tarsier_jax.families.tarsier1 import TARSIER1
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.image import read_json
from tarsier_jax.weights import hf_tensors


class Reference(abc.ABC):
    """A model of transformers with the weights of a checkpoint, in float32. It is a `convert.backends.Backend`."""

    model: Any

    def __init__(self, directory: Path, config: ModelConfig, eos_token_ids: tuple[int, ...]):
        """Loads the model.

        Raises:
            CheckpointError: transformers rejects the tensors.
        """
        self.config, self.eos_token_ids = config, list(eos_token_ids)
        with torch.device("meta"):
            self.model = self._build(directory)
        tensors = {name: torch.from_numpy(values) for name, values in self._tensors(directory).items()}
        missing, unexpected = self.model.load_state_dict(tensors, strict=False, assign=True)
        if unexpected or set(missing) - ({"lm_head.weight"} if config.text.tie_embeddings else set()):
            raise CheckpointError(f"transformers does not take these tensors of {directory}: {missing + unexpected}.")
        self.model.tie_weights()
        _restore_buffers(self.model)
        self.model.eval().requires_grad_(False)

    @abc.abstractmethod
    def _build(self, directory: Path) -> Any:
        """Returns the model without values."""

    @abc.abstractmethod
    def _tensors(self, directory: Path) -> dict[str, np.ndarray]:
        """Returns the tensors with the model's names, float32."""

    @abc.abstractmethod
    def inputs(self, example: Example) -> dict[str, Any]:
        """Returns the arguments of the model for an example."""

    @abc.abstractmethod
    def vision(self, example: Example) -> np.ndarray: ...

    def hidden(self, example: Example) -> np.ndarray:
        inputs = self.inputs(example)
        embedded = self.model.get_input_embeddings()(inputs["input_ids"])
        decoder = self.model.model.language_model
        return decoder(inputs_embeds=embedded, position_ids=inputs.get("position_ids")).last_hidden_state[0].numpy()

    def logits(self, example: Example) -> np.ndarray:
        return self.model(**self.inputs(example)).logits[0].numpy()

    def answer(self, example: Example, n: int) -> list[int]:
        eos = self.eos_token_ids
        inputs = self.inputs(example)
        out = self.model.generate(**inputs, max_new_tokens=n, do_sample=False, eos_token_id=eos, pad_token_id=eos[0])
        tokens = out[0, len(example.input_ids) :].tolist()
        return tokens[:-1] if tokens and tokens[-1] in eos else tokens


class Qwen2VlReference(Reference):
    """Qwen2VLForConditionalGeneration, which is also Tarsier2."""

    def _build(self, directory: Path) -> Any:
        raw = family_of(self.config).config_json(self.config, "qwen2_vl")
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_dict(raw))

    def _tensors(self, directory: Path) -> dict[str, np.ndarray]:
        return {name: np.array(values, np.float32) for name, values in hf_tensors(directory, "qwen2_vl_new")}

    def inputs(self, example: Example) -> dict[str, Any]:
        """Returns the inputs with our position ids: transformers 5 numbers text after a long video differently."""
        inputs = _text_inputs(example) | {"position_ids": torch.from_numpy(example.position_ids).long()[:, None]}
        is_video = np.isin(self.model.config.video_token_id, example.input_ids)
        names = ("pixel_values_videos", "video_grid_thw") if is_video else ("pixel_values", "image_grid_thw")
        if len(example.grid_thw):
            inputs |= {
                names[0]: torch.from_numpy(example.pixel_values),
                names[1]: torch.from_numpy(example.grid_thw).long(),
            }
        return inputs

    def vision(self, example: Example) -> np.ndarray:
        pixels, grid = torch.from_numpy(example.pixel_values), torch.from_numpy(example.grid_thw).long()
        return self.model.model.visual(pixels, grid).pooler_output.numpy()


class Tarsier1Reference(Reference):
    """LlavaForConditionalGeneration: CLIPVisionModel, a projector, and LLaMA or Qwen2.

    The newline and new-image embeddings are tokens of our prompts, so LLaVA needs no change for them. The projector of
    LLaVA is the one of two linear layers; the other one takes its place.
    """

    def _build(self, directory: Path) -> Any:
        # transformers fills in missing fields itself. It would tie the output head by a field that the original
        # ignores.
        raw = {**(read_json(directory / "config.json") or {}), "tie_word_embeddings": self.config.text.tie_embeddings}
        model: Any = LlavaForConditionalGeneration(LlavaConfig.from_dict(raw))
        if self.config.vision.spatial_merge_size > 1:
            model.model.multi_modal_projector = PixelShuffle(self.config)
        return model

    def _tensors(self, directory: Path) -> dict[str, np.ndarray]:
        clip = "vision_tower.vision_model."
        renamed = {
            clip: "model.vision_tower.",
            "multi_modal_projector.": "model.multi_modal_projector.",
            "language_model.model.": "model.language_model.",
            "language_model.lm_head.": "lm_head.",
        }
        tensors = {}
        for name, values in hf_tensors(directory, "tarsier"):
            prefix = next(prefix for prefix in renamed if name.startswith(prefix))
            tensors[renamed[prefix] + name.removeprefix(prefix)] = np.array(values, np.float32)
        return tensors

    def inputs(self, example: Example) -> dict[str, Any]:
        return _text_inputs(example) | self._pixels(example)

    def vision(self, example: Example) -> np.ndarray:
        return torch.cat(self.model.get_image_features(**self._pixels(example)).pooler_output).numpy()

    def _pixels(self, example: Example) -> dict[str, torch.Tensor]:
        """Returns the frames that the patches, in row-major order, are made of."""
        vision = self.config.vision
        if not len(example.grid_thw):
            return {}
        assert isinstance(vision, ClipVisionConfig)
        n, p = vision.grid_size, vision.patch_size
        patches = torch.from_numpy(example.pixel_values).reshape(-1, n, n, vision.in_channels, p, p)
        return {"pixel_values": patches.permute(0, 3, 1, 4, 2, 5).reshape(-1, vision.in_channels, n * p, n * p)}


class PixelShuffle(torch.nn.Module):
    """The original's PixelShuffleMultiModalProjector (branch main)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        vision = config.vision
        self.merge, width = vision.spatial_merge_size, vision.embed_dim * vision.merge_factor
        self.mlp = torch.nn.Sequential(
            torch.nn.LayerNorm(width, eps=vision.norm_eps),
            torch.nn.Linear(width, vision.out_dim),
            torch.nn.GELU(),
            torch.nn.Linear(vision.out_dim, vision.out_dim),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        F, P, E = x.shape
        side = round(P**0.5)
        blocks = x.transpose(1, 2).reshape(F, E, side, side)
        # unfold returns, for each block, the values of its patches channel by channel.
        blocks = torch.nn.functional.unfold(blocks, self.merge, stride=self.merge).transpose(1, 2)
        return self.mlp(blocks.reshape(F, blocks.shape[1], E, -1).transpose(2, 3).flatten(2))


REFERENCES: Mapping[str, type[Reference]] = {QWEN2_VL.name: Qwen2VlReference, TARSIER1.name: Tarsier1Reference}


def _text_inputs(example: Example) -> dict[str, Any]:
    return {
        "input_ids": torch.from_numpy(example.input_ids).long()[None],
        "attention_mask": torch.ones(1, len(example.input_ids), dtype=torch.long),
    }


def _restore_buffers(model: torch.nn.Module) -> None:
    """Computes the buffers that are not in checkpoints, whose values the meta device does not have."""
    for module in list(model.modules()):
        own: Any = module
        if hasattr(own, "inv_freq"):
            fresh = type(own)(own.config)
            own.inv_freq, own.original_inv_freq = fresh.inv_freq, fresh.original_inv_freq
        if hasattr(own, "position_ids"):
            own.position_ids = torch.arange(own.position_ids.shape[-1])[None]
