"""Model configuration: frozen dataclasses. `tarsier_jax.families.load_config` reads them from a checkpoint."""

import dataclasses
from typing import TypeVar

import numpy as np

Patches = TypeVar("Patches", int, np.ndarray)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The Qwen2-VL vision transformer and its patch merger. Defaults are those of Qwen2-VL-7B (and 2B, 72B).

    Attributes:
        depth: Number of blocks.
        embed_dim: Width of the blocks.
        num_heads: Number of attention heads.
        mlp_ratio: Width of the mlp relative to `embed_dim`.
        out_dim: Width of the merger's output and of the decoder; `hidden_size` in config.json.
        in_channels: Color channels.
        patch_size: Height and width of a patch in pixels.
        temporal_patch_size: Frames per patch.
        spatial_merge_size: Patches per side that the merger joins into one token.
        rope_theta: Base of the rotary frequencies.
        norm_eps: Epsilon of the layer norms.
    """

    depth: int = 32
    embed_dim: int = 1280
    num_heads: int = 16
    mlp_ratio: float = 4.0
    out_dim: int = 3584
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    @property
    def patch_dim(self) -> int:
        """Values per flattened patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def merge_factor(self) -> int:
        """Number of patches that the merger joins into one token."""
        return self.spatial_merge_size**2

    def num_tokens(self, patches: Patches) -> Patches:
        """Tokens that the merger makes of a frame, or a bin of frames, with that many patches."""
        return patches // self.merge_factor


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The Qwen2 decoder. Defaults are those of Qwen2-VL-7B.

    Attributes:
        vocab_size: Size of the vocabulary.
        hidden_size: Width of the layers.
        mlp_dim: Width of the mlp.
        num_layers: Number of layers.
        num_heads: Number of query heads.
        num_kv_heads: Number of key-value heads.
        head_dim: Width of a head.
        rope_theta: Base of the rotary frequencies.
        mrope_section: Numbers of frequencies for time, height and width.
        norm_eps: Epsilon of the RMS norms.
        tie_embeddings: Whether the output head is the embedding.
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


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A complete model: the sizes in the checkpoint, and the options of this process.

    Attributes:
        text: Sizes of the decoder.
        vision: Sizes of the vision tower.
        image_token_id: Placeholder of an image.
        video_token_id: Placeholder of a video.
        vision_start_token_id: Token before the placeholders of a visual.
        vision_end_token_id: Token after the placeholders of a visual.
        dtype: Dtype of matrix products. Angles, norms, softmax and logits are always float32.
        param_dtype: Dtype of the parameters.
        attention: One of `tarsier_jax.models.attention.IMPLEMENTATIONS`.
        remat: Activations that the backward pass recomputes: "none", "full" (all except the input of each layer) or
            "dots" (all except the inputs of layers and matrix products).
    """

    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
    image_token_id: int = 151_655
    video_token_id: int = 151_656
    vision_start_token_id: int = 151_652
    vision_end_token_id: int = 151_653
    dtype: str = "float32"
    param_dtype: str = "float32"
    attention: str = "xla"
    remat: str = "none"
