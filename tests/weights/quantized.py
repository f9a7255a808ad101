"""Run by test_quantize on eight simulated devices: int8 weights are sharded over a mesh, with the same answers.

With "w8a8", the two devices of the tensor axis have a scale per token each, for their half of the inputs of `down`.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import qwix
from flax import nnx
from jax.sharding import PartitionSpec as P

from tarsier_jax.api import use_mesh_of
from tarsier_jax.families import load_config
from tarsier_jax.models.layers import layer_at
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.sharding import BATCH, make_mesh, parameter_path, parameter_spec
from tarsier_jax.weights import load_weights
from tarsier_jax.weights.quantize import use_quantized
from tests import reference


def main(directory: Path) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    config = load_config(directory)
    meshed = load_weights(directory, config, make_mesh(data=2, fsdp=2, tensor=2), int8=True)
    for path, leaf in nnx.to_flat_state(nnx.state(meshed)):
        if isinstance(q := leaf[...], qwix.QArray):
            layer, out, into = parameter_spec(parameter_path(path))
            assert q.qvalue.sharding.spec == P(layer, out, into)
            assert q.scale.sharding.spec == P(layer, out)
    examples, _ = reference.make_case("unlike samples", config)
    batch = reference.make_batch([*examples, examples[0]], config, reference.BUCKETS)
    valid = np.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
    with use_mesh_of(meshed):
        over_eight = np.asarray(meshed(batch))[valid]
    alone = np.asarray(load_weights(directory, config, int8=True)(batch))[valid]
    np.testing.assert_allclose(over_eight, alone, atol=1e-4)
    compare_products_of_integers(meshed)


def compare_products_of_integers(meshed: Tarsier) -> None:
    mlp = layer_at(use_quantized(meshed, "w8a8").decoder.layers, 0).mlp
    values, scale = (np.asarray(x) for x in (mlp.down.weight[...].qvalue, mlp.down.weight[...].scale))
    x = np.random.default_rng(0).normal(size=(4, 8, values.shape[1])).astype(np.float32)
    with use_mesh_of(meshed):
        y = np.asarray(jax.jit(lambda down, x: down(x))(mlp.down, jax.device_put(x, P(BATCH, None, "tensor"))))
    halves = zip(np.split(x, 2, axis=-1), np.split(values.astype(np.int64), 2, axis=-1), strict=True)
    expected = np.sum([_rounded_product(*half) for half in halves], axis=0) * scale[:, 0]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def _rounded_product(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    return (np.rint(x / scale).astype(np.int64) @ values.T) * scale


if __name__ == "__main__":
    main(Path(sys.argv[1]))
