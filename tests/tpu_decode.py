"""Run by test_tpu: the decoding step of the 7B compiled for several slices, as JSON.

Per case: GiB of temporaries, and the bytes that a step moves, as a multiple of the weights and the cache. A few layers
at the 7B's widths, as bytes are proportional to the number of layers. The vocabulary is small, since most of the
compiler's time would be the sort of sampling; `benchmarks.tpu_memory` has the whole model.
"""

import dataclasses
import json

from benchmarks.tpu_memory import abstract_model, abstract_slots, bytes_to_read, moved_per_step, programs, tarsier2
from infer.engine import fit_config
from tarsier_jax.config import TextConfig
from tarsier_jax.sharding import make_mesh
from train.aot import GIB, bytes_of, topology_devices

LAYERS = 13  # the scan over fewer layers is unrolled (`models.layers.apply_layers`), which that over 28 is not
# Slice, tensor-parallel devices, slots per data-parallel part, weights in int8.
CASES = {
    "v5e, tensor 1, int8": ("v5e:1x1", 1, 6, True),
    "v5e, tensor 2": ("v5e:1x2", 2, 16, False),
    "v6e, tensor 1": ("v6e:1x1", 1, 16, False),
}


def measure(topology: str, tensor: int, slots: int, int8: bool) -> dict[str, float]:
    mesh = make_mesh(tensor=tensor, devices=topology_devices(topology))
    processor = tarsier2(TextConfig(num_layers=LAYERS, vocab_size=128))
    dtypes = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    vision = dataclasses.replace(processor.config.vision, depth=2)
    config = dataclasses.replace(processor.config, vision=vision, attention="splash", **dtypes)
    shape = fit_config(processor, slots, 512, mesh, prompt_tokens=10_240)
    model = abstract_model(config, mesh, int8)
    state = abstract_slots(model, shape, mesh)
    compiled = next(
        lower().compile() for name, lower, _ in programs(model, state, shape, mesh) if name == "decode_slots"
    )
    moved = moved_per_step(compiled.as_text())
    return {"temporaries": bytes_of(compiled)[1] / GIB, "moved": moved / bytes_to_read(model, state)}


if __name__ == "__main__":
    print(json.dumps({name: measure(*case) for name, case in CASES.items()}))
