"""Layers that the vision tower and the decoder share.

Weights keep PyTorch's layout, [out, in]: tensors are loaded and exported without a transpose, and decoding one token
reads rows that are contiguous in memory.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from tarsier_jax.typing import Array

_normal = nnx.initializers.normal(0.02)


def dot_general(x: Array, weight: Array, dimensions: Any) -> Array:
    """Returns `jax.lax.dot_general` of both, in x's dtype."""
    return jax.lax.dot_general(x, weight.astype(x.dtype), dimensions)


class Linear(nnx.Module):
    """y = x W^T + b, computed in `dtype`, with one or more output dimensions.

    Attributes:
        weight: [*out, in].
        bias: [*out], or None.
        dtype: Dtype of the product.
        dot_general: Function of the product, as in flax's Linear. `weights.quantize` replaces it.
        lora: Low-rank update that is added to the output, or None. Training with LoRA sets it (`train.lora`).
    """

    def __init__(self, d_in: int, *out: int, bias: bool, dtype: str, param_dtype: str, rngs: nnx.Rngs):
        self.weight = nnx.Param(_normal(rngs.params(), (*out, d_in), param_dtype))
        self.bias = nnx.Param(jnp.zeros(out, param_dtype)) if bias else None
        self.dtype = dtype
        self.dot_general: Callable[..., Array] = dot_general
        self.lora: LowRank | None = None

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "..."]:
        dimensions = (((1,), (self.weight.ndim - 1,)), ((), ()))
        # With one dimension of rows, XLA's CPU backend computes the gradient of the weight without transposed copies.
        rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
        y = self.dot_general(rows, self.weight[...], dimensions)
        y = y.reshape(*x.shape[:-1], *y.shape[1:])
        y = y if self.bias is None else y + self.bias[...].astype(y.dtype)
        return y if self.lora is None else y + self.lora(x)


class LowRank(nnx.Module):
    """y = scale * x A^T B^T, in x's dtype. Source: section 4.1 of LoRA, arXiv 2106.09685.

    Attributes:
        a: A, [rank, in].
        b: B, [*out, rank].
        scale: alpha / rank.
    """

    def __init__(self, a: Array, b: Array, scale: float):
        self.a, self.b, self.scale = nnx.Param(a), nnx.Param(b), scale

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "..."]:
        a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
        return self.scale * jnp.tensordot(jnp.tensordot(x, a, (-1, -1)), b, (-1, -1))


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
    """Creates `n` layers as one module with a leading layer dimension, the form of new and stored models."""
    return nnx.vmap(make)(rngs.split(n))


def layer_at(layers: Any, index: int | Int[Array, ""]) -> Any:
    """Returns one of the layers, stacked or unstacked; `index` must be an int if they are unstacked."""
    if isinstance(layers, nnx.List):
        return layers[operator.index(index)]
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), layers)


_layer_program = jax.jit(layer_at)  # with a traced index: one program for all layers


def unstack_layers(layers: nnx.Module) -> nnx.List:
    """Returns the layers one by one, each with its own arrays. Deletes the arrays of `layers` one after the other."""
    graph, state = nnx.split(layers)
    leaves, structure = jax.tree.flatten(state)
    parts = []
    for leaf in leaves:
        parts.append(_split(leaf))
        jax.block_until_ready(parts[-1])
        leaf.delete()
    return nnx.List([nnx.merge(graph, jax.tree.unflatten(structure, layer)) for layer in zip(*parts, strict=True)])


def _split(leaf: jax.Array) -> list[jax.Array]:
    sharding = leaf.sharding
    is_on_one = isinstance(sharding, jax.sharding.SingleDeviceSharding)
    if is_on_one and all(device.platform == "cpu" for device in sharding.device_set):
        return [jax.device_put(x, sharding) for x in np.asarray(leaf)]  # views, and no program
    return [_layer_program(leaf, i) for i in range(leaf.shape[0])]


def first_layers(layers: Any, n: int) -> Any:
    """Returns the first `n` of the layers, stacked or unstacked."""
    if isinstance(layers, nnx.List):
        return nnx.List(layers[:n])
    return jax.tree.map(lambda x: x[:n], layers)


_MAX_UNROLLED = 12  # layers


def apply_layers(
    body: Callable[[Any, Any], Any], carry: Any, layers: Any, remat: str, num_layers: int | None = None
) -> Any:
    """Computes carry = body(carry, layer) for the first layers in turn, by default all, and returns the last carry.

    Stacked layers are scanned: one layer is compiled for any depth, and TPUs read its slice in place. On CPUs and GPUs,
    XLA copies the slice before each matrix product, which doubles the memory traffic that bounds decoding. Inference on
    these platforms therefore uses unstacked layers (`tarsier_jax.load`). Scans over few layers are unrolled, which
    copies less.
    """
    body = rematerialise(body, remat)
    if isinstance(layers, nnx.List):
        for layer in layers[:num_layers]:
            carry = body(carry, layer)
        return carry
    depth = jax.tree.leaves(layers)[0].shape[0]
    unroll = remat == "none" and depth <= _MAX_UNROLLED
    if num_layers is not None:  # a slice of the stack would be a copy
        body_at = lambda i, carry: body(carry, layer_at(layers, i))  # noqa: E731
        return jax.lax.fori_loop(0, num_layers, body_at, carry, unroll=unroll)
    return jax.lax.scan(lambda carry, layer: (body(carry, layer), None), carry, layers, unroll=unroll)[0]


_REMAT_POLICIES: dict[str, Any] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematerialise(body: Callable, policy: str) -> Callable:
    """Returns `body` with a backward pass that recomputes activations according to `policy` (`ModelConfig.remat`).

    Raises:
        ValueError: the policy is unknown.
    """
    if policy == "none":
        return body
    if policy not in _REMAT_POLICIES:
        raise ValueError(f"remat is {policy!r}; it must be one of 'none', {', '.join(map(repr, _REMAT_POLICIES))}.")
    return jax.checkpoint(body, policy=_REMAT_POLICIES[policy], prevent_cse=False)
