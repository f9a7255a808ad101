"""Model configuration: frozen dataclasses. `tarsier_jax.families.load_config` reads them from a checkpoint."""

import dataclasses
from typing import TypeVar

import numpy as np

Patches = TypeVar("Patches", int, np.ndarray)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The Qwen2-VL vision transformer and its patch merger. Defaults are those of Qwen2-VL-7B (and 2B, 72B)."""

    depth: int = 32
    embed_dim: int = 1280
    num_heads: int = 16
    mlp_ratio: float = 4.0
    out_dim: int = 3584  # the decoder's width; `hidden_size` in config.json
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    @property
    def patch_dim(self) -> int:
        """Values in one flattened patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def merge_factor(self) -> int:
        """Patches that the merger joins into one token."""
        return self.spatial_merge_size**2

    def num_tokens(self, patches: Patches) -> Patches:
        """Tokens that the merger makes of a frame, or a bin of frames, with that many patches."""
        return patches // self.merge_factor


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The Qwen2 decoder. Defaults are those of Qwen2-VL-7B."""

    vocab_size: int = 152_064
    hidden_size: int = 3584
    mlp_dim: int = 18_944
    num_layers: int = 28
    num_heads: int = 28
    num_kv_heads: int = 4
    head_dim: int = 128
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, ...] = (16, 24, 24)  # frequencies turned by time, height and width, in turn
    norm_eps: float = 1e-6
    tie_embeddings: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole model: what the checkpoint fixes, and how this process runs it.

    `dtype` is what matrix products are computed in; angles, norms, softmax and logits are float32 whatever it says.
    `attention` is one of `tarsier_jax.models.attention.IMPLEMENTATIONS`. `remat` is what the backward pass recomputes:
    "none", "full" (keep only each layer's input) or "dots" (keep matrix products too).
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
