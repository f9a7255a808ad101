"""The key-value cache of the decoder."""

import dataclasses

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

    Attributes:
        k: Keys.
        v: Values.
        lengths: Number of valid positions of each row.
        read_length: Number of positions that attention reads. The caller guarantees that no row is longer. None reads
            all.
    """

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    lengths: Int[Array, " B"]
    read_length: int | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def empty(cls, config: TextConfig, batch: int, size: int, dtype: str) -> "KVCache":
        """Returns an empty cache of `batch` rows with `size` positions each."""
        shape = (config.num_layers, batch, size, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))

    def fill(self, layer: Int[Array, ""], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> "KVCache":
        """Writes the first T positions of one layer."""
        start = (layer, 0, 0, 0, 0)
        return dataclasses.replace(
            self,
            k=jax.lax.dynamic_update_slice(self.k, k[None].astype(self.k.dtype), start),
            v=jax.lax.dynamic_update_slice(self.v, v[None].astype(self.v.dtype), start),
        )

    def read(
        self, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "B read_length K H"], Float[Array, "B read_length K H"]]:
        """Returns the keys and values of one layer."""
        _, B, S, K, H = self.k.shape
        sizes = (1, B, self.read_length or S, K, H)
        k, v = (jax.lax.dynamic_slice(x, (layer, 0, 0, 0, 0), sizes)[0] for x in (self.k, self.v))
        return k, v

    def append(self, layer: Int[Array, ""], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> "KVCache":
        """Writes T tokens of one layer after the valid positions of each row. The caller updates `lengths` once.

        Tokens beyond the size of the cache are dropped.
        """
        rows = jnp.arange(k.shape[0])[:, None]
        positions = self.lengths[:, None] + jnp.arange(k.shape[1])
        return dataclasses.replace(
            self,
            k=self.k.at[layer, rows, positions].set(k.astype(self.k.dtype)),
            v=self.v.at[layer, rows, positions].set(v.astype(self.v.dtype)),
        )
