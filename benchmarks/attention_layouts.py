"""Attention at Qwen2-VL-7B's sizes, per layout of the cache and per kind of mask.

    python -m benchmarks.attention_layouts          # a GPU with cuDNN; on a CPU, small sizes through XLA

decode: one query of 28 heads per slot, 4 key-value heads, 32 slots of 10,752 tokens, nine tenths of them in use, four
layers. prefill: one row of 10,240 tokens. vision: bins of 2,496 patches. Prints the time of a call, the FLOP/s of the
visible pairs, and the bytes per second of the keys and values in use.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.samples import time_calls

ON_CPU = jax.default_backend() == "cpu"
LAYERS, SLOTS, TOKENS = (2, 2, 64) if ON_CPU else (4, 32, 10_752)
ROW, PATCHES = (64, 48) if ON_CPU else (10_240, 2496)
HEADS, KV_HEADS, WIDTH = 28, 4, 128

cudnn = functools.partial(jax.nn.dot_product_attention, implementation="xla" if ON_CPU else "cudnn")


def random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def print_row(name: str, function: Callable[..., Any], *arrays: Any, flops: float = 0, read: float = 0) -> None:
    """Prints one row of the table.

    Args:
        name: Name of the row.
        function: The function to time.
        *arrays: Its arguments.
        flops: Floating-point operations per call.
        read: Bytes read per call.
    """
    compiled = jax.jit(function)
    seconds = time_calls(lambda: compiled(*arrays), 10)
    rate = f"{read / seconds / 1e9:8.0f} GB/s" if read else f"{flops / seconds / 1e12:8.1f} TFLOP/s"
    print(f"{name:<64} {seconds * 1e3:9.3f} ms {rate}", flush=True)


def over_layers(attention: Callable[..., jax.Array], q: jax.Array, k: Any, v: Any) -> jax.Array:
    """Applies `attention` to the keys and values of each layer in turn. As in a model, the layers are sequential."""
    for layer in range(LAYERS):
        q = q + attention(q, k[layer], v[layer])
    return q


def split_heads(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """Attends to keys and values [B, S, K, H] with two products per key-value head."""
    B, S, K, H = k.shape
    scores = jnp.einsum("bkgh,bskh->bkgs", q.reshape(B, K, -1, H) * H**-0.5, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(jnp.arange(S) < lengths[:, None, None, None], scores, -1e30), axis=-1)
    return jnp.einsum("bkgs,bskh->bkgh", weights.astype(v.dtype), v).reshape(q.shape)


def folded(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """Attends to keys and values [B, S, K * H] with two products per slot, of queries as a block-diagonal matrix."""
    B, S, _ = k.shape
    eye = jnp.eye(KV_HEADS, dtype=q.dtype)
    q = (q * WIDTH**-0.5).reshape(B, KV_HEADS, -1, 1, WIDTH) * eye[:, None, :, None]
    scores = jnp.einsum("bnd,bsd->bns", q.reshape(B, HEADS, -1), k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(jnp.arange(S) < lengths[:, None, None], scores, -1e30), axis=-1)
    out = jnp.einsum("bns,bsd->bnd", weights.astype(v.dtype), v).reshape(B, KV_HEADS, -1, KV_HEADS, WIDTH)
    return jnp.einsum("bkgjh,kj->bkgh", out, eye).reshape(B, 1, HEADS, WIDTH)


def decode_layouts() -> None:
    lengths = jnp.full(SLOTS, TOKENS * 9 // 10, jnp.int32)
    read = 2 * LAYERS * SLOTS * KV_HEADS * WIDTH * 2 * (TOKENS * 9 // 10)
    q = random(0, SLOTS, 1, HEADS, WIDTH)
    stacked = [random(i, LAYERS, SLOTS, TOKENS, KV_HEADS, WIDTH) for i in (1, 2)]
    layers = [list(x) for x in stacked]
    einsum = functools.partial(over_layers, functools.partial(split_heads, lengths=lengths))
    fused = functools.partial(over_layers, functools.partial(cudnn, key_value_seq_lengths=lengths))
    print_row("decode, stacked [L,B,S,K,H], einsum", einsum, q, *stacked, read=read)
    print_row("decode, [B,S,K,H] per layer, einsum", einsum, q, *layers, read=read)
    print_row("decode, [B,S,K,H] per layer, cuDNN with lengths", fused, q, *layers, read=read)
    merged = [x.reshape(*x.shape[:3], -1) for x in stacked]
    block_diagonal = functools.partial(over_layers, functools.partial(folded, lengths=lengths))
    print_row("decode, stacked [L,B,S,K*H], einsum", block_diagonal, q, *merged, read=read)
    print_row("decode, [B,S,K*H] per layer, einsum", block_diagonal, q, *[list(x) for x in merged], read=read)


def masked(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, **options: Any) -> jax.Array:
    return cudnn(q, k, v, mask=ids[:, None, :, None] == ids[:, None, None, :], **options)


def prefill_masks() -> None:
    q, k, v = (random(i, 1, ROW, heads, WIDTH) for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    flops, ids = 2 * HEADS * WIDTH * ROW**2, jnp.ones((1, ROW), jnp.int32)
    options = {"is_causal": True, "key_value_seq_lengths": jnp.full(1, ROW, jnp.int32)}
    print_row("prefill, causal, mask of segments", functools.partial(masked, **options), q, k, v, ids, flops=flops)
    print_row("prefill, causal, lengths", functools.partial(cudnn, **options), q, k, v, flops=flops)


def vision_masks() -> None:
    for bins in (2, 8, 16):
        q, k, v = (random(i, bins, PATCHES, 16, 80) for i in range(3))
        flops, ids = 4 * bins * 16 * 80 * PATCHES**2, jnp.ones((bins, PATCHES), jnp.int32)
        options = {"key_value_seq_lengths": jnp.full(bins, PATCHES, jnp.int32)}
        print_row(
            f"vision, {bins} bins, mask of segments", functools.partial(masked, **options), q, k, v, ids, flops=flops
        )
        print_row(f"vision, {bins} bins, lengths", functools.partial(cudnn, **options), q, k, v, flops=flops)


def main() -> int:
    for part in (decode_layouts, prefill_masks, vision_masks):
        part()
    return 0


if __name__ == "__main__":
    sys.exit(main())
