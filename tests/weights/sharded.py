"""Run by test_roundtrip on eight simulated devices: loads a directory over a mesh and prints the sum of its weights."""

import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from tarsier_jax.families import load_config
from tarsier_jax.sharding import make_mesh, parameter_path, parameter_spec
from tarsier_jax.weights import load_weights


def main(directory: Path) -> None:
    assert jax.device_count() == 8
    model = load_weights(directory, load_config(directory), make_mesh(data=2, fsdp=2, tensor=2))
    total = 0.0
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        array, spec = leaf[...], parameter_spec(parameter_path(path))
        assert array.sharding.spec == spec, path
        parts = 2 ** sum(axis is not None for axis in spec)
        assert array.addressable_shards[0].data.size * parts == array.size, path
        total += float(np.abs(np.asarray(array)).sum(dtype=np.float64))
    print(repr(total))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
