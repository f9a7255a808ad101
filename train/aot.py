"""Compiles the training step of a recipe for a TPU slice, on a machine without one, and reports whether it fits.

    python -m train.aot --config configs/recap_7b.py --topology v5e:16x16 [--num_slices 2 --config.mesh.data=2]
        [--program dpo] [--config.KEY=VALUE]

Prints the bytes per chip (arguments, temporaries, outputs), the largest replicated array, the collectives by kind with
their number and the bytes that a chip sends per step, and FITS or the excess.

Needs the extra `tpu`: libtpu compiles on any machine. The compiler's estimates of
FLOPs and time ignore loop counts and are not printed. The sizes are those of the config.json in config.model, or of
Qwen2-VL-7B if that is not a local directory.
"""

import dataclasses
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

# The TPU compiler must not look for a TPU, nor JAX for any other device.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import InputError
from tarsier_jax.families import load_config
from tarsier_jax.processing.batch import Batch
from tarsier_jax.programs import run
from train.config import TrainConfig, define_flags, read_flags
from train.data.packing import fit_packing
from train.dpo import dpo_objective
from train.mesh import build_mesh, check_rows
from train.run import Objective, run_config
from train.sft import sft_objective
from train.state import StateSpec, StepBatch, batch_shardings, make_state_spec, make_train_step
from train.transfers import Transfer, read_transfers

GIB = 2**30
# Bytes of a chip's memory that a program can use; the runtime reserves the rest.
ROOM = {"v5e": 15 * GIB, "v5p": 94 * GIB, "v4": 31 * GIB, "v6e": 31 * GIB}
OBJECTIVES = {"sft": sft_objective, "dpo": dpo_objective}


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Memory per chip of a compiled step, and its collectives.

    Attributes:
        arguments: Bytes of the arguments.
        temporaries: Bytes of the temporaries at the peak.
        outputs: Bytes of the outputs that reuse no argument's memory.
        largest_replicated: Bytes of the largest replicated array of the state.
        replicated_name: Path of that array.
        transfers: Transfers between chips; None if JAX cannot read the compiled program.
        kernels: Number of Pallas kernels; None likewise.
    """

    arguments: int
    temporaries: int
    outputs: int
    largest_replicated: int
    replicated_name: str
    transfers: list[Transfer] | None
    kernels: int | None

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs


def topology_devices(name: str, num_slices: int = 1) -> list[Any]:
    """Returns the devices of TPU slices such as "v5e:2x4", known to the compiler only. Raises InputError."""
    size = [int(n) for n in re.findall(r"\d+", name.partition(":")[2])]
    # The compiler assumes hosts of four chips, which a slice of one or two is not.
    host = {"chips_per_host_bounds": (*size, 1, 1)[:3]} if math.prod(size) < 4 else {}
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", num_slices=num_slices, **host).devices)
    except Exception as e:  # the compiler's plugin documents no type
        raise InputError(
            f"Topology {name!r} does not exist ({str(e).splitlines()[0]}). One that exists: v5e:16x16."
        ) from None


def abstract_step_batch(config: TrainConfig, spec: StateSpec, objective: Objective) -> StepBatch:
    """Returns the shapes and shardings of one step's rows."""
    shape, parts = config.data.row_shape, config.grad_accum_steps
    B, S, F = config.data.global_batch_size // parts, shape.tokens, shape.bins
    C, dtype = spec.config.vision.patch_dim, jnp.dtype(spec.config.dtype)

    def array(*dims: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((parts, *dims), dtype)

    batch = Batch(
        input_ids=array(B, S),
        labels=array(B, S),
        position_ids=array(B, S, 3),
        lengths=array(B),
        patches=array(B, F, shape.patches, C, dtype=dtype),
        frame_hw=array(B, F, shape.frames, 2),
        vision_token_index=array(B, S),
        segment_ids=array(B, S),
    )
    step = StepBatch(batch, {name: array(B, *dims, dtype=jnp.float32) for name, dims in objective.extra.items()})
    place = batch_shardings(step, spec.mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), step, place)


def compile_step(config: TrainConfig, model: ModelConfig, objective: Objective, mesh: Mesh) -> Footprint:
    """Compiles the step of `train.loop`."""
    check_rows(config, mesh)
    spec = make_state_spec(model, config.optimizer, config.num_train_steps, mesh, objective.with_reference, config.lora)
    with jax.set_mesh(mesh):
        lowered = make_train_step(spec, objective.loss).lower(spec.shapes, abstract_step_batch(config, spec, objective))
        compiled = lowered.compile()
    text = hlo_text(compiled)
    name, largest = _largest_replicated(spec)
    return Footprint(
        *bytes_of(compiled),
        largest_replicated=largest,
        replicated_name=name,
        transfers=read_transfers(text) if text else None,
        kernels=text.count('custom_call_target="tpu_custom_call"') if text else None,
    )


