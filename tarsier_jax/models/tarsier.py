"""The complete model: vision tower, projector, and decoder over text and visual tokens."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from tarsier_jax.config import ModelConfig
from tarsier_jax.models.cache import KVCache
from tarsier_jax.models.clip_vit import ClipVisionTransformer
from tarsier_jax.models.decoder import Decoder
from tarsier_jax.models.layers import unstack_layers
from tarsier_jax.models.qwen2_vit import VisionTransformer
from tarsier_jax.processing.batch import Batch
from tarsier_jax.sharding import BATCH, bin_padding, constrain
from tarsier_jax.typing import Array


class Tarsier(nnx.Module):
    """Tarsier2 and Qwen2-VL. HF modeling_qwen2_vl.Qwen2VLForConditionalGeneration."""

    vision_tower: type[VisionTransformer | ClipVisionTransformer] = VisionTransformer

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.vision = self.vision_tower(config, rngs)
        self.decoder = Decoder(config, rngs)

    def embed(self, batch: Batch) -> Float[Array, "B S D"]:
        """Returns the token embeddings, with the vision tower's features at the visual tokens."""
        if batch.patches.shape[1] == 0:  # text only: a shape, known when tracing
            return self.decoder.embed(batch.input_ids).astype(self.config.dtype)
        return self.merge_vision_embeddings(batch, self.encode_frames(batch.patches, batch.frame_hw))

    def encode_frames(
        self, patches: Float[Array, "G F P C"], frame_hw: Int[Array, "G F M 2"]
    ) -> Float[Array, "G features D"]:
        """Returns the vision tower's features of each group's frames. HF get_image_features."""
        G, F, P, C = patches.shape
        # Empty bins, with which each device has bins of its own groups.
        padding = ((0, 0), (0, bin_padding(G, F)), (0, 0), (0, 0))
        patches, frame_hw = jnp.pad(patches, padding), jnp.pad(frame_hw, padding)
        features = self.vision(patches.reshape(-1, P, C), frame_hw.reshape(-1, *frame_hw.shape[2:]))
        features = constrain(features.reshape(G, -1, *features.shape[1:]), BATCH, None, None, None)
        return features[:, :F].reshape(G, -1, features.shape[-1])

    def merge_vision_embeddings(self, batch: Batch, features: Float[Array, "G features D"]) -> Float[Array, "B S D"]:
        """Returns the token embeddings, with each group's features at the tokens in `batch.vision_token_index`.

        The frames in `batch` are not read.
        """
        x = self.decoder.embed(batch.input_ids).astype(self.config.dtype)
        G = features.shape[0]
        index = jnp.maximum(batch.vision_token_index, 0).reshape(G, -1, 1)  # [G, B/G * S, 1]
        visual = jnp.take_along_axis(features, index, axis=1).reshape(x.shape)
        return jnp.where((batch.vision_token_index >= 0)[..., None], visual, x)

    def hidden(self, batch: Batch) -> Float[Array, "B S D"]:
        """Returns the final hidden states, the input of `decoder.logits`. Those at padding are arbitrary."""
        return self.decoder(self.embed(batch), batch.position_ids, batch.segment_ids)

    def __call__(self, batch: Batch) -> Float[Array, "B S V"]:
        """Returns the logits of the next token at every position, float32. Those at padding are arbitrary."""
        return self.decoder.logits(self.hidden(batch))

    def prefill(self, batch: Batch, cache_size: int) -> tuple[Float[Array, "B V"], KVCache]:
        """Returns the logits after each row's last token, and a cache of `cache_size` positions per row."""
        B, _ = batch.input_ids.shape
        cache = self.decoder.empty_cache(B, cache_size)
        x, cache = self.decoder.fill_cache(self.embed(batch), batch.position_ids, cache)
        lengths = jnp.asarray(batch.lengths)
        x, position_ids = (
            jnp.take_along_axis(y, (lengths - 1)[:, None, None], axis=1) for y in (x, jnp.asarray(batch.position_ids))
        )
        x = self.decoder.finish(x, position_ids, dataclasses.replace(cache, lengths=lengths - 1))
        return self.decoder.logits(x)[:, 0], dataclasses.replace(cache, lengths=lengths)

    def extend(
        self,
        x: Float[Array, "B T D"],
        position_ids: Int[Array, "B T 3"],
        cache: KVCache,
        num_new: Int[Array, " B"],
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Continues a cache with the embeddings of further tokens.

        Args:
            x: Embeddings of the tokens.
            position_ids: M-RoPE ids of the tokens.
            cache: A cache with free positions for the valid tokens.
            num_new: Number of valid tokens per row, at most T; the others are padding.

        Returns:
            The logits after each row's last valid token (arbitrary for a row without valid tokens), and the cache.
        """
        x, cache = self.decoder.extend_cache(x, position_ids, cache)
        last = jnp.take_along_axis(x, jnp.maximum(num_new - 1, 0)[:, None, None], axis=1)  # [B, 1, D]
        return self.decoder.logits(last)[:, 0], dataclasses.replace(cache, lengths=cache.lengths + num_new)

    def step(
        self, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Runs one token per row at an M-RoPE position that is equal on all three axes.

        Returns:
            The logits of the next token, and the cache.
        """
        x = self.decoder.embed(tokens[:, None]).astype(self.config.dtype)
        position_ids = jnp.broadcast_to(positions[:, None, None], (*positions.shape, 1, 3))
        x, cache = self.decoder.extend_cache(x, position_ids, cache)
        return self.decoder.logits(x)[:, 0], dataclasses.replace(cache, lengths=cache.lengths + 1)


class Tarsier1(Tarsier):
    """The first Tarsier. HF modeling_llava.LlavaForConditionalGeneration, with rows of newline embeddings.

    The newline and new-image embeddings are tokens of the prompt, so that gradients reach them as any other token.
    """

    vision_tower = ClipVisionTransformer


def unstack(model: Tarsier) -> Tarsier:
    """Returns the model with unstacked layers, which CPUs and GPUs run faster. Changes `model`."""
    model.vision.blocks = unstack_layers(model.vision.blocks)
    model.decoder.layers = unstack_layers(model.decoder.layers)
    return model
