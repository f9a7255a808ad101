"""CLIP's vision transformer with the projector of the first Tarsier.

Every frame has the same size, so attention needs no mask. A bin of P patches contains P / N frames of N patches.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from tarsier_jax.config import ClipVisionConfig, ModelConfig
from tarsier_jax.models.attention import attend
from tarsier_jax.models.layers import Embedding, LayerNorm, Linear, apply_layers, first_layers, stack_layers
from tarsier_jax.models.projector import MlpProjector, PixelShuffleProjector
from tarsier_jax.models.vision_layers import VisionMlp, encode_bins
from tarsier_jax.sharding import BATCH, HEADS, constrain, gather_parameters
from tarsier_jax.typing import Array


class ClipEmbeddings(nnx.Module):
    """Adds the class token before the patches, and learned positions. HF modeling_clip.CLIPVisionEmbeddings."""

    def __init__(self, vision: ClipVisionConfig, param_dtype: str, rngs: nnx.Rngs):
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (vision.embed_dim,), param_dtype))
        self.position_embedding = Embedding(vision.num_patches + 1, vision.embed_dim, param_dtype, rngs)

    def __call__(self, x: Float[Array, "frames N E"]) -> Float[Array, "frames N+1 E"]:
        class_embedding = self.class_embedding[...].astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(class_embedding, (x.shape[0], 1, x.shape[2])), x], axis=1)
        return x + self.position_embedding.weight[...].astype(x.dtype)


class ClipAttention(nnx.Module):
    """Bidirectional attention among the tokens of a frame. HF modeling_clip.CLIPAttention."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        E, dtypes = config.vision.embed_dim, {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.head_dim, self.implementation = config.vision.head_dim, config.attention
        self.q = Linear(E, E, bias=True, rngs=rngs, **dtypes)
        self.k = Linear(E, E, bias=True, rngs=rngs, **dtypes)
        self.v = Linear(E, E, bias=True, rngs=rngs, **dtypes)
        self.proj = Linear(E, E, bias=True, rngs=rngs, **dtypes)

    def __call__(self, x: Float[Array, "frames T E"]) -> Float[Array, "frames T E"]:
        q, k, v = (f(x).reshape(*x.shape[:2], -1, self.head_dim) for f in (self.q, self.k, self.v))
        q, k, v = (constrain(y, BATCH, None, HEADS, None) for y in (q, k, v))
        return self.proj(attend(q, k, v, implementation=self.implementation).reshape(x.shape))


class ClipBlock(nnx.Module):
    """Attention and MLP with residual connections. HF modeling_clip.CLIPEncoderLayer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vision = config.vision
        self.norm1 = LayerNorm(vision.embed_dim, vision.norm_eps, config.param_dtype)
        self.attn = ClipAttention(config, rngs)
        self.norm2 = LayerNorm(vision.embed_dim, vision.norm_eps, config.param_dtype)
        self.mlp = VisionMlp(config, rngs)

    def __call__(self, x: Float[Array, "frames T E"]) -> Float[Array, "frames T E"]:
        with jax.named_scope("attn"):
            x = x + self.attn(self.norm1(x))
        with jax.named_scope("mlp"):
            return x + self.mlp(self.norm2(x))


class ClipVisionTransformer(nnx.Module):
    """Encodes patches as tokens of the decoder's width. HF modeling_clip.CLIPVisionTransformer and a projector.

    The blocks after `feature_layer` and the last norm are parameters that are not run: checkpoints contain them, and
    exports must return them.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vision, dtypes = config.vision, {"dtype": config.dtype, "param_dtype": config.param_dtype}
        assert isinstance(vision, ClipVisionConfig)
        self.config, self.vision = config, vision
        self.patch_embed = Linear(vision.patch_dim, vision.embed_dim, bias=False, rngs=rngs, **dtypes)
        self.embeddings = ClipEmbeddings(vision, config.param_dtype, rngs)
        self.pre_norm = LayerNorm(vision.embed_dim, vision.norm_eps, config.param_dtype)
        self.blocks = stack_layers(lambda r: ClipBlock(config, r), vision.depth, rngs)
        self.post_norm = LayerNorm(vision.embed_dim, vision.norm_eps, config.param_dtype)
        projector = MlpProjector if vision.spatial_merge_size == 1 else PixelShuffleProjector
        self.projector = projector(config, rngs)

    def __call__(self, patches: Float[Array, "F P C"], frame_hw: Int[Array, "F M 2"]) -> Float[Array, "F Pm D"]:
        """Returns the features of patches, or of merged patches.

        Args:
            patches: Flattened patches in row-major order. P is a multiple of the number of patches of a frame.
            frame_hw: Height and width in patches of the frames in each bin; (0, 0) for none. Not read, since all
                frames have one size.

        Returns:
            One feature per patch, or merged patch; those at padding are arbitrary.

        Raises:
            ValueError: bins do not contain whole frames.
        """
        if patches.shape[1] % self.vision.num_patches:
            raise ValueError(
                f"A bin has {patches.shape[1]} patches, but must contain whole frames of {self.vision.num_patches}."
            )
        return encode_bins(self, patches, frame_hw)

    def run(self, patches: Array, frame_hw: Array) -> Array:
        """Returns the features of the bins of one device."""
        F, P, C = patches.shape
        patch_embed = gather_parameters(self.patch_embed, "vision/patch_embed")
        x = patch_embed(constrain(patches.reshape(-1, self.vision.num_patches, C), BATCH, None, None))

        def block(x: Array, layer: ClipBlock) -> Array:
            return constrain(gather_parameters(layer, "vision/blocks", is_layer=True)(x), BATCH, None, None)

        blocks = first_layers(self.blocks, self.vision.num_blocks)
        x = apply_layers(block, self.pre_norm(self.embeddings(x)), blocks, self.config.remat)
        features = gather_parameters(self.projector, "vision/projector")(x[:, 1:])  # without the class token
        return features.reshape(F, self.vision.num_tokens(P), -1)
