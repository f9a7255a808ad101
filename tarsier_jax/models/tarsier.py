"""The whole model: vision tower and projector, visual tokens in their places among the text, decoder."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tarsier_jax.config import ModelConfig
from tarsier_jax.models.cache import KVCache
from tarsier_jax.models.decoder import Decoder
from tarsier_jax.models.layers import unstack_layers
from tarsier_jax.models.qwen2_vit import VisionTransformer
from tarsier_jax.processing.batch import Batch
from tarsier_jax.sharding import BATCH, constrain


class Tarsier(nnx.Module):
    """Tarsier2 and Qwen2-VL. HF modeling_qwen2_vl.Qwen2VLForConditionalGeneration."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.vision = VisionTransformer(config, rngs)
        self.decoder = Decoder(config, rngs)

    def embed(self, batch: Batch) -> Float[Array, "B S D"]:
        """Token embeddings, with the vision tower's features where the visual tokens stand."""
        if batch.patches.shape[1] == 0:  # text only: a shape, known when tracing
            return self.decoder.embed(batch.input_ids).astype(self.config.dtype)
        return self.merge_vision_embeddings(batch, self.encode_frames(batch.patches, batch.frame_hw))

    def encode_frames(
        self, patches: Float[Array, "G F P C"], frame_hw: Int[Array, "G F M 2"]
    ) -> Float[Array, "G F*P/4 D"]:
        """The vision tower's features of each group's frames."""
        G, F, P, C = patches.shape
        features = self.vision(patches.reshape(G * F, P, C), frame_hw.reshape(G * F, -1, 2))
        return constrain(features.reshape(G, -1, features.shape[-1]), BATCH, None, None)

    def merge_vision_embeddings(self, batch: Batch, features: Float[Array, "G M D"]) -> Float[Array, "B S D"]:
        """Token embeddings, with each group's features where `batch.vision_token_index` says; its frames are not
        read."""
        x = self.decoder.embed(batch.input_ids).astype(self.config.dtype)
        G = features.shape[0]
        index = jnp.maximum(batch.vision_token_index, 0).reshape(G, -1, 1)  # [G, B/G * S, 1]
        placed = jnp.take_along_axis(features, index, axis=1).reshape(x.shape)
        return jnp.where((batch.vision_token_index >= 0)[..., None], placed, x)

    def hidden(self, batch: Batch) -> Float[Array, "B S D"]:
        """Final hidden states, from which `decoder.logits` makes logits; those at padding are arbitrary."""
        return self.decoder(self.embed(batch), batch.position_ids, batch.segment_ids)

    def __call__(self, batch: Batch) -> Float[Array, "B S V"]:
        """Logits of the next token at every position, float32; those at padding are arbitrary."""
        return self.decoder.logits(self.hidden(batch))

    def prefill(self, batch: Batch, cache_size: int) -> tuple[Float[Array, "B V"], KVCache]:
        """Runs the prompts; gives the logits after each row's last token, and a cache of `cache_size` slots a row."""
        B, _ = batch.input_ids.shape
        cache = KVCache.empty(self.config.text, B, cache_size, self.config.dtype)
        x, cache = self.decoder.with_cache(self.embed(batch), batch.position_ids, cache)
        last = jnp.take_along_axis(x, (batch.lengths - 1)[:, None, None], axis=1)  # [B, 1, D]
        return self.decoder.logits(last)[:, 0], dataclasses.replace(cache, lengths=jnp.asarray(batch.lengths))

    def extend(
        self,
        x: Float[Array, "B T D"],
        position_ids: Int[Array, "B T 3"],
        cache: KVCache,
        num_new: Int[Array, " B"],
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Continues a cache with the embeddings of further tokens.

        Args:
            num_new: valid tokens of each row, at most T; those after them are padding. The cache must have free
                positions for the valid ones.

        Returns:
            The logits after each row's last valid token (arbitrary for a row without any), and the longer cache.
        """
        x, cache = self.decoder.extend_cache(x, position_ids, cache)
        last = jnp.take_along_axis(x, jnp.maximum(num_new - 1, 0)[:, None, None], axis=1)  # [B, 1, D]
        return self.decoder.logits(last)[:, 0], dataclasses.replace(cache, lengths=cache.lengths + num_new)

    def step(
        self, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """One more token a row, at the given M-RoPE position (the same on all three axes)."""
        x = self.decoder.embed(tokens[:, None]).astype(self.config.dtype)
        position_ids = jnp.broadcast_to(positions[:, None, None], (*positions.shape, 1, 3))
        x, cache = self.decoder.extend_cache(x, position_ids, cache)
        return self.decoder.logits(x)[:, 0], dataclasses.replace(cache, lengths=cache.lengths + 1)


def unstack(model: Tarsier) -> Tarsier:
    """The model with its layers one by one, which CPUs and GPUs run faster. Consumes `model`."""
    model.vision.blocks = unstack_layers(model.vision.blocks)
    model.decoder.layers = unstack_layers(model.decoder.layers)
    return model
