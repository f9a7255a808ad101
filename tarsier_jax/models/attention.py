"""One attention function with three implementations.

xla     matrix products and a softmax, in blocks that fit a cache; runs on all platforms and is the reference.
cudnn   cuDNN's fused attention, for NVIDIA GPUs from Ampere on; float16 or bfloat16.
splash  the Pallas splash kernel, for TPUs.

Softmax is float32 in all of them. Under a mesh, xla and splash run inside `jax.shard_map` over batch and heads.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from tarsier_jax.models.blockwise import MASKED, attend_by_blocks
from tarsier_jax.sharding import BATCH, HEADS, current_mesh, fit_spec
from tarsier_jax.typing import Array

IMPLEMENTATIONS = ("xla", "cudnn", "splash")

_FOLDED_HEADS = 8  # key-value heads per product of a single query
_SPLASH_BLOCK = 512
_LANES = 128  # splash needs sequence lengths that are multiples of the vector lanes


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    kv_lengths: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    query_starts: Int[Array, " B"] | None = None,
    implementation: str = "xla",
) -> Float[Array, "B T N H"]:
    """Computes softmax(q k^T / sqrt(H)) v with grouped queries: query head n reads key-value head n // (N // K).

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        causal: Query t attends to keys 0..t (T must equal S, except with query_starts).
        kv_lengths: Number of valid leading keys per row; None means S.
        segment_ids: A query attends to the keys with its own id (T must equal S), whose positions must be contiguous;
            None means one segment.
        query_starts: Index of each row's first query among the keys: with `causal`, query t attends to keys
            0..query_starts + t. None means 0.
        implementation: One of IMPLEMENTATIONS. A single query (T = 1) runs as xla instead of splash, which is for
            long sequences.

    Raises:
        ValueError: the implementation is unknown.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention is {implementation!r}; it must be one of {', '.join(IMPLEMENTATIONS)}.")
    if kv_lengths is None:
        kv_lengths = jnp.full(q.shape[0], k.shape[1], jnp.int32)
    if q.shape[1] == 1 and causal:
        if query_starts is not None:
            kv_lengths = jnp.minimum(kv_lengths, query_starts + 1)
        causal, query_starts = False, None
    if implementation == "cudnn":
        return _cudnn(q, k, v, kv_lengths, segment_ids, query_starts, causal)
    if q.shape[1] == 1:
        # A TPU pads a dimension of few heads to a tile. A CPU is slowed down by the additional multiplications.
        max_heads = k.shape[2] if implementation == "splash" else _FOLDED_HEADS
        return _over_mesh(functools.partial(_single_query, max_heads=max_heads), q, k, v, kv_lengths)
    if implementation == "splash" and query_starts is None:  # its masks are static and cannot depend on the row
        return _over_mesh(functools.partial(_splash, causal=causal), q, k, v, kv_lengths, segment_ids)
    return _over_mesh(
        functools.partial(attend_by_blocks, causal=causal), q, k, v, kv_lengths, segment_ids, query_starts
    )


def _over_mesh(local: Callable[..., Array], q: Array, k: Array, v: Array, *per_row: Array | None) -> Array:
    """Runs `local` on the rows and heads of each device."""
    mesh = current_mesh()
    if mesh is None:
        return local(q, k, v, *per_row)
    # The keys' spec is valid for the queries: an axis that divides the key-value heads divides the query heads.
    spec = fit_spec(k.shape, (BATCH, None, HEADS, None), mesh)
    specs = (spec, spec, spec, *(P(spec[0]) for _ in per_row))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return sharded(q, k, v, *per_row)


def _cudnn(
    q: Array,
    k: Array,
    v: Array,
    kv_lengths: Array,
    segment_ids: Array | None,
    query_starts: Array | None,
    causal: bool,
) -> Array:
    T, S = q.shape[1], k.shape[1]
    if T == S and T % 2:  # JAX refuses gradients for odd lengths
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        segment_ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, 1)))
    # cuDNN supports neither segments nor offsets. Its mask is T x S booleans per row, read by every head.
    mask = None if segment_ids is None else segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    if query_starts is not None:
        queries = query_starts[:, None] + jnp.arange(q.shape[1])
        mask, causal = jnp.arange(k.shape[1]) <= queries[:, None, :, None], False
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, key_value_seq_lengths=kv_lengths, implementation="cudnn"
    )
    return out[:, :T]


