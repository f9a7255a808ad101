"""Compiles prefill and decoding of the 7B model for a TPU slice, without a TPU, and prints bytes a chip.

    python -m benchmarks.tpu_memory --topology v5e:2x4 --data 2 --tensor 4 --batch 8

Needs the extra `tpu` (libtpu compiles on any machine). The compiler's flop and time estimates ignore loop counts, so
they are not shown.
"""

import argparse
import dataclasses
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tarsier_jax.config import ModelConfig
from tarsier_jax.generation.decode import decode, prefill
from tarsier_jax.generation.sampling import make_sampling
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.batch import Batch
from tarsier_jax.sharding import BATCH, HEADS, fit_spec, make_mesh, parameter_shardings
from train.aot import GIB, bytes_of, topology_devices


def abstract_model(config: ModelConfig, mesh: Mesh) -> Tarsier:
    """The model as shapes with shardings; no memory is taken."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Tarsier(config, nnx.Rngs(0))))
    shardings = parameter_shardings(state, mesh)
    flat = {
        path: leaf.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path]))
        for path, leaf in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(flat))


def abstract_batch(config: ModelConfig, mesh: Mesh, rows: int, tokens: int, frames: int, patches: int) -> Batch:
    """Prompts of `tokens` tokens, each with `frames` frames of `patches` patches."""

    def array(shape: tuple[int, ...], axes: tuple[Any, ...], dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, fit_spec(shape, axes, mesh)))

    return Batch(
        input_ids=array((rows, tokens), (BATCH, None)),
        labels=array((rows, tokens), (BATCH, None)),
        position_ids=array((3, rows, tokens), (None, BATCH, None)),
        lengths=array((rows,), (BATCH,)),
        patches=array((1, rows * frames, patches, config.vision.patch_dim), (None, BATCH, None, None), jnp.float32),
        frame_hw=array((1, rows * frames, 1, 2), (None, BATCH, None, None)),
        visual_index=array((rows, tokens), (BATCH, None)),
    )


def report(name: str, compiled: Any, seconds: float) -> None:
    """Prints one program's bytes a chip."""
    arguments, temporaries, outputs = bytes_of(compiled)
    kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    print(
        f"{name:<8} arguments {arguments / GIB:6.2f}  temporaries {temporaries / GIB:6.2f}  "
        f"outputs {outputs / GIB:6.2f}  total {(arguments + temporaries + outputs) / GIB:6.2f} GiB a chip  "
        f"({kernels} splash kernels; compiled in {seconds:.0f} s)",
        flush=True,
    )


def compile_for(
    config: ModelConfig, mesh: Mesh, rows: int, tokens: int, frames: int, patches: int, max_new: int
) -> tuple[Any, Any]:
    """The two compiled programs of `tarsier_jax.generation.decode`."""
    model = abstract_model(config, mesh)
    batch = abstract_batch(config, mesh, rows, tokens, frames, patches)
    sampling = make_sampling(rows)
    eos, scalar = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    with jax.set_mesh(mesh):
        inputs = model, batch, sampling, eos, keys, scalar
        first = prefill.lower(*inputs, max_new=max_new)
        shapes = jax.eval_shape(lambda *x: prefill(*x, max_new=max_new), *inputs)
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
        spec = fit_spec(shapes.cache.k.shape, (None, BATCH, None, HEADS, None), mesh)
        cache = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(mesh, spec if x.ndim == 5 else P())
            ),
            state.cache,
        )
        state = dataclasses.replace(state, cache=cache)
        second = decode.lower(model, state, eos, scalar, scalar)
    return first, second


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--data", type=int, default=2)
    parser.add_argument("--tensor", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=10_240)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--patches", type=int, default=2432)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    args = parser.parse_args()
    mesh = make_mesh(data=args.data, tensor=args.tensor, devices=topology_devices(args.topology))
    config = ModelConfig(dtype="bfloat16", param_dtype="bfloat16", attention="splash")
    print(f"7B, {args.topology}, data={args.data} tensor={args.tensor}, {args.batch} prompts of {args.tokens} tokens")
    programs = compile_for(config, mesh, args.batch, args.tokens, args.frames, args.patches, args.max_new_tokens)
    for name, lowered in zip(("prefill", "decode"), programs, strict=True):
        start = time.perf_counter()
        report(name, lowered.compile(), time.perf_counter() - start)
    return 0


if __name__ == "__main__":
    sys.exit(main())