def bytes_of(compiled: Any) -> tuple[int, int, int]:
    """Returns the bytes per chip of arguments, temporaries and outputs; donated arguments count once.

    The temporaries are those alive at the peak. For some programs that libtpu 0.0.42 accepts, `temp_size_in_bytes`
    exceeds the chip's memory.
    """
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes, memory.peak_memory_in_bytes - memory.argument_size_in_bytes - outputs, outputs


def hlo_text(compiled: Any) -> str | None:
    """Returns the compiled program, or None if JAX cannot print it."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:  # jaxlib's own parser is older than libtpu's programs
        return None


def _largest_replicated(spec: StateSpec) -> tuple[str, int]:
    """Returns path and bytes of the largest replicated array of the state."""
    whole = [("none", 0)]
    for path, x in jax.tree_util.tree_flatten_with_path(spec.shapes)[0]:
        if x.sharding.is_fully_replicated:
            whole.append((jax.tree_util.keystr(path), int(np.prod(x.shape)) * x.dtype.itemsize))
    return max(whole, key=lambda item: item[1])


def format_footprint(footprint: Footprint, room: int) -> str:
    f = footprint
    verdict = "FITS" if f.total <= room else f"EXCEEDS by {(f.total - room) / GIB:.2f} GiB"
    return (
        f"arguments {f.arguments / GIB:.2f}  temporaries {f.temporaries / GIB:.2f}  outputs {f.outputs / GIB:.2f}  "
        f"total {f.total / GIB:.2f} GiB per chip of {room / GIB:.0f}\n"
        f"largest replicated array of the state: {f.replicated_name}, {f.largest_replicated / 2**20:.2f} MiB\n"
        f"{_wires(f)}\n{verdict}"
    )


def _wires(f: Footprint) -> str:
    if f.transfers is None:
        return "collectives: this JAX cannot print the programs of this kind of chip"
    within, between = ([t for t in f.transfers if t.between_slices == slow] for slow in (False, True))
    dcn = f"\nbetween slices: {by_kind(between)}" if between else ""
    return f"collectives: {by_kind(within)}; {f.kernels} splash kernels{dcn}"


def by_kind(transfers: list[Transfer]) -> str:
    """Returns the number and the GiB per chip and run of each kind."""
    sizes = {kind: [t.bytes for t in transfers if t.kind == kind] for kind in sorted({t.kind for t in transfers})}
    return ", ".join(f"{kind} {len(sizes[kind])} ({sum(sizes[kind]) / GIB:.3f} GiB)" for kind in sizes) or "none"


def main() -> int:
    values = define_flags()
    flags.DEFINE_string("topology", "v5e:16x16", "KIND:SIZE of the slice.", flag_values=values)
    flags.DEFINE_integer("num_slices", 1, "Number of slices.", lower_bound=1, flag_values=values)
    flags.DEFINE_enum("program", "sft", list(OBJECTIVES), "Program whose step is compiled.", flag_values=values)
    config = read_flags(values)
    kind = values.topology.partition(":")[0]
    if kind not in ROOM:
        raise InputError(f"--topology {values.topology}: the kind of chip is one of {', '.join(ROOM)}.")
    directory = Path(config.model)
    is_local = (directory / "config.json").exists()
    model = load_config(directory) if is_local else ModelConfig()
    mesh = build_mesh(config.mesh, topology_devices(values.topology, values.num_slices))
    objective = OBJECTIVES[values.program](config)
    packing = fit_packing(config.data, config.processor, model.vision, objective.answers)
    config = dataclasses.replace(config, data=packing)
    model = run_config(model, config, mesh.devices.flat[0])
    text, data = model.text, config.data
    source = "" if is_local else "Qwen2-VL-7B, "
    slices = f"{values.num_slices} x {values.topology}" if values.num_slices > 1 else values.topology
    print(
        f"{objective.name}, {source}{text.num_layers} x {text.hidden_size}, {slices} ({dict(mesh.shape)}), "
        f"{data.global_batch_size} rows of {data.seq_len} tokens and {data.vision_bins} x {data.patches_per_bin} "
        f"patches, {config.grad_accum_steps} accumulation steps",
        flush=True,
    )
    start = time.perf_counter()
    try:
        footprint = compile_step(config, model, objective, mesh)
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        print(f"EXCEEDS: the compiler refuses ({str(e).splitlines()[0]})")
        return 1
    print(f"compiled in {time.perf_counter() - start:.0f} s\n{format_footprint(footprint, ROOM[kind])}")
    return 0 if footprint.total <= ROOM[kind] else 1


if __name__ == "__main__":
    sys.exit(run(main))
