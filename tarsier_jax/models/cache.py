"""The key-value cache of the decoder."""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from tarsier_jax.config import TextConfig
from tarsier_jax.typing import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers. Every update returns a new cache.

    Token i of row b is stored at position i. Positions from `lengths[b]` on are never read.

    The heads of a token are one dimension: a TPU pads the last two dimensions of an array to whole tiles, so that a
    dimension of few heads would be copied before each product. Unstacked layers (`models.layers.apply_layers`) have one
    array each, which a GPU's fused attention reads in place. Stacked layers share one array, which their scan carries.

    Attributes:
        k: Keys: one array per layer, or one array of all layers.
        v: Values, likewise.
        lengths: Number of valid positions of each row.
        num_kv_heads: Number of key-value heads.
        read_length: Number of positions that attention reads. The caller guarantees that no row is longer. None reads
            all.
    """

    k: tuple[Float[Array, "layers B S KH"], ...]
    v: tuple[Float[Array, "layers B S KH"], ...]
    lengths: Int[Array, " B"]
    num_kv_heads: int = dataclasses.field(metadata={"static": True})
    read_length: int | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def empty(cls, config: TextConfig, batch: int, size: int, dtype: str, stacked: bool) -> "KVCache":
        """Returns an empty cache of `batch` rows with `size` positions each, for stacked or unstacked layers."""
        arrays, layers = (1, config.num_layers) if stacked else (config.num_layers, 1)
        shape = (layers, batch, size, config.num_kv_heads * config.head_dim)
        k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(arrays)) for _ in range(2))
        return cls(k, v, jnp.zeros(batch, jnp.int32), config.num_kv_heads)

    @property
    def size(self) -> int:
        """Number of positions of a row."""
        return self.k[0].shape[2]

    def fill(self, layer: int | Int[Array, ""], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> "KVCache":
        """Writes the first T positions of one layer."""
        array, index = self._locate(layer)

        def write(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice(old, fold_heads(new, old.dtype)[None], (index, 0, 0, 0))

        return self._replace(layer, write(self.k[array], k), write(self.v[array], v))

    def append(
        self, layer: int | Int[Array, ""], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
    ) -> tuple["KVCache", Float[Array, "B read_length K H"], Float[Array, "B read_length K H"]]:
        """Writes T tokens of one layer after the valid positions of each row. The caller updates `lengths` once.

        Tokens beyond the size of the cache are dropped.

        Returns:
            The cache, and all keys and all values of the layer.
        """
        array, index = self._locate(layer)
        rows = jnp.arange(k.shape[0])[:, None]
        positions = self.lengths[:, None] + jnp.arange(k.shape[1])

        def write(old: Array, new: Array) -> Array:
            return old.at[index, rows, positions].set(fold_heads(new, old.dtype))

        def read(array: Array) -> Array:
            _, B, S, width = array.shape
            sizes = (1, B, self.read_length or S, width)
            return jax.lax.dynamic_slice(array, (index, 0, 0, 0), sizes).reshape(B, sizes[2], self.num_kv_heads, -1)

        k, v = write(self.k[array], k), write(self.v[array], v)
        return self._replace(layer, k, v), read(k), read(v)

    def _replace(self, layer: int | Array, k: Array, v: Array) -> "KVCache":
        """Returns the cache with the arrays replaced that contain the keys and the values of a layer."""
        array, _ = self._locate(layer)
        keys, values = ((*old[:array], new, *old[array + 1 :]) for old, new in ((self.k, k), (self.v, v)))
        return dataclasses.replace(self, k=keys, v=values)

    def _array_of(self, layer: int | Array) -> tuple["KVCache", int | Array]:
        """Returns a cache of only the arrays that contain a layer, and the layer's index in it."""
        array, index = self._locate(layer)
        return dataclasses.replace(self, k=(self.k[array],), v=(self.v[array],)), index

    def _locate(self, layer: int | Array) -> tuple[int, int | Array]:
        """Returns the index of the array that contains a layer, and the layer's index in it.

        `layer` must be an int if each layer has its own array.
        """
        return (0, layer) if len(self.k) == 1 else (operator.index(layer), 0)


def fold_heads(x: Float[Array, "B T K H"], dtype: Any) -> Float[Array, "B T KH"]:
    """Returns `x` in the layout of the cache's arrays and their dtype."""
    return x.reshape(*x.shape[:2], -1).astype(dtype)
