"""Run by test_tensor on eight simulated devices, two along tensor: the head, the vision tower and prefill against one
device.

Prints, as JSON, the largest relative differences of values and gradients, and the collectives of the forward passes.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tarsier_jax.config import ModelConfig, Qwen2VisionConfig, TextConfig
from tarsier_jax.models import decoder
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.sharding import BATCH, make_mesh, parameter_shardings
from train.losses import token_log_probs

MESH = make_mesh(data=2, fsdp=2, tensor=2)
V, D = 128, 48
TEXT = TextConfig(V, D, 32, 1, num_heads=2, num_kv_heads=2, head_dim=24, mrope_section=(4, 4, 4))
CONFIG = ModelConfig(TEXT, Qwen2VisionConfig(depth=2, embed_dim=32, num_heads=2, out_dim=D), remat="full")


def compare(function: Callable[..., jax.Array], whole: tuple[Any, ...], sharded: tuple[Any, ...]) -> dict[str, Any]:
    """Compares a function of two sharded arguments with that of whole ones."""
    weights = np.random.default_rng(0).normal(size=jax.eval_shape(function, *whole).shape).astype(np.float32)

    def loss(*arguments: Any) -> tuple[jax.Array, jax.Array]:
        out = function(*arguments)
        return jnp.sum(out * weights), out

    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    expected = jax.jit(gradient)(*whole)
    with jax.set_mesh(MESH):
        ours = jax.jit(gradient)(*sharded)
        program = jax.jit(function).lower(*sharded).compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    collectives = re.findall(rf"= (\S+) ({kinds})(?:-start)?\(", program)
    gradients, values = (largest_difference(*pair) for pair in zip(ours, expected, strict=True))
    return {"values": values, "gradients": gradients, "collectives": [f"{kind} {x}" for x, kind in collectives]}


def largest_difference(tree: Any, expected: Any) -> float:
    """Returns the largest difference, as a part of the largest value of its array."""

    def difference(a: jax.Array, b: jax.Array) -> float:
        return float(np.abs(np.asarray(a) - np.asarray(b)).max() / (np.abs(np.asarray(b)).max() or 1))

    return max(jax.tree.leaves(jax.tree.map(difference, tree, expected)))


def compare_heads() -> dict[str, Any]:
    random = np.random.default_rng(0)
    head, x = (random.normal(size=shape).astype(np.float32) for shape in ((V, D), (4, 24, D)))
    targets = random.integers(0, V, (4, 24)).astype(np.int32)
    targets[:, ::5] = -100

    def log_probs(head: jax.Array, x: jax.Array) -> jax.Array:
        return token_log_probs(head, x, targets, chunk=8)

    return compare(log_probs, (head, x), (put(head, "tensor", "fsdp"), put(x, BATCH)))


def compare_tower() -> dict[str, Any]:
    """Groups of three bins, which two devices do not divide. The last bin of a group contains two frames."""
    groups, bins = 4, 3
    graph, state = nnx.split(Tarsier(CONFIG, nnx.Rngs(0)))
    patches = np.random.default_rng(0).normal(size=(groups, bins, 32, CONFIG.vision.patch_dim)).astype(np.float32)
    frame_hw = np.zeros((groups, bins, 2, 2), np.int32)
    frame_hw[:, :, 0], frame_hw[:, -1, 1] = (4, 4), (2, 6)
    is_feature = np.arange(8) < frame_hw.prod(axis=-1).sum(axis=-1, keepdims=True) // 4

    def features(state: nnx.State, patches: jax.Array) -> jax.Array:
        encoded = nnx.merge(graph, state).encode_frames(patches, jnp.asarray(frame_hw))
        return jnp.where(is_feature.reshape(groups, -1, 1), encoded, 0)

    return compare(features, (state, patches), (shard_state(state), put(patches, BATCH)))


def compare_prefill() -> dict[str, Any]:
    """The sum of hidden states and keys of three layers, of which the MLP runs eight tokens of a row at a time."""
    decoder._MLP_TOKENS = 8
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(TEXT, num_layers=3))
    graph, state = nnx.split(Tarsier(config, nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(4, 22, D)).astype(np.float32)
    position_ids = np.tile(np.arange(22, dtype=np.int32)[:, None], (4, 1, 3))

    def run(state: nnx.State, x: jax.Array) -> jax.Array:
        layers = nnx.merge(graph, state).decoder
        x, cache = layers.fill_cache(x, position_ids, layers.empty_cache(*x.shape[:2]))
        return x + cache.k[0].sum(axis=0)

    return compare(run, (state, x), (shard_state(state), put(x, BATCH)))


def shard_state(state: nnx.State) -> nnx.State:
    shardings = parameter_shardings(state, MESH)
    flat = [(path, leaf.replace(jax.device_put(leaf[...], shardings[path]))) for path, leaf in nnx.to_flat_state(state)]
    return nnx.from_flat_state(flat)


def put(x: np.ndarray, *axes: Any) -> jax.Array:
    return jax.device_put(x, NamedSharding(MESH, P(*axes)))


def main() -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    print(json.dumps({"head": compare_heads(), "tower": compare_tower(), "prefill": compare_prefill()}))


if __name__ == "__main__":
    main()
