"""Run by test_tpu: the engine's programs of the 7B compiled for several slices, as JSON.

Per case: GiB of temporaries of each program, the kinds of the collectives of `encode_frames`, and the bytes that a
decoding step moves, as a multiple of the weights and the cache. A few layers at the 7B's widths: bytes are proportional
to the number of layers, and no program needs temporaries per layer. The vocabulary is small, since most of the
compiler's time would be the sort of sampling; `benchmarks.tpu_memory` has the whole model.
"""

import dataclasses
import json
from typing import Any

import jax

from benchmarks.tpu_memory import abstract_model, abstract_slots, bytes_to_read, moved_per_step, programs, tarsier2
from infer.engine import fit_config
from tarsier_jax.config import TextConfig
from tarsier_jax.sharding import make_mesh
from train.aot import GIB, bytes_of, topology_devices
from train.transfers import read_transfers

LAYERS = 13  # the scan over fewer layers is unrolled (`models.layers.apply_layers`), which that over 28 is not
# Slice, tensor-parallel devices, slots per data-parallel part, weights in int8.
CASES = {
    "v5e, tensor 1, int8": ("v5e:1x1", 1, 6, True),
    "v5e, tensor 2": ("v5e:1x2", 2, 16, False),
    "v6e, tensor 1": ("v6e:1x1", 1, 16, False),
}


def measure(topology: str, tensor: int, slots: int, int8: bool) -> dict[str, Any]:
    mesh = make_mesh(tensor=tensor, devices=topology_devices(topology))
    processor = tarsier2(TextConfig(num_layers=LAYERS, vocab_size=128))
    dtypes = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    vision = dataclasses.replace(processor.config.vision, depth=2)
    config = dataclasses.replace(processor.config, vision=vision, attention="splash", **dtypes)
    shape = fit_config(processor, slots, 512, mesh, prompt_tokens=10_240)
    model = abstract_model(config, mesh, int8)
    state = abstract_slots(model, shape, mesh)
    case: dict[str, Any] = {"temporaries": {}}
    for name, lower, _ in programs(model, state, shape, mesh):
        # At the least effort, decoding writes some arrays to the chip's memory which otherwise remain in the cores.
        jax.config.update("jax_exec_time_optimization_effort", 0.0 if name == "decode_slots" else -1.0)
        compiled = lower().compile()
        case["temporaries"][name] = bytes_of(compiled)[1] / GIB
        if name == "decode_slots":
            case["moved"] = moved_per_step(compiled.as_text()) / bytes_to_read(model, state)
        if name == "encode_frames":
            case["vision"] = sorted({transfer.kind for transfer in read_transfers(compiled.as_text())})
    return case


if __name__ == "__main__":
    print(json.dumps({name: measure(*case) for name, case in CASES.items()}))
