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


def load_reference(directory: Path, config: ModelConfig, eos_token_ids: tuple[int, ...]) -> Backend:
    """Loads the PyTorch model in transformers, with the tensors of any supported layout.

    Raises:
        CheckpointError: torch is not installed, or transformers rejects the tensors.
    """
    try:
        from convert.references import REFERENCES
    except ImportError:
        raise CheckpointError(
            "The comparison with the PyTorch reference needs torch. Install it with `pip install -e '.[test]'`, or "
            "pass a second directory to compare with."
        ) from None
    return REFERENCES[family_of(config).name](directory, config, eos_token_ids)
