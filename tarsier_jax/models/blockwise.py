"""Attention as matrix products and a softmax, by blocks of queries, with its gradient."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from tarsier_jax.typing import Array

_MAX_SCORES = 2**20  # scores that are computed at once: 4 MiB fit a CPU's cache
_MAX_SCORES_GPU = 2**28  # likewise on a GPU, which needs large products; 1 GiB
_MASKED_BLOCK = 192  # queries of a block that skips keys that it does not attend to
_MASKED_BLOCK_GPU = 1024
MASKED = -1e30  # finite: a query without visible keys does not produce NaN


def attend_by_blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    kv_lengths: Int[Array, " B"],
    segment_ids: Int[Array, "B T"] | None,
    query_starts: Int[Array, " B"] | None,
    causal: bool,
) -> Float[Array, "B T N H"]:
    """Computes `attention.attend` on one device."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    first, end = _visible_keys(T, S, kv_lengths, segment_ids, query_starts, causal)
    has_windows = causal or segment_ids is not None
    at_once, blocks = _num_blocks(B * N * T * S, N // K * T * S, T if has_windows else 0)
    size = -(-T // blocks)  # queries per block
    tile = size if has_windows and blocks > 1 else S  # the windows of keys are multiples of it
    # One matrix product per key-value head, for all queries that read it: its rows are (query, query head).
    q = _pad_to(q * H**-0.5, blocks * size).reshape(B, blocks, size, K, N // K, H)
    q = q.transpose(0, 3, 1, 2, 4, 5).reshape(B * K, blocks, size * N // K, H)
    k, v = (_pad_to(x, -(-S // tile) * tile).transpose(0, 2, 1, 3).reshape(B * K, -1, H) for x in (k, v))
    first, end = (
        jnp.repeat(jnp.pad(x, ((0, 0), (0, blocks * size - T)), mode="edge").reshape(B, blocks, size), K, axis=0)
        for x in (first, end)
    )
    out: Any = _attend_heads(q, k, v, first, end, tile, at_once)  # pyright does not know the type of a custom_vjp
    out = out.reshape(B, K, blocks * size, N // K, H).transpose(0, 2, 1, 3, 4)
    return out.reshape(B, blocks * size, N, H)[:, :T]


def _pad_to(x: Array, length: int) -> Array:  # [B, T, K, H]
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


def _num_blocks(scores: int, scores_per_head: int, masked_queries: int) -> tuple[bool, int]:
    """Returns whether all heads are computed at once, and the number of blocks of queries per head."""
    on_gpu = jax.default_backend() == "gpu"
    max_scores = _MAX_SCORES_GPU if on_gpu else _MAX_SCORES
    if scores <= max_scores:
        return True, 1
    block = _MASKED_BLOCK_GPU if on_gpu else _MASKED_BLOCK
    return False, max(-(-scores_per_head // max_scores), -(-masked_queries // block))


def _visible_keys(
    T: int, S: int, kv_lengths: Array, segment_ids: Array | None, query_starts: Array | None, causal: bool
) -> tuple[Array, Array]:
    """Returns the index of the first key that each query attends to, and the index after the last one, (B, T)."""
    queries = jnp.arange(T)
    first, end = jnp.zeros((len(kv_lengths), T), jnp.int32), jnp.broadcast_to(kv_lengths[:, None], (len(kv_lengths), T))
    if causal:
        end = jnp.minimum(end, queries + 1 + (0 if query_starts is None else query_starts[:, None]))
    if segment_ids is not None:
        differs = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 1)), constant_values=True)
        first = lax.cummax(jnp.where(differs[:, :-1], queries, 0), axis=1)
        end = jnp.minimum(end, lax.cummin(jnp.where(differs[:, 1:], queries + 1, T), axis=1, reverse=True))
    return first, end


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend_heads(q: Array, k: Array, v: Array, first: Array, end: Array, tile: int, at_once: bool) -> Array:
    """Attends by blocks of queries, each of which reads the smallest window of keys that contains its visible keys.

    The backward pass recomputes the scores of a block, which then are in the cache of a CPU. Writing all of them to
    memory and reading them again takes twice the time. Source: algorithms 1 and 2 of FlashAttention-2, arXiv
    2307.08691, with one softmax per window.

    Args:
        q: Scaled queries, (heads, blocks, rows, H). The query heads that read a key-value head are among its rows.
        k: Keys, (heads, S, H).
        v: Values, (heads, S, H).
        first: First visible key of each query, (heads, blocks, queries).
        end: The key after the last visible one.
        tile: The sizes of windows are multiples of it.
        at_once: Whether all heads are computed at once.

    Returns:
        Array of q's shape.
    """
    return _attend_heads_forward(q, k, v, first, end, tile, at_once)[0]


def _attend_heads_forward(
    q: Array, k: Array, v: Array, first: Array, end: Array, tile: int, at_once: bool
) -> tuple[Array, Any]:
    def attend_block(k: Array, v: Array, q: Array, first: Array, end: Array) -> tuple[Array, Array]:
        def attend_window(start: Array | int, size: int) -> tuple[Array, Array]:
            scores = _scores(q, _window(k, start, size), first, end, start)
            largest = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - largest)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            out = _dot("rs,sh->rh", weights.astype(v.dtype), _window(v, start, size)) / total
            return out.astype(q.dtype), (largest + jnp.log(total))[:, 0]

        return _in_window(attend_window, first, end, k.shape[0], tile)

    def attend_head(x: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, first, end = x
        return lax.map(lambda block: attend_block(k, v, *block), (q, first, end))

    out, normalizers = _for_heads(attend_head, (q, k, v, first, end), at_once)
    return out, (q, k, v, first, end, out, normalizers)


def _attend_heads_backward(
    tile: int, at_once: bool, residuals: tuple[Array, ...], gradient: Array
) -> tuple[Array | None, ...]:
    q, k, v, first, end, out, normalizers = residuals
    products = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def block_gradients(k: Array, v: Array, sums: tuple[Array, Array], block: tuple[Array, ...]) -> Any:
        q, first, end, normalizers, gradient, products = block

        def window_gradients(start: Array | int, size: int) -> Any:
            keys, values = _window(k, start, size), _window(v, start, size)
            weights = jnp.exp(_scores(q, keys, first, end, start) - normalizers[:, None])
            of_weights = _dot("rh,sh->rs", gradient, values) - products[:, None]
            of_scores = (weights * of_weights).astype(q.dtype)
            of_k, of_v = _dot("rs,rh->sh", of_scores, q), _dot("rs,rh->sh", weights.astype(q.dtype), gradient)
            of_k, of_v = (
                lax.dynamic_update_slice_in_dim(x, _window(x, start, size) + y, start, 0)
                for x, y in zip(sums, (of_k, of_v), strict=True)
            )
            return (of_k, of_v), _dot("rs,sh->rh", of_scores, keys).astype(q.dtype)

        return _in_window(window_gradients, first, end, k.shape[0], tile)

    def head_gradients(x: tuple[Array, ...]) -> tuple[Array, ...]:
        k, v, *blocks = x
        zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        (of_k, of_v), of_q = lax.scan(functools.partial(block_gradients, k, v), zeros, tuple(blocks))
        return of_q, of_k.astype(k.dtype), of_v.astype(v.dtype)

    heads = k, v, q, first, end, normalizers, gradient, products
    of_q, of_k, of_v = _for_heads(head_gradients, heads, at_once)
    return of_q, of_k, of_v, None, None


_attend_heads.defvjp(_attend_heads_forward, _attend_heads_backward)


def _for_heads(function: Callable[[tuple[Array, ...]], Any], heads: tuple[Array, ...], at_once: bool) -> Any:
    if at_once:
        return jax.vmap(function)(heads)
    return lax.scan(lambda _, x: (None, function(x)), None, heads, unroll=4)[1]  # four keep two cores busy


def _in_window(function: Callable[[Any, int], Any], first: Array, end: Array, S: int, tile: int) -> Any:
    """Returns function(start, size) for the smallest window of keys that contains those of all queries.

    The size is `tile` times a power of two, or S.
    """
    tiles = S // tile
    if tiles == 1:
        return function(0, S)
    sizes = [*(2**i for i in range((tiles - 1).bit_length())), tiles]
    start = jnp.min(first) // tile
    needed = -(-jnp.max(end) // tile) - start
    branches = [
        functools.partial(lambda size, start: function(jnp.minimum(start, tiles - size) * tile, size * tile), size)
        for size in sizes
    ]
    return lax.switch(jnp.sum(needed > jnp.asarray(sizes[:-1])), branches, start)


def _window(x: Array, start: Array | int, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size)


def _scores(q: Array, k: Array, first: Array, end: Array, start: Array | int) -> Array:
    """Returns the scores of the rows (query, query head) for keys from index `start` on, float32."""
    keys = start + jnp.arange(k.shape[0])
    visible = (first[:, None] <= keys) & (keys < end[:, None])
    return jnp.where(jnp.repeat(visible, q.shape[0] // len(first), axis=0), _dot("rh,sh->rs", q, k), MASKED)


def _dot(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
