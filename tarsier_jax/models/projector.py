"""Projection of vision features to the width of the decoder."""

import math

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


class MlpProjector(nnx.Module):
    """Projects each patch by two linear layers. HF modeling_llava.LlavaMultiModalProjector."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vision, dtypes = config.vision, {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.linear_1 = Linear(vision.embed_dim, vision.out_dim, bias=True, rngs=rngs, **dtypes)
        self.linear_2 = Linear(vision.out_dim, vision.out_dim, bias=True, rngs=rngs, **dtypes)

    def __call__(self, x: Float[Array, "F P E"]) -> Float[Array, "F P D"]:
        return self.linear_2(jax.nn.gelu(self.linear_1(x), approximate=False))


class PixelShuffleProjector(nnx.Module):
    """Joins each 2 x 2 block of a square frame's patches into one token.

    Source: the class PixelShuffleMultiModalProjector of bytedance/tarsier, branch main.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vision, dtypes = config.vision, {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.merge = vision.spatial_merge_size
        width = vision.embed_dim * vision.merge_factor
        self.norm = LayerNorm(width, vision.norm_eps, config.param_dtype)
        self.fc1 = Linear(width, vision.out_dim, bias=True, rngs=rngs, **dtypes)
        self.fc2 = Linear(vision.out_dim, vision.out_dim, bias=True, rngs=rngs, **dtypes)

    def __call__(self, x: Float[Array, "F P E"]) -> Float[Array, "F Pm D"]:
        F, P, E = x.shape
        m, side = self.merge, math.isqrt(P) // self.merge
        # Patches are in row-major order: [row of blocks, row in block, column of blocks, column in block].
        x = x.reshape(F, side, m, side, m, E).swapaxes(2, 3).reshape(F, side * side, m * m * E)
        return self.fc2(jax.nn.gelu(self.fc1(self.norm(x)), approximate=False))
