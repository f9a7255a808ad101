"""Rotary position embeddings: two axes (row, column) in the vision tower, three (time, row, column) in the decoder.

A table contains one angle per pair of a head's values, Hh = H/2 in total. Hugging Face's tables repeat them once.

Angles are always float32, because bfloat16 cannot represent position 257.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from tarsier_jax.typing import Array


def inverse_frequencies(dim: int, theta: float) -> np.ndarray:
    """Returns theta ** (-i / dim) for even i < dim, float32 (dim / 2,). RoFormer (arXiv 2104.09864), section 3.2.2."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    # Rounded as in PyTorch: NumPy's float32 power differs in the last bit, which moves logits at position 3000 by 4e-4.
    return np.float32(1) / np.power(theta, exponents.astype(np.float64)).astype(np.float32)


def _cos_and_sin(angles: Array) -> tuple[Array, Array]:
    # Without a barrier, XLA may recompute the cosines for every head of every layer that reads them.
    return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


def mrope_tables(
    position_ids: Int[Array, "B S 3"], head_dim: int, theta: float, sections: tuple[int, ...]
) -> tuple[Float[Array, "B S Hh"], Float[Array, "B S Hh"]]:
    """Returns cos and sin of multimodal RoPE.

    The first sections[0] frequencies belong to time, the next sections to row, then column. Further sections repeat
    time, row and column, which allows slow and fast frequencies per axis.

    Source: HF modeling_qwen2_vl.Qwen2VLRotaryEmbedding; Qwen2-VL report (arXiv 2409.12191), section 2.1.
    """
    axis = np.repeat(np.arange(len(sections)) % 3, sections)  # (H/2,), the axis of each frequency
    positions = position_ids.astype(jnp.float32)[..., axis]  # (B, S, Hh)
    return _cos_and_sin(positions * inverse_frequencies(head_dim, theta))


def vision_tables(
    coordinates: Int[Array, "F P 2"], head_dim: int, theta: float
) -> tuple[Float[Array, "F P Hh"], Float[Array, "F P Hh"]]:
    """Returns cos and sin for patches at (row, column); half of the frequencies belong to each axis.

    Source: HF modeling_qwen2_vl.Qwen2VLVisionRotaryEmbedding.
    """
    frequencies = inverse_frequencies(head_dim // 2, theta)  # (H/4,)
    angles = coordinates.astype(jnp.float32)[..., None] * frequencies  # (F, P, 2, H/4)
    return _cos_and_sin(angles.reshape(*coordinates.shape[:-1], head_dim // 2))  # (F, P, Hh)


def rotate(x: Float[Array, "B S N H"], cos: Float[Array, "B S Hh"], sin: Float[Array, "B S Hh"]) -> Array:
    """Rotates each pair (x[i], x[i + H/2]) by its angle, in float32, and returns x's dtype.

    Source: HF modeling_qwen2_vl.rotate_half.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]  # the same for every head
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
