"""Run by test_gpu: the engine's programs compiled for an H100 on a machine without one, as JSON.

Per program: GiB of temporaries, and the bytes of the largest array of 16 bits that a copy or a transposition writes. Of
`decode_slots` also the bytes that a step moves, as a multiple of the weights and the cache.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import infer.engine.config
import tarsier_jax.models.vision_layers
from benchmarks.tpu_memory import abstract_model, abstract_slots, bytes_to_read, moved_per_step, programs, tarsier2
from infer.engine import fit_config
from tarsier_jax.config import TextConfig
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.sharding import make_mesh

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 device_address_bits: 64
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 } platform_version: "Compute Capability 9.0a"
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H100 80GB HBM3"
  driver_version: "12.8.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3" dnn_version_info { major: 9 minor: 10 }
"""


def h100() -> Mesh:
    """Returns a mesh of one H100 that only the compiler knows."""
    # JAX would ask a driver for the version of cuDNN and the capability of the card.
    stubs = {
        "check_cudnn_version": lambda: 91000,
        "check_compute_capability": lambda _: True,
        "is_cuda_compute_capability_equal": lambda _: False,
    }
    for name, stub in stubs.items():
        setattr(fused_attention_stablehlo, name, stub)
    for module in (tarsier_jax.models.vision_layers, infer.engine.config):
        module.saturating_patches = lambda: 20_480  # as on a GPU
    description = topologies.get_topology_desc("h100", platform="cuda", target_config=H100, topology="1x1x1")
    return make_mesh(devices=description.devices)


def unstacked(model: Tarsier, mesh: Mesh) -> Tarsier:
    """Returns the abstract model with one set of arrays per layer, as `tarsier_jax.load` returns it on a GPU."""
    sharding = NamedSharding(mesh, P())

    def layers(stacked: nnx.Module) -> nnx.List:
        graph, state = nnx.split(stacked)
        depth = jax.tree.leaves(state)[0].shape[0]
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding), state)
        return nnx.List([nnx.merge(graph, one) for _ in range(depth)])

    model.vision.blocks, model.decoder.layers = layers(model.vision.blocks), layers(model.decoder.layers)
    return model


def compiled_programs(mesh: Mesh) -> Iterator[tuple[str, Any, int]]:
    """Yields the programs of the 7B with two vision blocks: 32 slots of 10,752 tokens.

    Yields:
        Name, compiled program, and the bytes that a decoding step must read.
    """
    processor = tarsier2(TextConfig())
    vision = dataclasses.replace(processor.config.vision, depth=2)
    dtypes = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    config = dataclasses.replace(processor.config, vision=vision, attention="cudnn", **dtypes)
    shape = fit_config(processor, 32, 512, prompt_tokens=10_240)
    model = unstacked(abstract_model(config, mesh), mesh)
    state = abstract_slots(model, shape, mesh)
    for name, lower, _ in programs(model, state, shape, mesh):
        yield name, lower().compile(), bytes_to_read(model, state)


def largest_copy(text: str) -> int:
    shapes = re.findall(r"= bf16\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
    return max((2 * math.prod(map(int, shape.split(","))) for shape in shapes), default=0)


def main() -> None:
    figures: dict[str, dict[str, float]] = {}
    for name, compiled, floor in compiled_programs(h100()):
        text, temporaries = compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes / 2**30
        figures[name] = {"temporaries": temporaries, "largest_copy": largest_copy(text)}
        if name == "decode_slots":
            figures[name]["moved"] = moved_per_step(text) / floor
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
