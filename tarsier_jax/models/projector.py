"""Projection of vision features to the width of the decoder."""

import jax
from flax import nnx
from jaxtyping import Float

from tarsier_jax.config import ModelConfig
from tarsier_jax.models.layers import LayerNorm, Linear
from tarsier_jax.typing import Array


class PatchMerger(nnx.Module):
    """Joins each 2 x 2 block of patches into one token. HF modeling_qwen2_vl.PatchMerger."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vision, dtypes = config.vision, {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.merge_factor = vision.merge_factor
        width = vision.embed_dim * vision.merge_factor
        self.norm = LayerNorm(vision.embed_dim, vision.norm_eps, config.param_dtype)
        self.fc1 = Linear(width, width, bias=True, rngs=rngs, **dtypes)
        self.fc2 = Linear(width, vision.out_dim, bias=True, rngs=rngs, **dtypes)

    def __call__(self, x: Float[Array, "F P E"]) -> Float[Array, "F Pm D"]:
        F, P, E = x.shape
        # Patches are in block order: the four patches of a block are adjacent.
        x = self.norm(x).reshape(F, P // self.merge_factor, E * self.merge_factor)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))
