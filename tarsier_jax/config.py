"""Model configuration: frozen dataclasses. `tarsier_jax.families.load_config` reads them from a checkpoint."""

import abc
import dataclasses
import math
from typing import TypeVar

import numpy as np

Patches = TypeVar("Patches", int, np.ndarray)


@dataclasses.dataclass(frozen=True)
class VisionConfig(abc.ABC):
    """The sizes that every vision tower has.

    Frames have any size within a limit of pixels, unless a subclass overrides the members for the sizes of frames.

    Attributes:
        depth: Number of blocks.
        embed_dim: Width of the blocks.
        num_heads: Number of attention heads.
        out_dim: Width of the features and of the decoder.
        in_channels: Color channels.
        patch_size: Height and width of a patch in pixels.
        temporal_patch_size: Frames per patch.
        spatial_merge_size: Patches per side that the projector joins into one token.
        norm_eps: Epsilon of the layer norms.
    """

    depth: int
    embed_dim: int
    num_heads: int
    out_dim: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    norm_eps: float

    @property
    def patch_dim(self) -> int:
        """Values per flattened patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    @abc.abstractmethod
    def mlp_dim(self) -> int:
        """Width of the mlp."""

    @property
    def merge_factor(self) -> int:
        """Number of patches that the projector joins into one token."""
        return self.spatial_merge_size**2

    @property
    def smallest_frame(self) -> int:
        """Number of patches of the smallest frame. Those of Qwen2-VL have at least 56 x 56 pixels."""
        return 16

    @property
    def bin_multiple(self) -> int:
        """Divisor of the number of patches of a bin."""
        return self.merge_factor

    def num_tokens(self, patches: Patches) -> Patches:
        """Tokens that the projector makes of a frame, or a bin of frames, with that many patches."""
        return patches // self.merge_factor

    def frame_tokens(self, patches: int) -> int:
        """Returns the number of tokens in a prompt for a frame with that many patches."""
        return self.num_tokens(patches)

    def largest_frame(self, max_pixels: int) -> int:
        """Returns the number of patches of the largest frame within `max_pixels`, with sides rounded to whole tokens.

        A side of h tokens is rounded from at least h - 1/2. Frames are at most four times as wide as high; a flatter
        frame may have more patches.
        """
        budget = self.budget_tokens(max_pixels)
        sides = [(h, int(budget / (h - 0.5) + 0.5)) for h in range(1, math.isqrt(int(budget)) + 2)]
        tokens = max((h * w for h, w in sides if h <= w <= 4 * h), default=math.ceil(budget))
        return tokens * self.merge_factor

    def budget_tokens(self, max_pixels: int) -> float:
        """Returns the number of tokens in a prompt for a frame of `max_pixels`, before its sides are rounded."""
        return max_pixels / (self.patch_size * self.spatial_merge_size) ** 2


@dataclasses.dataclass(frozen=True)
class Qwen2VisionConfig(VisionConfig):
    """The Qwen2-VL vision transformer and its patch merger. Defaults are those of Qwen2-VL-7B (and 2B, 72B).

    Attributes:
        out_dim: Width of the merger's output and of the decoder; `hidden_size` in config.json.
        mlp_ratio: Width of the mlp relative to `embed_dim`.
        rope_theta: Base of the rotary frequencies.
    """

    depth: int = 32
    embed_dim: int = 1280
    num_heads: int = 16
    out_dim: int = 3584
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    norm_eps: float = 1e-6
    mlp_ratio: float = 4.0
    rope_theta: float = 10_000.0

    @property
    def mlp_dim(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig(VisionConfig):
    """The CLIP vision transformer and its projector. Defaults are those of CLIP ViT-L/14-336 in Tarsier-7b.

    All frames have one size.

    Attributes:
        depth: Number of blocks in the checkpoint. Those after `feature_layer` are not run.
        spatial_merge_size: 1 for the projector of two linear layers, 2 for the pixel-shuffle projector.
        image_size: Height and width of a frame in pixels.
        intermediate_size: Width of the mlp.
        feature_layer: Index from the end, -1 or lower, of the block whose output the projector reads.
    """

    depth: int = 24
    embed_dim: int = 1024
    num_heads: int = 16
    out_dim: int = 4096
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 1
    spatial_merge_size: int = 1
    norm_eps: float = 1e-5
    image_size: int = 336
    intermediate_size: int = 4096
    feature_layer: int = -2

    @property
    def mlp_dim(self) -> int:
        return self.intermediate_size

    @property
    def grid_size(self) -> int:
        """Patches per side of a frame."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a frame."""
        return self.grid_size**2

    @property
    def smallest_frame(self) -> int:
        return self.num_patches

    @property
    def bin_multiple(self) -> int:
        return self.num_patches

    def frame_tokens(self, patches: int) -> int:
        """Returns the number of tokens in a prompt for a frame: rows with a newline each, and a new-image token."""
        side = self.grid_size // self.spatial_merge_size
        return side * (side + 1) + 1

    def largest_frame(self, max_pixels: int) -> int:
        return self.num_patches

    def budget_tokens(self, max_pixels: int) -> float:
        return self.frame_tokens(self.num_patches)

    @property
    def num_blocks(self) -> int:
        """Number of blocks that are run."""
        return self.depth + 1 + self.feature_layer


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder of Qwen2 and LLaMA. Defaults are those of Qwen2-VL-7B.

    Attributes:
        vocab_size: Size of the vocabulary.
        hidden_size: Width of the layers.
        mlp_dim: Width of the mlp.
        num_layers: Number of layers.
        num_heads: Number of query heads.
        num_kv_heads: Number of key-value heads.
        head_dim: Width of a head.
        rope_theta: Base of the rotary frequencies.
        mrope_section: Numbers of frequencies for time, height and width. (head_dim / 2, 0, 0) is RoPE with one axis.
        norm_eps: Epsilon of the RMS norms.
        tie_embeddings: Whether the output head is the embedding.
        qkv_bias: Whether queries, keys and values have biases, as in Qwen2.
    """

    vocab_size: int = 152_064
    hidden_size: int = 3584
    mlp_dim: int = 18_944
    num_layers: int = 28
    num_heads: int = 28
    num_kv_heads: int = 4
    head_dim: int = 128
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, ...] = (16, 24, 24)
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A complete model: the sizes in the checkpoint, and the options of this process.

    Attributes:
        text: Sizes of the decoder.
        vision: Sizes of the vision tower.
        image_token_id: Placeholder of an image.
        video_token_id: Placeholder of a video. The first Tarsier has one placeholder for both.
        vision_start_token_id: Token before the placeholders of a visual, or None.
        vision_end_token_id: Token after the placeholders of a visual, or None.
        image_newline_id: Row of the embedding table after each row of visual tokens, or None.
        image_new_id: Row of the embedding table after the visual tokens of each frame, or None.
        dtype: Dtype of matrix products. Angles, norms, softmax and logits are always float32.
        param_dtype: Dtype of the parameters.
        attention: One of `tarsier_jax.models.attention.IMPLEMENTATIONS`.
        remat: Activations that the backward pass recomputes: "none", "full" (all except the input of each layer) or
            "dots" (all except the inputs of layers and matrix products).
    """

    text: TextConfig = TextConfig()
    vision: VisionConfig = Qwen2VisionConfig()
    image_token_id: int = 151_655
    video_token_id: int = 151_656
    vision_start_token_id: int | None = 151_652
    vision_end_token_id: int | None = 151_653
    image_newline_id: int | None = None
    image_new_id: int | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    attention: str = "xla"
    remat: str = "none"
