"""Compiles the engine's four programs for a TPU slice, without a TPU, and prints the bytes per chip.

    python -m benchmarks.tpu_memory [--int8 | --w8a8]                                      # Tarsier2-7B, v5e:2x4
    python -m benchmarks.tpu_memory --model tarsier-34b --topology v5e:4x4 --tensor 8 --tokens 5632

The programs are `encode_frames` (the vision tower), `prefill_into_slots` (prefill of a row of prompts into free
slots), `decode_slots` (decoding) and `extend_slots` (the next turn of a conversation) of
`tarsier_jax.generation.slots`, in bfloat16, at the shapes of `infer.caption` for clips of 16 frames (the first Tarsier:
8). The extra `tpu` is necessary (libtpu compiles on any machine). The compiler's estimates for a program ignore loop
counts and are not printed. Those for the instructions of one layer of prefill are.
"""

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.traffic import Program
from infer.engine import EngineConfig, fit_config
from tarsier_jax.config import ClipVisionConfig, ModelConfig, TextConfig
from tarsier_jax.families import family_of
from tarsier_jax.generation.decode import DecodeState
from tarsier_jax.generation.slots import (
    Continuation,
    SlotAssignment,
    decode_slots,
    empty_slots,
    encode_frames,
    extend_slots,
    prefill_into_slots,
    slot_shardings,
)
from tarsier_jax.models.attention import prefers_lengths
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.batch import Batch
from tarsier_jax.processing.processor import Processor, ProcessorOptions
from tarsier_jax.processing.square_image import ClipImageProcessor
from tarsier_jax.programs import add_int8_flags
from tarsier_jax.sharding import BATCH, make_mesh, parameter_shardings
from tarsier_jax.weights.quantize import Int8, quantized_shape, use_quantized
from train.aot import GIB, ROOM, by_kind, bytes_of, hlo_text, topology_devices
from train.transfers import read_transfers

_LLAMA: dict[str, Any] = {"mrope_section": (64, 0, 0), "qkv_bias": False}
_VICUNA_7B = TextConfig(32_064, 4096, 11_008, 32, num_heads=32, num_kv_heads=32, rope_theta=1e4, **_LLAMA)
_YI_34B = TextConfig(64_064, 7168, 20_480, 60, num_heads=56, num_kv_heads=8, rope_theta=5e6, **_LLAMA)


def tarsier2(text: TextConfig) -> Processor:
    """Returns a processor without a tokenizer, which the shapes of an engine do not depend on."""
    return Processor(None, ModelConfig(text))  # pyright: ignore[reportArgumentType]


def tarsier1(text: TextConfig) -> Processor:
    """Returns the first Tarsier's processor, likewise."""
    config, options = ModelConfig(text, ClipVisionConfig(out_dim=text.hidden_size)), ProcessorOptions(n_frames=8)
    return Processor(None, config, image=ClipImageProcessor(), options=options)  # pyright: ignore[reportArgumentType]


# The vocabulary of Tarsier-34b is not published; 64,064 is Yi-34B's 64,000 rounded up after the additional tokens.
PROCESSORS = {
    "tarsier2-7b": tarsier2(TextConfig()),
    "tarsier-7b": tarsier1(_VICUNA_7B),
    "tarsier-34b": tarsier1(_YI_34B),
}


def abstract_model(config: ModelConfig, mesh: Mesh, int8: Int8 = False) -> Tarsier:
    """Returns the model as shapes with shardings, without allocating memory; with `int8`, quantized as by `load`."""
    graph, state = nnx.split(nnx.eval_shape(lambda: family_of(config).model(config, nnx.Rngs(0))))
    shardings = parameter_shardings(state, mesh)
    change = quantized_shape if int8 else lambda path, x: x
    flat = {
        path: leaf.replace(change(path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])))
        for path, leaf in nnx.to_flat_state(state)
    }
    model = nnx.merge(graph, nnx.from_flat_state(flat))
    return use_quantized(model, int8) if int8 else model


def abstract_slots(model: Tarsier, shape: EngineConfig, mesh: Mesh) -> DecodeState:
    """Returns the state of all slots as shapes with the engine's shardings."""
    state = jax.eval_shape(lambda: empty_slots(model, shape.slots, shape.size, shape.new_tokens))
    return jax.tree.map(_with_sharding, state, slot_shardings(state, mesh))