def _single_query(q: Array, k: Array, v: Array, kv_lengths: Array, max_heads: int) -> Array:
    """Attends with two products per group of key-value heads, whose queries form a block-diagonal matrix.

    The products wait for the keys and values, not for the multiplications with zeros, and they read the cache as it is.
    """
    B, _, N, H = q.shape
    S, K = k.shape[1:3]
    heads = math.gcd(K, max_heads)
    k, v = (x.reshape(B, S, K // heads, heads * H) for x in (k, v))
    diagonal = jnp.eye(heads, dtype=q.dtype)[:, None, :, None]
    queries = (q * H**-0.5).reshape(B, K // heads, heads, N // K, 1, H) * diagonal
    queries = queries.reshape(B, K // heads, heads * N // K, heads * H)
    scores = jnp.einsum("bknh,bskh->bkns", queries, k, preferred_element_type=jnp.float32)
    scores = jnp.where(jnp.arange(S) < kv_lengths[:, None, None, None], scores, MASKED)
    out = jnp.einsum("bkns,bskh->bknh", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    out = jnp.einsum("bkjgjh->bkjgh", out.reshape(B, K // heads, heads, N // K, heads, H))  # the diagonal blocks
    return out.reshape(B, 1, N, H)


def _splash(q: Array, k: Array, v: Array, kv_lengths: Array, segment_ids: Array | None, causal: bool) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T = q.shape[1]
    # [B, T, N, H] -> [B, N, T, H], scaled here because the kernel does not, and padded to whole lanes.
    q, k, v = (_pad_to_lanes(x.swapaxes(1, 2)) for x in (q * q.shape[-1] ** -0.5, k, v))
    shape = (q.shape[2], k.shape[2])
    mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    block_q, block_kv = (_splash_block(length) for length in shape)
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    heads = masks.MultiHeadMask([mask] * q.shape[1])
    kernel = splash.make_splash_mha(mask=heads, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    if segment_ids is None:  # padded keys form a segment without queries
        kv_segment = (jnp.arange(shape[1]) >= kv_lengths[:, None]).astype(jnp.int32)
        segments = splash.SegmentIds(q=jnp.zeros((q.shape[0], shape[0]), jnp.int32), kv=kv_segment)
    else:
        padded = jnp.pad(segment_ids, ((0, 0), (0, shape[0] - T)))
        segments = splash.SegmentIds(q=padded, kv=padded)
    out: Any = jax.vmap(kernel)(q, k, v, segment_ids=segments)
    return out[:, :, :T].swapaxes(1, 2).astype(v.dtype)


def _pad_to_lanes(x: Array) -> Array:  # [B, N, T, H]
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % _LANES), (0, 0)))


def _splash_block(length: int) -> int:
    return next(b for b in (_SPLASH_BLOCK, 384, 256, _LANES) if length % b == 0)


def prefers_lengths(implementation: str) -> bool:
    """Returns whether an implementation skips the keys from a row's length on, while segments halve its speed."""
    return implementation == "cudnn"


def default_implementation(device: Any, dtype: str) -> str:
    """Returns the fastest implementation on a `jax.Device` for a compute dtype.

    cuDNN's attention needs an NVIDIA GPU of compute capability 8.0 (Ampere) or higher and a type of 16 bits.
    """
    if device.platform == "tpu":
        return "splash"
    capability = getattr(device, "compute_capability", "")  # "9.0" on an H100; "gfx942" on a GPU of AMD
    major = capability.partition(".")[0]
    has_cudnn = device.platform == "gpu" and major.isdigit() and int(major) >= 8
    return "cudnn" if has_cudnn and dtype in ("bfloat16", "float16") else "xla"
