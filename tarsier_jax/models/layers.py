"""The few building blocks that both towers share.

Weights keep PyTorch's layout, [out, in]: a checkpoint's tensors go in and come out without a transpose, and decoding
one token reads rows that are contiguous in memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

_normal = nnx.initializers.normal(0.02)


class Linear(nnx.Module):
    """y = x W^T + b, computed in `dtype`. weight: [*out, in]; several output dimensions are allowed.

    dot_general: what multiplies, as in flax's Linear; another one where weights are quantized (weights.quantize).
    """

    def __init__(self, d_in: int, *out: int, bias: bool, dtype: str, param_dtype: str, rngs: nnx.Rngs):
        self.weight = nnx.Param(_normal(rngs.params(), (*out, d_in), param_dtype))
        self.bias = nnx.Param(jnp.zeros(out, param_dtype)) if bias else None
        self.dtype = dtype
        self.dot_general: Callable[..., Array] = jax.lax.dot_general

    def __call__(self, x: Float[Array, "*batch D"], out_dtype: Any = None) -> Float[Array, "..."]:
        dimensions = (((x.ndim - 1,), (self.weight.ndim - 1,)), ((), ()))
        weight = self.weight[...].astype(self.dtype)
        y = self.dot_general(x.astype(self.dtype), weight, dimensions, preferred_element_type=out_dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight in float32, returned in x's dtype. HF modeling_qwen2_vl.Qwen2VLRMSNorm."""

    def __init__(self, dim: int, eps: float, param_dtype: str):
        self.weight = nnx.Param(jnp.ones(dim, param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation in float32, returned in x's dtype. torch.nn.LayerNorm."""

    def __init__(self, dim: int, eps: float, param_dtype: str):
        self.weight = nnx.Param(jnp.ones(dim, param_dtype))
        self.bias = nnx.Param(jnp.zeros(dim, param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class Embedding(nnx.Module):
    """A table of token embeddings. weight: [V, D]."""

    def __init__(self, vocab_size: int, dim: int, param_dtype: str, rngs: nnx.Rngs):
        self.weight = nnx.Param(_normal(rngs.params(), (vocab_size, dim), param_dtype))

    def __call__(self, ids: Array) -> Array:
        return jnp.take(self.weight[...], ids, axis=0)


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], n: int, rngs: nnx.Rngs) -> Any:
    """`n` layers as one module whose parameters carry a leading layer dimension: how models are built and stored."""
    return nnx.vmap(make)(rngs.split(n))


def unstack_layers(layers: nnx.Module) -> nnx.List:
    """The same layers one by one, each with arrays of its own. Consumes `layers`, an array at a time."""
    graph, state = nnx.split(layers)
    leaves, structure = jax.tree.flatten(state)
    parts = []
    for leaf in leaves:
        parts.append([leaf[i] for i in range(leaf.shape[0])])
        jax.block_until_ready(parts[-1])
        leaf.delete()
    return nnx.List([nnx.merge(graph, jax.tree.unflatten(structure, layer)) for layer in zip(*parts, strict=True)])


_WRITTEN_OUT = 4  # layers at most


def apply_layers(body: Callable[[Any, Any], Any], carry: Any, layers: Any, remat: str) -> Any:
    """carry = body(carry, layer) for each layer in turn.

    Stacked layers are scanned: one layer is compiled, whatever the depth, and TPUs read its slice in place. XLA copies
    that slice before each matrix product on CPUs and GPUs, which doubles the traffic that bounds decoding; there,
    inference runs on unstacked layers (`tarsier_jax.load`). A few layers are written out, which copies less.
    """
    body = rematerialise(body, remat)
    if isinstance(layers, nnx.List):
        for layer in layers:
            carry = body(carry, layer)
        return carry
    depth = jax.tree.leaves(layers)[0].shape[0]
    written_out = remat == "none" and depth <= _WRITTEN_OUT
    return jax.lax.scan(lambda carry, layer: (body(carry, layer), None), carry, layers, unroll=written_out)[0]


_REMAT_POLICIES: dict[str, Any] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematerialise(body: Callable, policy: str) -> Callable:
    """Wraps one layer so that its backward pass recomputes what `policy` (ModelConfig.remat) does not keep.

    Raises:
        ValueError: the policy is none of "none", "full", "dots".
    """
    if policy == "none":
        return body
    if policy not in _REMAT_POLICIES:
        raise ValueError(f"remat is {policy!r}; it is one of 'none', {', '.join(map(repr, _REMAT_POLICIES))}.")
    return jax.checkpoint(body, policy=_REMAT_POLICIES[policy], prevent_cse=False)
