"""Loads images and videos from bytes, paths and URLs of strangers: with limits, and decoded in child processes."""

from infer.media.limits import MediaLimits
from infer.media.loader import MediaLoader
from tarsier_jax.errors import MediaError

__all__ = ["MediaError", "MediaLimits", "MediaLoader"]