def _with_sharding(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def programs(
    model: Tarsier, state: DecodeState, shape: EngineConfig, mesh: Mesh
) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Yields the programs for the largest frames and the longest rows.

    Yields:
        Name, function that lowers the program, and bytes per chip of the other arrays that are in memory during the
        program.
    """
    G, row, config = shape.groups, shape.buckets[-1], model.config
    vision, decoder = (shard_bytes(nnx.state(part)) for part in (model.vision, model.decoder))
    # Programs that compute no logits have neither as arguments.
    vision_and_head = vision + (shard_bytes(nnx.state(model.decoder.lm_head)) if model.decoder.lm_head else 0)

    def array(*sizes: int, dtype: Any = jnp.int32, axes: tuple[Any, ...] = (BATCH,)) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P(*axes)))

    number, eos = array(axes=()), array(2, axes=())
    with jax.set_mesh(mesh):
        patches = array(G, row.bins, row.patches, config.vision.patch_dim, dtype=jnp.bfloat16)
        frames = array(G, row.bins, row.frames, 2)
        step, features = shape.step(len(shape.buckets) - 1), shape.num_features(config.vision)
        sizes = {"step": step, "num_features": features}
        program = functools.partial(encode_frames.lower, model, patches, frames, number, **sizes)
        yield "encode_frames", program, decoder + shard_bytes(state)

        ids = array(G, row.tokens)
        positions = array(G, row.tokens, 3)
        rows = Batch(ids, None, positions, array(G), None, None, vision_token_index=ids, segment_ids=ids)
        features = array(G, features, config.text.hidden_size, dtype=jnp.bfloat16)
        prompts = jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), SlotAssignment.none(G, row.samples))
        program = functools.partial(prefill_into_slots.lower, model, state, rows, features, prompts)
        yield "prefill_into_slots", program, vision_and_head
        if prefers_lengths(config.attention):
            alone = dataclasses.replace(rows, segment_ids=None)
            program = functools.partial(prefill_into_slots.lower, model, state, alone, features, prompts)
            yield "prefill_into_slots of one prompt", program, vision_and_head

        cancelled = array(shape.slots, dtype=bool, axes=())
        program = functools.partial(decode_slots.lower, model, state, cancelled, eos, number, number)
        yield "decode_slots", program, vision

        tokens = Continuation.none(G, shape.chunks[-1], shape.prompt_tokens)
        new, prompt = (
            jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), each) for each in (tokens, SlotAssignment.none(G, 1))
        )
        yield "extend_slots", functools.partial(extend_slots.lower, model, state, new, prompt), vision_and_head


def bytes_to_read(model: Tarsier, state: DecodeState) -> int:
    """Returns the bytes per chip that a decoding step must read: the layers, the output head, and all positions."""
    decoder = model.decoder
    head = decoder.lm_head or decoder.embed
    return shard_bytes((decoder.layers, decoder.norm, head, state.cache.k, state.cache.v))


def moved_per_step(hlo: str) -> int:
    """Returns the bytes per chip that an iteration of the loop of `decode_slots` reads and writes."""
    program = Program(hlo)
    return max(map(program.traffic, program.loops()))


def cycles_per_layer(hlo: str) -> int:
    """Returns the estimated cycles of an iteration of the loop over the layers of `prefill_into_slots`."""
    program = Program(hlo)
    return max(map(program.cycles, program.loops()))


def report_memory(name: str, lower: Callable[[], Any], beside: int, limit: int, floor: int) -> int:
    """Compiles one program, prints its bytes per chip and those of the other arrays, and returns the total.

    It also prints the bytes that a chip sends, in one iteration of the outer loop of `encode_frames` and
    `decode_slots`. For `decode_slots`, it prints the bytes that a step moves, and their ratio to `floor`; for prefill,
    the cycles of a layer.
    """
    start = time.perf_counter()
    compiled = lower().compile()
    seconds = time.perf_counter() - start
    arguments, temporaries, outputs = bytes_of(compiled)
    total = arguments + temporaries + outputs + beside
    hlo = hlo_text(compiled) or ""
    kernels = hlo.count('custom_call_target="tpu_custom_call"')
    print(
        f"{name:<18} arguments {arguments / GIB:6.2f}  temporaries {temporaries / GIB:6.2f}  "
        f"outputs {outputs / GIB:6.2f}  beside {beside / GIB:6.2f}  total {total / GIB:6.2f} GiB per chip, "
        f"{'FITS' if total <= limit else 'TOO MUCH'}  ({kernels} splash kernels; compiled in {seconds:.0f} s)",
        flush=True,
    )
    if transfers := read_transfers(hlo):
        print(f"  collectives: {by_kind(transfers)}", flush=True)
    if name.startswith("prefill") and hlo:
        print(f"  a layer takes {cycles_per_layer(hlo) / 1e6:.2f} M cycles, without collectives and splash")
    if name == "decode_slots" and hlo:
        moved = moved_per_step(hlo)
        print(f"  a step moves {moved / 1e9:.2f} GB, {moved / floor:.3f} times the weights and the cache", flush=True)
    return total


def shard_bytes(tree: Any) -> int:
    """Returns the bytes per chip of abstract arrays, without random keys, which are small."""
    leaves = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=PROCESSORS, default="tarsier2-7b")
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--tensor", type=int, default=4, help="tensor-parallel devices; the others are data-parallel")
    parser.add_argument("--slots", type=int, default=32, help="slots per data-parallel part")
    parser.add_argument("--tokens", type=int, default=12_288, help="tokens per slot, including new ones")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    add_int8_flags(parser)
    args = parser.parse_args()
    devices = topology_devices(args.topology)
    groups = len(devices) // args.tensor
    mesh = make_mesh(data=groups, tensor=args.tensor, devices=devices)
    processor = PROCESSORS[args.model]
    dtypes = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    config = dataclasses.replace(processor.config, attention="splash", **dtypes)
    sizes = args.slots * groups, args.max_new_tokens, mesh, args.tokens - args.max_new_tokens
    shape = fit_config(processor, *sizes)
    model = abstract_model(config, mesh, args.int8)
    state = abstract_slots(model, shape, mesh)
    print(
        f"{args.model}, {args.topology}, data={groups} tensor={args.tensor}: {args.slots} slots of {args.tokens} "
        f"tokens per data-parallel part, {shard_bytes(state) / GIB:.2f} GiB per chip; rows of "
        f"{shape.buckets[0].tokens} tokens"
    )
    limit = ROOM[args.topology.partition(":")[0]]
    floor = bytes_to_read(model, state)
    totals = [report_memory(*program, limit, floor) for program in programs(model, state, shape, mesh)]
    return 0 if max(totals) <= limit else 1


if __name__ == "__main__":
    sys.exit(main())
