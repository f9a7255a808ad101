"""Attention in bfloat16, with gradients, against an explicit softmax in float32, for each call in the model."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tarsier_jax.models.attention import attend

TOLERANCE = 1e-2  # relative, in the Euclidean norm: the rounding of bfloat16 alone causes 2e-3 to 5e-3


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `attend`.

    Attributes:
        name: Place of the call in the model.
        rows: Number of batch rows.
        queries: Queries per row.
        keys: Keys per row.
        heads: Number of query heads.
        kv_heads: Number of key-value heads.
        width: Width of a head.
        causal: Whether a query sees only keys up to its own position.
        segments: Lengths of each row's segments, or None. The rest of a row is padding, with the id 0.
        lengths: Valid keys of each row, or None for all.
        starts: Index of each row's first query among the keys; None means 0.
        trained: Whether gradients are also compared.
    """

    name: str
    rows: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    causal: bool = False
    segments: tuple[tuple[int, ...], ...] | None = None
    lengths: tuple[int, ...] | None = None
    starts: tuple[int, ...] | None = None
    trained: bool = False

    @property
    def queries_shape(self) -> tuple[int, int, int, int]:
        return self.rows, self.queries, self.heads, self.width

    def segment_ids(self) -> Int[np.ndarray, "B T"] | None:
        if self.segments is None:
            return None
        ids = np.zeros((self.rows, self.queries), np.int32)
        for row, lengths in zip(ids, self.segments, strict=True):
            row[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        return ids

    def visible(self) -> Bool[np.ndarray, "B T S"]:
        """Returns the keys that each query sees."""
        queries, keys = np.arange(self.queries)[:, None], np.arange(self.keys)
        visible = np.ones((self.rows, self.queries, self.keys), bool)
        if self.causal:
            visible &= keys <= queries + np.array(self.starts or 0).reshape(-1, 1, 1)
        if self.lengths is not None:
            visible &= keys < np.array(self.lengths)[:, None, None]
        segment_ids = self.segment_ids()
        if segment_ids is not None:
            visible &= segment_ids[:, :, None] == segment_ids[:, None, :]
        return visible


def cases(tokens: int, patches: int, cache: int) -> list[Case]:
    """Returns the model's calls at the widths of Qwen2-VL-7B: prompts, packed rows, frames, bins, and decoding."""
    text = functools.partial(Case, heads=28, kv_heads=4, width=128)
    vision = functools.partial(
        Case, rows=3, queries=patches, keys=patches, heads=16, kv_heads=16, width=80, trained=True
    )
    half, third = tokens // 2 - 7, tokens // 3 + 5
    packed = ((half, 1, third), (tokens - 3,))
    bins = ((patches // 2, patches // 3), (), (patches,))
    return [
        text("a prompt", 1, tokens, tokens, causal=True),
        text("packed samples", 2, tokens, tokens, causal=True, segments=packed, trained=True),
        vision("frames, one empty", lengths=(patches, patches - 44, 0)),
        vision("bins of frames, one empty", segments=bins),
        Case("frames of the first Tarsier", 3, 577, 577, heads=16, kv_heads=16, width=64, trained=True),
        text("new tokens after a cache", 2, 64, cache, causal=True, starts=(cache // 2, cache - 64)),
        text("one new token", 4, 1, cache, lengths=(1, cache // 2 + 3, cache - 1, cache)),
    ]


def errors(case: Case, implementation: str) -> Iterator[tuple[str, float]]:
    """Yields the name and the relative error of the output and, for a trained case, of each gradient.

    The error is infinite if a value is not finite, also in padding, since a NaN there would spread to gradients.
    """
    keys = case.rows, case.keys, case.kv_heads, case.width
    *inputs, cotangent = (_random(i, s) for i, s in enumerate([case.queries_shape, keys, keys, case.queries_shape]))
    visible, segment_ids = case.visible(), case.segment_ids()
    defined = jnp.asarray(visible.any(-1))[:, :, None, None]  # the output of a query that sees no key is arbitrary
    cotangent = jnp.where(defined, cotangent, 0)
    ours = functools.partial(
        attend,
        causal=case.causal,
        kv_lengths=None if case.lengths is None else jnp.array(case.lengths, jnp.int32),
        query_starts=None if case.starts is None else jnp.array(case.starts, jnp.int32),
        segment_ids=None if segment_ids is None else jnp.asarray(segment_ids),
        implementation=implementation,
    )
    exact = functools.partial(_written_out, visible=jnp.asarray(visible))
    results = _run(ours, "bfloat16", inputs, cotangent, case.trained)
    with jax.default_matmul_precision("highest"):
        references = _run(exact, "float32", inputs, cotangent, case.trained)
    results[0] = jnp.where(defined, results[0], 0 * results[0])  # 0 times NaN is NaN
    references[0] = jnp.where(defined, references[0], 0)
    for name, result, reference in zip(("output", "dq", "dk", "dv"), results, references, strict=False):
        yield name, _relative(result, reference)


def _run(attention: Any, dtype: str, inputs: list[Array], cotangent: Array, trained: bool) -> list[Array]:
    """Returns the output and the gradients of q, k and v, float32."""

    def pull_back(inputs: list[Array], cotangent: Array) -> tuple[Array, ...]:
        return jax.vjp(attention, *inputs)[1](cotangent)

    inputs, cotangent = [x.astype(dtype) for x in inputs], cotangent.astype(dtype)
    gradients = jax.jit(pull_back)(inputs, cotangent) if trained else ()
    return [x.astype(jnp.float32) for x in (jax.jit(attention)(*inputs), *gradients)]


def _written_out(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], visible: Bool[Array, "B T S"]
) -> Float[Array, "B T N H"]:
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def _random(seed: int, shape: tuple[int, ...]) -> Array:
    """Returns normal values that bfloat16 represents exactly."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _relative(x: Array, reference: Array) -> float:
    error = jnp.linalg.norm((x - reference).ravel()) / jnp.linalg.norm(reference.ravel())
    return float(error) if bool(jnp.isfinite(x).all()) else float("inf")
