"""Tarsier video-description models in JAX.

model, processor = tarsier_jax.load("path/to/checkpoint")
texts = tarsier_jax.generate(model, processor, [sample])
"""

from typing import TYPE_CHECKING, Any

from tarsier_jax.errors import CheckpointError, InputError, TarsierError

if TYPE_CHECKING:
    from tarsier_jax.api import generate, load

__version__ = "0.1.0"

__all__ = ["CheckpointError", "InputError", "TarsierError", "generate", "load"]


def __getattr__(name: str) -> Any:
    """Imports JAX when `load` or `generate` is used: processes that only decode media files start without it."""
    if name not in ("generate", "load"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tarsier_jax import api

    return getattr(api, name)
