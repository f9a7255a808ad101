"""Weights in int8 with qwix: half the memory of bfloat16, and half the memory traffic per decoded token.

Weights are symmetric, with one scale per output channel, rounded to nearest. bfloat16 represents the integers exactly.
Products are accumulated in float32, and scaled before they are rounded to the model's dtype. Only the decoder's layers
are quantized, 6.5 of the 7B's 8.3 billion parameters. Embedding and head decide over tokens, and the vision tower is
small and runs once per clip.

With "w8a8", the inputs of these products are rounded to int8 as well, with one scale per token that is computed from
its values (dynamic quantization). TPUs and GPUs multiply integers twice as fast as bfloat16, which makes prefill
faster. It is less exact: a few large values of a token make the scale of all its values large.
"""

import functools
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from tarsier_jax.errors import InputError
from tarsier_jax.models.layers import Linear
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.sharding import HEADS, parameter_path, parameter_spec, tensor_size
from tarsier_jax.typing import Array

Int8 = bool | Literal["w8a8"]  # True: weights in int8; "w8a8": the inputs of their products too

_QUANTIZED = re.compile(r"decoder/layers/(attn|mlp)/\w+/weight")


def check_int8(int8: Int8) -> None:
    """Raises InputError if the value is unknown, or qwix is not installed."""
    if int8 not in (True, "w8a8"):
        raise InputError(f"int8 is {int8!r}. Pass False, True or 'w8a8'.")
    check_qwix()


def check_qwix() -> None:
    """Raises InputError if qwix is not installed."""
    try:
        import qwix  # noqa: F401
    except ImportError:
        raise InputError("Weights in int8 need qwix: pip install -e '.[int8]'.") from None


def quantize_parameter(path: tuple[Any, ...], x: jax.Array) -> Any:
    """Quantizes a matrix of the decoder's layers, (L, out, in), and deletes `x`. Other parameters are returned as is.

    Returns:
        A qwix.QArray with the sharding of `x`, or `x`.
    """
    if not _QUANTIZED.fullmatch(parameter_path(path)):
        return x
    quantized = _quantize(x.sharding)(x)
    jax.block_until_ready(quantized)
    x.delete()
    return quantized


def quantized_shape(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> Any:
    """Returns the shapes of `quantize_parameter(path, x)`. `x` needs a sharding."""
    return _quantize(x.sharding).eval_shape(x) if _QUANTIZED.fullmatch(parameter_path(path)) else x


@functools.cache
def _quantize(values: jax.sharding.Sharding) -> Any:
    """Returns the jitted function that quantizes arrays (L, out, in) with this sharding."""
    import qwix

    scales = values  # (L, out, 1)
    if isinstance(values, NamedSharding):
        scales = NamedSharding(values.mesh, P(*values.spec[:2]))

    def run(x: jax.Array) -> qwix.QArray:
        # In float32: bfloat16 quotients would not round to the nearest.
        return qwix.quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=range(x.ndim - 1))

    shardings = qwix.QArray(values, scales, qtype=jnp.int8)  # pyright: ignore[reportArgumentType]
    return jax.jit(run, out_shardings=shardings)


def use_quantized(model: Tarsier, int8: Int8 = True) -> Tarsier:
    """Makes the stacked layers multiply by their quantized weights, and returns the model.

    Args:
        model: The model.
        int8: "w8a8" also quantizes the inputs of these products, which then have no gradient.
    """
    products = (_multiply_int8, _multiply_int8_split) if int8 == "w8a8" else (_multiply, _multiply_split)
    for path, module in nnx.iter_modules(model):
        name = parameter_path((*path, "weight"))
        if isinstance(module, Linear) and _QUANTIZED.fullmatch(name):
            module.dot_general = products[parameter_spec(name)[-1] == HEADS]
    return model


def _multiply(x: Float[Array, "tokens D"], weight: Any, dimensions: Any) -> Float[Array, "tokens out"]:
    """Returns x W^T for a qwix.QArray W, in x's dtype; see `models.layers.dot_general`."""
    return _scaled_product(x, weight.qvalue, weight.scale[:, 0], jnp.float32)


def _multiply_split(x: Float[Array, "tokens D"], weight: Any, dimensions: Any) -> Float[Array, "tokens out"]:
    """Returns the same if the tensor axis splits D. Devices exchange their sums in x's dtype, as they do otherwise."""
    dtype = jnp.float32 if tensor_size() == 1 else x.dtype
    return _scaled_product(x, weight.qvalue, weight.scale[:, 0], dtype)


def _multiply_int8(x: Float[Array, "tokens D"], weight: Any, dimensions: Any) -> Float[Array, "tokens out"]:
    """Returns x W^T in x's dtype, from integers: x is rounded to int8 with one scale per token."""
    return _integer_product(x, weight.qvalue, weight.scale[:, 0])


def _multiply_int8_split(x: Float[Array, "tokens D"], weight: Any, dimensions: Any) -> Float[Array, "tokens out"]:
    """Returns the same if the tensor axis splits D.

    Each device has its own scale per token, for its part of D: devices exchange sums, in x's dtype, and no maxima.
    """
    n = tensor_size()
    parts, values = (y.reshape(-1, n, y.shape[1] // n) for y in (x, weight.qvalue))
    y = jax.vmap(_integer_product, (1, 1, None))(parts, values, weight.scale[:, 0])  # [n, tokens, out]
    return jax.lax.reduce(y, jnp.zeros((), y.dtype), jax.lax.add, (0,))


def _integer_product(x: Array, values: Array, scales: Array) -> Array:
    """Returns x V^T * scales in x's dtype; x is (tokens, D), V (out, D), scales (out,)."""
    x_scales = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32) / 127  # (tokens, 1)
    x_scales = jnp.where(x_scales == 0, 1, x_scales)
    rounded = jnp.rint(x.astype(jnp.float32) / x_scales).astype(jnp.int8)
    y = jax.lax.dot_general(rounded, values, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return (y.astype(jnp.float32) * x_scales * scales).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scaled_product(x: Array, values: Array, scales: Array, dtype: Any) -> Array:
    """Returns x V^T * scales in x's dtype, with sums in `dtype`; x is (*batch, D), V (out, D), scales (out,)."""
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    y = jax.lax.dot_general(x, values.astype(x.dtype), dimensions, preferred_element_type=dtype)
    return (y.astype(jnp.float32) * scales).astype(x.dtype)


def _forward(x: Array, values: Array, scales: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    return _scaled_product(x, values, scales, dtype), (values, scales)


def _backward(_: Any, weight: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    values, scales = weight
    gradient = (gradient.astype(jnp.float32) * scales).astype(gradient.dtype)
    return jnp.dot(gradient, values.astype(gradient.dtype)), None, None


_scaled_product.defvjp(_forward, _backward)
