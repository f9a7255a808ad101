"""Run by test_mesh on eight simulated devices: greedy answers of a directory laid out over them, as JSON by form."""

import json
import sys
from pathlib import Path

import jax

from tarsier_jax.api import use_mesh_of
from tarsier_jax.families import load_config
from tarsier_jax.generation.decode import generate_batch, prefill
from tarsier_jax.generation.sampling import Sampling, SamplingOptions
from tarsier_jax.models.tarsier import Tarsier, unstack
from tarsier_jax.sharding import make_mesh
from tarsier_jax.weights import load_weights
from tests import reference


def answers(model: Tarsier) -> list[list[int]]:
    examples, _ = reference.make_case("unlike samples", model.config)
    batch = reference.make_batch([*examples, examples[0]], model.config, reference.BUCKETS)
    options = SamplingOptions(max_new_tokens=24)
    sampling = Sampling.repeat(options, 4)
    with use_mesh_of(model):
        generations = generate_batch(model, batch, options, eos_ids=())
        keys = jax.random.split(jax.random.key(0), 4)
        cache = prefill(model, batch, sampling, jax.numpy.zeros(0, int), keys, jax.numpy.int32(24), max_new=128).cache
    # Rows are split over data and fsdp, key-value heads over tensor.
    for k in cache.k:
        assert k.size == 8 * k.addressable_shards[0].data.size, k.sharding
    return [generation.tokens for generation in generations[:3]]


def main(directory: Path) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    model = load_weights(directory, load_config(directory), make_mesh(data=2, fsdp=2, tensor=2))
    print(json.dumps({"stacked": answers(model), "unstacked": answers(unstack(model))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
