"""The decoder of Qwen2 and LLaMA, with multimodal RoPE and grouped queries, as in Qwen2-VL."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from tarsier_jax.config import ModelConfig
from tarsier_jax.models.attention import attend
from tarsier_jax.models.cache import KVCache
from tarsier_jax.models.layers import Embedding, Linear, RMSNorm, apply_layers, layer_at, stack_layers
from tarsier_jax.models.rope import mrope_tables, rotate
from tarsier_jax.sharding import BATCH, HEADS, constrain, constrain_tokens, gather_tokens, split_tokens
from tarsier_jax.typing import Array

_MLP_TOKENS = 2048  # of a row, that the MLP runs at once in prefill; enough that products do not wait for the weights


class Attention(nnx.Module):
    """Causal attention with N query heads over K key-value heads. HF modeling_qwen2_vl.Qwen2VLAttention."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        text, dtypes = config.text, {"dtype": config.dtype, "param_dtype": config.param_dtype}
        D, H = text.hidden_size, text.head_dim
        self.head_dim, self.implementation = H, config.attention
        self.q = Linear(D, text.num_heads * H, bias=text.qkv_bias, rngs=rngs, **dtypes)
        self.k = Linear(D, text.num_kv_heads * H, bias=text.qkv_bias, rngs=rngs, **dtypes)
        self.v = Linear(D, text.num_kv_heads * H, bias=text.qkv_bias, rngs=rngs, **dtypes)
        self.o = Linear(text.num_heads * H, D, bias=False, rngs=rngs, **dtypes)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos: Array,
        sin: Array,
        segment_ids: Array | None,
        cache: KVCache | None,
        layer: int | Int[Array, ""],
        extend: bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Attends among the tokens, or with `extend` to the cache and the tokens.

        Args:
            x: Hidden states.
            cos: Cosines of `mrope_tables`, (B, T, H/2).
            sin: Sines of `mrope_tables`, (B, T, H/2).
            segment_ids: int (B, T), or None.
            cache: Cache that the keys and values are written to, or None.
            layer: Index of the layer in the cache; an int if the layers are unstacked.
            extend: Whether the tokens follow those in the cache.
        """
        B, T, _ = x.shape
        x = gather_tokens(x)  # of which the devices compute different heads
        q = rotate(self._split_heads(self.q(x)), cos, sin)  # [B, T, N, H]
        k, v = self.keys_values(x, cos, sin)
        if cache is not None and extend:
            starts = cache.lengths
            cache, k, v = cache.append(layer, k, v)
            out = attend(q, k, v, causal=True, query_starts=starts, implementation=self.implementation)
        else:
            cache = cache.fill(layer, k, v) if cache is not None else None
            out = attend(q, k, v, causal=True, segment_ids=segment_ids, implementation=self.implementation)
        out = out.reshape(B, T, -1)
        if is_prefill(cache, extend):
            return constrain_tokens(self.o(split_tokens(out))).reshape(B, T, -1), cache
        return self.o(out), cache

    def keys_values(
        self, x: Float[Array, "B T D"], cos: Array, sin: Array
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Returns the rotated keys, and the values. The arguments are those of the call."""
        k, v = (self._split_heads(f(x)) for f in (self.k, self.v))
        return rotate(k, cos, sin), v

    def _split_heads(self, x: Array) -> Array:
        return constrain(x.reshape(*x.shape[:2], -1, self.head_dim), BATCH, None, HEADS, None)


