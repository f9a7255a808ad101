"""Qwen2-VL's vision transformer, with frames as the batch.

The reference runs all patches as one sequence in which each patch attends only within its temporal patch (here: its
frame). Frames as batch entries, padded to a common number of patches, are equivalent and have static shapes. Several
small frames may share an entry (a bin); patches attend within their frame.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from tarsier_jax.config import ModelConfig, Qwen2VisionConfig
from tarsier_jax.models.attention import attend
from tarsier_jax.models.layers import LayerNorm, Linear, apply_layers, stack_layers
from tarsier_jax.models.projector import PatchMerger
from tarsier_jax.models.rope import rotate, vision_tables
from tarsier_jax.models.vision_layers import VisionMlp, encode_bins
from tarsier_jax.sharding import BATCH, HEADS, constrain, gather_parameters
from tarsier_jax.typing import Array


def frame_of_patch(frame_hw: Int[Array, "F M 2"], patches: int) -> Int[Array, "F P"]:
    """Returns the index of each patch's frame among the M frames of its bin; M for padding."""
    ends = jnp.cumsum(frame_hw.prod(axis=-1), axis=-1)  # (F, M)
    return jnp.sum(jnp.arange(patches)[:, None] >= ends[:, None], axis=-1)


def patch_coordinates(frame_hw: Int[Array, "F M 2"], patches: int, merge: int) -> Int[Array, "F P 2"]:
    """Returns row and column of each patch, in block order: 2 x 2 blocks row by row, each block row by row.

    Source: the position ids in HF modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel. Values at padding are
    arbitrary.
    """
    sizes = frame_hw.prod(axis=-1)  # (F, M)
    frame = jnp.minimum(frame_of_patch(frame_hw, patches), frame_hw.shape[1] - 1)  # (F, P)
    starts = jnp.take_along_axis(jnp.cumsum(sizes, axis=-1) - sizes, frame, axis=1)
    blocks_per_row = jnp.maximum(jnp.take_along_axis(frame_hw[..., 1], frame, axis=1) // merge, 1)  # (F, P)
    block, within = jnp.divmod(jnp.arange(patches) - starts, merge * merge)
    row = block // blocks_per_row * merge + within // merge
    column = block % blocks_per_row * merge + within % merge
    return jnp.stack([row, column], axis=-1)


class VisionAttention(nnx.Module):
    """Bidirectional attention among the patches of a frame. HF modeling_qwen2_vl.VisionAttention."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vision, dtypes = config.vision, {"dtype": config.dtype, "param_dtype": config.param_dtype}
        E = vision.embed_dim
        self.head_dim, self.implementation = vision.head_dim, config.attention
        self.qkv = Linear(E, 3, E, bias=True, rngs=rngs, **dtypes)
        self.proj = Linear(E, E, bias=True, rngs=rngs, **dtypes)

    def __call__(self, x: Float[Array, "F P E"], cos: Array, sin: Array, visible: dict[str, Any]) -> Array:
        F, P, E = x.shape
        qkv = self.qkv(x).reshape(F, P, 3, E // self.head_dim, self.head_dim)
        q, k, v = (constrain(qkv[:, :, i], BATCH, None, HEADS, None) for i in range(3))  # [F, P, N, H]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = attend(q, k, v, **visible, implementation=self.implementation)
        return self.proj(out.reshape(F, P, E))


class VisionBlock(nnx.Module):
    """Attention and MLP with residual connections. HF modeling_qwen2_vl.Qwen2VLVisionBlock."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vision = config.vision
        self.norm1 = LayerNorm(vision.embed_dim, vision.norm_eps, config.param_dtype)
        self.attn = VisionAttention(config, rngs)
        self.norm2 = LayerNorm(vision.embed_dim, vision.norm_eps, config.param_dtype)
        self.mlp = VisionMlp(config, rngs)

    def __call__(self, x: Float[Array, "F P E"], cos: Array, sin: Array, visible: dict[str, Any]) -> Array:
        with jax.named_scope("attn"):
            x = x + self.attn(self.norm1(x), cos, sin, visible)
        with jax.named_scope("mlp"):
            return x + self.mlp(self.norm2(x))


class VisionTransformer(nnx.Module):
    """Encodes patches as tokens of the decoder's width. HF modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vision, dtypes = config.vision, {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.config = config
        self.patch_embed = Linear(vision.patch_dim, vision.embed_dim, bias=False, rngs=rngs, **dtypes)
        self.blocks = stack_layers(lambda r: VisionBlock(config, r), vision.depth, rngs)
        self.merger = PatchMerger(config, rngs)

    def __call__(self, patches: Float[Array, "F P C"], frame_hw: Int[Array, "F M 2"]) -> Float[Array, "F Pm D"]:
        """Returns the features of merged patches.

        Args:
            patches: Flattened patches in block order.
            frame_hw: Height and width in patches of the frames in each bin; (0, 0) for none.

        Returns:
            One feature per merged patch; those at padding are arbitrary.
        """
        return encode_bins(self, patches, frame_hw)

    def run(self, patches: Array, frame_hw: Array) -> Array:
        """Returns the features of the bins of one device."""
        vision = self.config.vision
        assert isinstance(vision, Qwen2VisionConfig)
        coordinates = patch_coordinates(frame_hw, patches.shape[1], vision.spatial_merge_size)
        cos, sin = vision_tables(coordinates, vision.head_dim, vision.rope_theta)
        if frame_hw.shape[1] == 1:
            visible = {"kv_lengths": frame_hw[:, 0].prod(axis=-1)}
        else:
            visible = {"segment_ids": frame_of_patch(frame_hw, patches.shape[1])}

        def block(x: Array, layer: VisionBlock) -> Array:
            layer = gather_parameters(layer, "vision/blocks", is_layer=True)
            return constrain(layer(x, cos, sin, visible), BATCH, None, None)

        x = gather_parameters(self.patch_embed, "vision/patch_embed")(constrain(patches, BATCH, None, None))
        x = apply_layers(block, x, self.blocks, self.config.remat)
        return gather_parameters(self.merger, "vision/merger")(x)
