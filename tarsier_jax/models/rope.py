"""Rotary position embeddings: two axes (row, column) in the vision tower, three (time, row, column) in the decoder.

A table holds one angle for each pair of a head's values, so H/2 of them; Hugging Face's tables repeat them once.

Angles are float32 whatever the compute dtype: bfloat16 cannot hold position 257.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def inverse_frequencies(dim: int, theta: float) -> np.ndarray:
    return 1.0 / (theta ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)))


def _cos_and_sin(angles: Array) -> tuple[Array, Array]:
    # Behind a barrier, or XLA may compute the cosines anew for every head of every layer that reads them.
    return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


def mrope_tables(
    position_ids: Int[Array, "B S 3"], head_dim: int, theta: float, sections: tuple[int, ...]
) -> tuple[Float[Array, "B S H/2"], Float[Array, "B S H/2"]]:
    """cos and sin of multimodal RoPE: the first sections[0] frequencies turn with time, the next with row, then column.

    More sections go on with time, row and column again, so that each axis can have slow and fast ones.

    Source: HF modeling_qwen2_vl.Qwen2VLRotaryEmbedding; Qwen2-VL report (arXiv 2409.12191), section 2.1.
    """
    axis = np.repeat(np.arange(len(sections)) % 3, sections)  # (H/2,) which position turns each frequency
    positions = position_ids.astype(jnp.float32)[..., axis]  # (B, S, H/2)
    return _cos_and_sin(positions * inverse_frequencies(head_dim, theta))


def vision_tables(
    coordinates: Int[Array, "F P 2"], head_dim: int, theta: float
) -> tuple[Float[Array, "F P H/2"], Float[Array, "F P H/2"]]:
    """cos and sin for patches at (row, column): half of the frequencies turn with each.

    Source: HF modeling_qwen2_vl.Qwen2VLVisionRotaryEmbedding.
    """
    frequencies = inverse_frequencies(head_dim // 2, theta)  # (H/4,)
    angles = coordinates.astype(jnp.float32)[..., None] * frequencies  # (F, P, 2, H/4)
    return _cos_and_sin(angles.reshape(*coordinates.shape[:-1], head_dim // 2))  # (F, P, H/2)


def rotate(x: Float[Array, "B S N H"], cos: Float[Array, "B S H/2"], sin: Float[Array, "B S H/2"]) -> Array:
    """Turns each pair (x[i], x[i + H/2]) by its angle, in float32; the result has x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]  # the same for every head
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
