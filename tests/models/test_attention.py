"""Every attention implementation that runs here against softmax(q k^T) v written out in numpy."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

import tarsier_jax.models.blockwise
from tarsier_jax.models.attention import IMPLEMENTATIONS, attend, default_implementation


def written_out(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, lengths: np.ndarray) -> np.ndarray:
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    out = np.zeros_like(q)
    for b in range(B):
        for n in range(N):
            scores = q[b, :, n] @ k[b, :, n // (N // K)].T / np.sqrt(H)
            scores[:, lengths[b] :] = -np.inf
            if causal:
                scores[np.triu_indices(T, 1, S)] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[b, :, n] = weights / weights.sum(axis=1, keepdims=True) @ v[b, :, n // (N // K)]
    return out


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def interpreted_splash(monkeypatch: pytest.MonkeyPatch) -> None:
    """The TPU kernel, run by Pallas's interpreter."""
    make = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", make)


@pytest.fixture
def cudnn_in_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of cuDNN, with the same arguments to the function in XLA."""
    fused = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *x, **options: fused(*x, **options | {"implementation": "xla"})
    )


@pytest.mark.usefixtures("interpreted_splash", "cudnn_in_xla")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("max_scores", [2**20, 2**12])  # whole, and in pieces
def test_grouped_queries(implementation: str, causal: bool, max_scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarsier_jax.models.blockwise, "_MAX_SCORES", max_scores)
    q, k, v = random(0, 2, 136, 6, 16), random(1, 2, 136, 2, 16), random(2, 2, 136, 2, 16)
    lengths = np.array([136, 77])
    out = attend(q, k, v, causal=causal, kv_lengths=jnp.asarray(lengths), implementation=implementation)
    np.testing.assert_allclose(out, written_out(q, k, v, causal, lengths), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("interpreted_splash", "cudnn_in_xla")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("max_scores", [2**20, 2**12])
def test_segments(implementation: str, causal: bool, max_scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples in one row attend as in separate rows."""
    monkeypatch.setattr(tarsier_jax.models.blockwise, "_MAX_SCORES", max_scores)
    q, k, v = random(0, 1, 136, 6, 16), random(1, 1, 136, 2, 16), random(2, 1, 136, 2, 16)
    segment_ids = jnp.asarray(np.repeat([[1, 2, 3, 0]], [50, 1, 70, 15], axis=1))
    out = attend(q, k, v, causal=causal, segment_ids=segment_ids, implementation=implementation)
    for part in (slice(0, 50), slice(50, 51), slice(51, 121)):
        length = np.array([part.stop - part.start])
        alone = written_out(q[:, part], k[:, part], v[:, part], causal, length)
        np.testing.assert_allclose(out[:, part], alone, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("interpreted_splash", "cudnn_in_xla")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_one_segment(implementation: str, causal: bool) -> None:
    """cuDNN receives the lengths instead of a mask. An empty row is finite."""
    q, k, v = random(0, 3, 40, 6, 16), random(1, 3, 40, 2, 16), random(2, 3, 40, 2, 16)
    lengths = np.array([40, 13, 0])
    segment_ids = jnp.asarray(np.arange(40) < lengths[:, None], jnp.int32)
    out = attend(q, k, v, causal=causal, segment_ids=segment_ids, implementation=implementation)
    assert np.isfinite(out).all()
    for row, length in enumerate(lengths[:2]):
        part = slice(row, row + 1), slice(0, length)
        alone = written_out(q[part], k[part], v[part], causal, np.array([length]))
        np.testing.assert_allclose(out[part], alone, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("cudnn_in_xla")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_query_reads_the_valid_part_of_the_cache(implementation: str) -> None:
    q, k, v = random(0, 3, 1, 6, 16), random(1, 3, 40, 2, 16), random(2, 3, 40, 2, 16)
    lengths = np.array([1, 40, 13])
    out = attend(q, k, v, kv_lengths=jnp.asarray(lengths), implementation=implementation)
    np.testing.assert_allclose(out, written_out(q, k, v, False, lengths), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("cudnn_in_xla")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("queries", [1, 5])
def test_queries_that_start_at_another_key_in_each_row(queries: int, implementation: str) -> None:
    q, k, v = random(0, 3, queries, 6, 16), random(1, 3, 40, 2, 16), random(2, 3, 40, 2, 16)
    starts = np.array([0, 35, 13])
    out = attend(q, k, v, causal=True, query_starts=jnp.asarray(starts), implementation=implementation)
    for t in range(queries):  # query t sees the keys up to its own
        one = written_out(q[:, t : t + 1], k, v, False, starts + t + 1)
        np.testing.assert_allclose(out[:, t : t + 1], one, atol=1e-5, rtol=0)


def test_a_row_with_nothing_to_see_is_finite() -> None:
    q = random(0, 1, 8, 2, 4)
    assert np.isfinite(attend(q, q, q, kv_lengths=jnp.zeros(1, jnp.int32))).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segmented", [True, False])
@pytest.mark.parametrize("max_scores", [2**20, 2**8])  # at once, and in 12 blocks per head
def test_gradients(causal: bool, segmented: bool, max_scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They equal those of softmax(q k^T) v, whether or not blocks skip keys."""
    monkeypatch.setattr(tarsier_jax.models.blockwise, "_MAX_SCORES", max_scores)
    q, k, v = random(0, 2, 39, 4, 8), random(1, 2, 39, 2, 8), random(2, 2, 39, 2, 8)
    lengths = np.array([39, 23])
    ids = np.repeat([[1, 2, 3, 0], [1, 0, 0, 0]], [17, 1, 16, 5], axis=1)
    visible = np.arange(39) < lengths[:, None, None]
    visible = visible & (np.tri(39, dtype=bool) if causal else True)
    visible = visible & (ids[:, :, None] == ids[:, None] if segmented else True)
    weight = random(3, *q.shape) * visible.any(axis=2)[..., None, None]  # a query that sees nothing has any output

    def expected(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = jnp.where(visible[:, None], jnp.einsum("btnh,bsnh->bnts", q, k) * 8**-0.5, -1e30)
        return jnp.sum(jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v) * weight)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        options = {"segment_ids": jnp.asarray(ids)} if segmented else {}
        return jnp.sum(attend(q, k, v, causal=causal, kv_lengths=jnp.asarray(lengths), **options) * weight)

    for a, b in zip(*(jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (ours, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)


def test_unknown_implementation() -> None:
    q = random(0, 1, 2, 2, 4)
    with pytest.raises(ValueError, match=r"'flash'.*xla, cudnn, splash"):
        attend(q, q, q, implementation="flash")


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "implementation"),
    [
        ("tpu", None, "bfloat16", "splash"),
        ("cpu", None, "bfloat16", "xla"),
        ("gpu", "9.0", "bfloat16", "cudnn"),
        ("gpu", "12.0", "float16", "cudnn"),
        ("gpu", "9.0", "float32", "xla"),  # cuDNN takes no float32
        ("gpu", "7.5", "bfloat16", "xla"),  # Turing
        ("gpu", "gfx942", "bfloat16", "xla"),  # AMD
    ],
)
def test_default_implementation(platform: str, capability: str | None, dtype: str, implementation: str) -> None:
    attributes = {} if capability is None else {"compute_capability": capability}
    assert default_implementation(SimpleNamespace(platform=platform, **attributes), dtype) == implementation


@pytest.mark.usefixtures("cudnn_in_xla")
@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_receives_even_lengths(causal: bool) -> None:
    """JAX refuses its gradients for odd ones, such as the 577 tokens of a frame of the first Tarsier."""
    q, k, v = random(0, 2, 13, 6, 16), random(1, 2, 13, 2, 16), random(2, 2, 13, 2, 16)
    lengths = np.array([13, 7])
    out = attend(q, k, v, causal=causal, kv_lengths=jnp.asarray(lengths), implementation="cudnn")
    np.testing.assert_allclose(out, written_out(q, k, v, causal, lengths), atol=1e-5, rtol=0)
    jaxpr = str(jax.make_jaxpr(functools.partial(attend, implementation="cudnn"))(q, k, v))
    assert "14,6,16" in jaxpr