class Mlp(nnx.Module):
    """MLP with a silu gate. HF modeling_qwen2_vl.Qwen2MLP."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        text, dtypes = config.text, {"dtype": config.dtype, "param_dtype": config.param_dtype}
        D = text.hidden_size
        self.gate = Linear(D, text.mlp_dim, bias=False, rngs=rngs, **dtypes)
        self.up = Linear(D, text.mlp_dim, bias=False, rngs=rngs, **dtypes)
        self.down = Linear(text.mlp_dim, D, bias=False, rngs=rngs, **dtypes)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nnx.Module):
    """Attention and MLP with residual connections. HF modeling_qwen2_vl.Qwen2VLDecoderLayer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        text = config.text
        self.input_norm = RMSNorm(text.hidden_size, text.norm_eps, config.param_dtype)
        self.attn = Attention(config, rngs)
        self.post_norm = RMSNorm(text.hidden_size, text.norm_eps, config.param_dtype)
        self.mlp = Mlp(config, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos: Array,
        sin: Array,
        segment_ids: Array | None,
        cache: KVCache | None,
        layer: int | Int[Array, ""],
        extend: bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        with jax.named_scope("attn"):
            out, cache = self.attn(self.input_norm(x), cos, sin, segment_ids, cache, layer, extend)
            x = x + out
        with jax.named_scope("mlp"):
            if is_prefill(cache, extend):
                return add_in_parts(self.post_norm, self.mlp, x), cache
            return x + self.mlp(self.post_norm(x)), cache


def is_prefill(cache: KVCache | None, extend: bool) -> bool:
    """Returns whether the tokens are the first of their rows in a cache, of which prefill has thousands."""
    return cache is not None and not extend


def add_in_parts(
    norm: Callable[[Array], Array], mlp: Callable[[Array], Array], x: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """Returns `x + mlp(norm(x))`, for a part of the tokens at a time: hidden values are the largest temporaries.

    `x` is split as by `split_residual`, and a part has tokens of each device. The parts are not the iterations of a
    loop, into which XLA would copy the weights of the layer. Each replaces its tokens in `x`, so that they run one
    after the other.
    """
    shape, T = x.shape, x.shape[1]
    x = constrain_tokens(split_tokens(x))  # [B, n, T/n, D]
    size = _MLP_TOKENS * x.shape[-2] // T
    if T > _MLP_TOKENS:
        x = jax.lax.optimization_barrier(x)  # otherwise its summands remain in memory until the end of the first part
    for start in range(0, x.shape[-2], size):
        part = x[..., start : start + size, :]
        update = constrain_tokens(mlp(gather_tokens(norm(part))))
        x = jax.lax.dynamic_update_slice_in_dim(x, part + update, start, axis=-2)
    return x.reshape(shape)


def split_residual(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Splits hidden states along the tokens over the tensor axis, for what devices would compute several times.

    A reduce-scatter and an all-gather replace each all-reduce of the layers. Sequence parallelism, section 4.2.2 of
    arXiv 2205.05198.
    """
    return constrain_tokens(split_tokens(x)).reshape(x.shape)


class Decoder(nnx.Module):
    """Decoder from token embeddings to hidden states and logits. HF modeling_qwen2_vl.Qwen2VLTextModel and lm_head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        text = config.text
        self.config = config
        self.embed = Embedding(text.vocab_size, text.hidden_size, config.param_dtype, rngs)
        self.layers = stack_layers(lambda r: DecoderLayer(config, r), text.num_layers, rngs)
        self.norm = RMSNorm(text.hidden_size, text.norm_eps, config.param_dtype)
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        tied = text.tie_embeddings
        self.lm_head = None if tied else Linear(text.hidden_size, text.vocab_size, bias=False, rngs=rngs, **dtypes)

    def __call__(
        self, x: Float[Array, "B T D"], position_ids: Int[Array, "B T 3"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Returns the hidden states after the last norm. Tokens attend to earlier tokens of their segment."""
        return self.norm(self._run_layers(x, self._tables(position_ids), segment_ids, None)[0])

    def empty_cache(self, batch: int, size: int) -> KVCache:
        """Returns an empty cache of `batch` rows with `size` positions each, in the form that the layers need."""
        stacked = not isinstance(self.layers, nnx.List)
        return KVCache.empty(self.config.text, batch, size, self.config.dtype, stacked)

    def fill_cache(
        self,
        x: Float[Array, "B T D"],
        position_ids: Int[Array, "B T 3"],
        cache: KVCache,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Returns the hidden states before the last layer, and the cache with the tokens' keys and values.

        The tokens are the first of their rows and attend to earlier tokens of their segment. The last layer computes
        only keys and values: `finish` runs it for the few tokens whose outputs are necessary. The caller sets the
        lengths of the cache.
        """
        tables, index = self._tables(position_ids), self.config.text.num_layers - 1
        x, cache = self._run_layers(x, tables, segment_ids, cache, num_layers=index)
        layer = layer_at(self.layers, index)
        y = gather_tokens(layer.input_norm(x))
        return x, cache.fill(index, *layer.attn.keys_values(y, *tables))

    def finish(
        self, x: Float[Array, "B 1 D"], position_ids: Int[Array, "B 1 3"], cache: KVCache
    ) -> Float[Array, "B 1 D"]:
        """Returns the hidden states after the last norm of one token per row, from those before the last layer.

        Args:
            x: Results of `fill_cache`.
            position_ids: Those of the tokens.
            cache: The cache of `fill_cache`, whose lengths are the numbers of earlier tokens.
        """
        index = self.config.text.num_layers - 1
        x, _ = layer_at(self.layers, index)(x, *self._tables(position_ids), None, cache, index, extend=True)
        return self.norm(x)

    def extend_cache(
        self, x: Float[Array, "B T D"], position_ids: Int[Array, "B T 3"], cache: KVCache
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Returns the hidden states of T >= 1 tokens that follow those in the cache, and the cache with the tokens.

        A token attends to the cache and to the new tokens up to itself. The caller sets the lengths of the cache.
        """
        x, cache = self._run_layers(x, self._tables(position_ids), None, cache, extend=True)
        return self.norm(x), cache

    def _tables(self, position_ids: Array) -> tuple[Array, Array]:
        text = self.config.text
        return mrope_tables(position_ids, text.head_dim, text.rope_theta, text.mrope_section)

    def _run_layers(
        self,
        x: Array,
        tables: tuple[Array, Array],
        segment_ids: Array | None,
        cache: Any,
        extend: bool = False,
        num_layers: int | None = None,
    ) -> tuple[Array, Any]:
        """Returns the hidden states after the first `num_layers` layers, by default all, and the cache."""

        def place(x: Array) -> Array:
            return split_residual(x) if is_prefill(cache, extend) else gather_tokens(x)

        # The cache is part of the carry: as a scanned input and output it would be copied at every layer.
        def block(carry: tuple, layer: DecoderLayer) -> tuple:
            x, cache, i = carry
            x, cache = layer(x, *tables, segment_ids, cache, i, extend)
            return place(x), cache, i + 1

        # An int: the indices of unstacked layers are constants.
        carry = (place(x), cache, 0)
        x, cache, _ = apply_layers(block, carry, self.layers, self.config.remat, num_layers)
        return x, cache

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns the logits of the next token, in float32."""
        return jnp.einsum("btd,vd->btv", x, self.head(), preferred_element_type=jnp.float32)

    def head(self) -> Float[Array, "V D"]:
        """Returns the output matrix, which is the embedding if they are tied."""
        weight = (self.lm_head or self.embed).weight
        return weight[...].astype(self.config.dtype)
