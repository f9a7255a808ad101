"""Run by test_quantize on eight simulated devices: int8 weights are sharded over a mesh, with the same answers."""

import sys
from pathlib import Path

import jax
import numpy as np
import qwix
from flax import nnx
from jax.sharding import PartitionSpec as P

from tarsier_jax.api import use_mesh_of
from tarsier_jax.families import load_config
from tarsier_jax.sharding import make_mesh, parameter_path, parameter_spec
from tarsier_jax.weights import load_weights
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
