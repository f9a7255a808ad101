"""Tarsier video-description models in JAX.

model, processor = tarsier_jax.load("path/to/checkpoint")
texts = tarsier_jax.generate(model, processor, [sample])
"""

from tarsier_jax.api import generate, load
from tarsier_jax.errors import CheckpointError, InputError, TarsierError

__version__ = "0.1.0"

__all__ = ["CheckpointError", "InputError", "TarsierError", "generate", "load"]
