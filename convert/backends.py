"""Two backends that run a checkpoint, ours and Hugging Face's, with the four calls that `convert.verify` compares."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tarsier_jax.api import answer, use_mesh_of
from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import CheckpointError
from tarsier_jax.families import family_of
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.batch import Batch, Example
from tarsier_jax.processing.processor import Processor
from tarsier_jax.weights import hf_tensors


class Backend(Protocol):
    """The outputs of a model that are compared, for one unpadded example."""

    def vision(self, example: Example) -> np.ndarray:
        """Returns the features of all visual tokens, float32 (visual tokens, D)."""
        ...

    def hidden(self, example: Example) -> np.ndarray:
        """Returns the decoder's final hidden states for the plain token embeddings, float32 (S, D)."""
        ...

    def logits(self, example: Example) -> np.ndarray:
        """Returns the logits, float32 (S, V)."""
        ...

    def answer(self, example: Example, n: int) -> list[int]:
        """Returns at most `n` greedy tokens, without the end of sequence."""
        ...


class Ours:
    """A model of this project."""

    def __init__(self, model: Tarsier, processor: Processor):
        self.model, self.processor = model, processor
        self._vision = jax.jit(lambda m, b: m.vision(b.patches[0], b.frame_hw[0]))
        self._hidden = jax.jit(
            lambda m, b: m.decoder(m.decoder.embed(b.input_ids).astype(m.config.dtype), b.position_ids)
        )
        self._logits = jax.jit(lambda m, b: m(b))

    def _run(self, function: Callable[[Tarsier, Batch], Any], batch: Batch) -> Any:
        with use_mesh_of(self.model):
            return function(self.model, jax.tree.map(jnp.asarray, batch))

    def vision(self, example: Example) -> np.ndarray:
        batch = self.processor.batch([example])
        features = np.asarray(self._run(self._vision, batch), np.float32)
        return features.reshape(-1, features.shape[-1])[batch.vision_token_index[batch.vision_token_index >= 0]]

    def hidden(self, example: Example) -> np.ndarray:
        x = self._run(self._hidden, self.processor.batch([example]))
        return np.asarray(x[0, : len(example.input_ids)], np.float32)

    def logits(self, example: Example) -> np.ndarray:
        return np.asarray(self._run(self._logits, self.processor.batch([example]))[0, : len(example.input_ids)])

    def answer(self, example: Example, n: int) -> list[int]:
        (generation,) = answer(self.model, self.processor, [example], SamplingOptions(max_new_tokens=n))
        return generation.tokens


class HuggingFace:
    """The PyTorch model in transformers, with the tensors of any supported layout."""

    def __init__(self, directory: Path, config: ModelConfig, eos_token_ids: tuple[int, ...]):
        """Loads the model.

        Raises:
            CheckpointError: torch is not installed, or transformers rejects the tensors.
        """
        try:
            import torch
            from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
        except ImportError:
            raise CheckpointError(
                "The comparison with the PyTorch reference needs torch. Install it with `pip install -e '.[test]'`, or "
                "pass a second directory to compare with."
            ) from None
        self.torch, self.eos_token_ids = torch, list(eos_token_ids)
        with torch.device("meta"):
            raw = family_of(config).config_json(config, "qwen2_vl")
            model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_dict(raw))
        tensors = {
            name: torch.from_numpy(np.array(value, np.float32)) for name, value in hf_tensors(directory, "qwen2_vl_new")
        }
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
        if unexpected or set(missing) - ({"lm_head.weight"} if config.text.tie_embeddings else set()):
            raise CheckpointError(f"transformers does not take these tensors of {directory}: {missing + unexpected}.")
        model.tie_weights()
        rotary: Any
        for rotary in (model.model.language_model.rotary_emb, model.model.visual.rotary_pos_emb):
            fresh = type(rotary)(rotary.config)  # not parameters: the meta device lacks their values
            rotary.inv_freq, rotary.original_inv_freq = fresh.inv_freq, fresh.original_inv_freq
        self.model: Any = model.eval().requires_grad_(False)

    def _inputs(self, example: Example) -> dict[str, Any]:
        """Returns the inputs with our position ids: transformers 5 numbers text after a long video differently."""
        torch = self.torch
        inputs = {
            "input_ids": torch.from_numpy(example.input_ids).long()[None],
            "attention_mask": torch.ones(1, len(example.input_ids), dtype=torch.long),
            "position_ids": torch.from_numpy(example.position_ids).long()[:, None],
        }
        is_video = np.isin(self.model.config.video_token_id, example.input_ids)
        names = ("pixel_values_videos", "video_grid_thw") if is_video else ("pixel_values", "image_grid_thw")
        if len(example.grid_thw):
            inputs |= {
                names[0]: torch.from_numpy(example.pixel_values),
                names[1]: torch.from_numpy(example.grid_thw).long(),
            }
        return inputs

    def vision(self, example: Example) -> np.ndarray:
        pixels, grid = self.torch.from_numpy(example.pixel_values), self.torch.from_numpy(example.grid_thw).long()
        return self.model.model.visual(pixels, grid).pooler_output.numpy()

    def hidden(self, example: Example) -> np.ndarray:
        inputs = self._inputs(example)
        embedded = self.model.get_input_embeddings()(inputs["input_ids"])
        decoder = self.model.model.language_model
        return decoder(inputs_embeds=embedded, position_ids=inputs["position_ids"]).last_hidden_state[0].numpy()

    def logits(self, example: Example) -> np.ndarray:
        return self.model(**self._inputs(example)).logits[0].numpy()

    def answer(self, example: Example, n: int) -> list[int]:
        eos = self.eos_token_ids
        inputs = self._inputs(example)
        out = self.model.generate(**inputs, max_new_tokens=n, do_sample=False, eos_token_id=eos, pad_token_id=eos[0])
        tokens = out[0, len(example.input_ids) :].tolist()
        return tokens[:-1] if tokens and tokens[-1] in eos else tokens
