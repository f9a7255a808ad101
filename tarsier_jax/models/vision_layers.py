"""Parts that the vision towers share."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from tarsier_jax.config import ModelConfig
from tarsier_jax.models.layers import Linear
from tarsier_jax.sharding import BINS, HEADS, current_mesh, module_specs
from tarsier_jax.typing import Array

_MAX_PATCHES = 8192  # patches that one device processes at once, unless it needs more


def saturating_patches() -> int:
    """Returns the number of patches that a device must process at once to reach its speed; 0 if a bin is enough."""
    return 20_480 if jax.default_backend() == "gpu" else 0


class VisionMlp(nnx.Module):
    """MLP with quick_gelu, x * sigmoid(1.702 x). HF modeling_qwen2_vl.VisionMlp and modeling_clip.CLIPMLP."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        vision, dtypes = config.vision, {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.fc1 = Linear(vision.embed_dim, vision.mlp_dim, bias=True, rngs=rngs, **dtypes)
        self.fc2 = Linear(vision.mlp_dim, vision.embed_dim, bias=True, rngs=rngs, **dtypes)

    def __call__(self, x: Float[Array, "F P E"]) -> Float[Array, "F P E"]:
        x = self.fc1(x)
        return self.fc2(x * jax.nn.sigmoid(1.702 * x))


@runtime_checkable
class VisionTower(Protocol):
    """A tower whose method `run` returns the features of the bins of one device."""

    def run(self, patches: Array, frame_hw: Array) -> Array: ...


def encode_bins(
    tower: VisionTower, patches: Float[Array, "F P C"], frame_hw: Int[Array, "F M 2"]
) -> Float[Array, "F Pm D"]:
    """Returns the features of bins, which are independent.

    Under a tensor axis, each device runs its share of the bins (all devices divide them) and gathers the parameters,
    one block at a time. Blocks that are split by heads would exchange their activations, which have more bytes.
    """
    mesh = current_mesh()
    if mesh is None:
        return _encode_in_groups(tower.run, patches, frame_hw)
    # Without a tensor axis, XLA gathers the parameters. libtpu 0.0.42 crashes on explicit sums that it scatters over
    # 256 chips, of which each gets five columns. Several processes on CPUs compute gradients here that differ from run
    # to run (by 3e-5 of the norm, JAX 0.10.2; one process on as many devices does not).
    if mesh.shape[HEADS] == 1 or (jax.default_backend() == "cpu" and jax.process_count() > 1):
        return tower.run(patches, frame_hw)
    specs = (module_specs(tower, "vision"), P(BINS), P(BINS))
    on_device = jax.shard_map(
        lambda tower, *bins: tower.run(*bins), mesh=mesh, in_specs=specs, out_specs=P(BINS), check_vma=False
    )
    return on_device(tower, patches, frame_hw)


def _encode_in_groups(
    encode: Callable[[Array, Array], Array], patches: Float[Array, "F P C"], frame_hw: Int[Array, "F M 2"]
) -> Float[Array, "F Pm D"]:
    """Returns `encode(patches, frame_hw)`, computed for a few bins at a time.

    A few at a time keep activations small; on a CPU they fit the cache.
    """
    F, patches_per_bin, C = patches.shape
    limit = max(_MAX_PATCHES, saturating_patches())
    if limit >= F * patches_per_bin:
        return encode(patches, frame_hw)
    n = next(n for n in range(max(1, limit // patches_per_bin), 0, -1) if F % n == 0)
    groups = patches.reshape(F // n, n, patches_per_bin, C), frame_hw.reshape(F // n, n, -1, 2)
    features = jax.lax.map(lambda group: encode(*group), groups)  # [F/n, n, Pm, D]
    return features.reshape(F, *features.shape[2:])
