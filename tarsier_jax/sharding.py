"""The device mesh, and the table of the shardings of all parameters.

Axes: "data" replicates the parameters and splits the batch; "fsdp" splits both; "tensor" splits heads and mlp width.
The mesh has automatic axes: models contain no shardings except a few `constrain` calls, which return their argument
without a mesh.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tarsier_jax.errors import InputError
from tarsier_jax.files import warn

BATCH = ("data", "fsdp")
HEADS = "tensor"
BINS = ("data", "fsdp", "tensor")  # of the vision tower, which are independent

# Regex over "decoder/layers/attn/q/weight" -> spec. Exactly one row matches every parameter. Weights are [out, in], and
# those under `layers` or `blocks` have a leading layer dimension.
RULES: tuple[tuple[str, P], ...] = (
    (r"decoder/(embed|lm_head)/weight", P("tensor", "fsdp")),
    (r"decoder/layers/(attn/[qkv]|mlp/(gate|up))/weight", P(None, "tensor", "fsdp")),
    (r"decoder/layers/attn/[qkv]/bias", P(None, "tensor")),
    (r"decoder/layers/(attn/o|mlp/down)/weight", P(None, "fsdp", "tensor")),
    (r"decoder/layers/(input|post)_norm/weight", P()),
    (r"decoder/norm/weight", P()),
    (r"vision/patch_embed/weight", P("fsdp", None)),
    (r"vision/embeddings/(class_embedding|position_embedding/weight)", P()),
    (r"vision/(pre|post)_norm/(weight|bias)", P()),
    (r"vision/blocks/attn/[qkv]/weight", P(None, "tensor", "fsdp")),
    (r"vision/blocks/attn/[qkv]/bias", P(None, "tensor")),
    (r"vision/blocks/attn/qkv/weight", P(None, None, "tensor", "fsdp")),
    (r"vision/blocks/attn/qkv/bias", P(None, None, "tensor")),
    (r"vision/blocks/mlp/fc1/weight", P(None, "tensor", "fsdp")),
    (r"vision/blocks/mlp/fc1/bias", P(None, "tensor")),
    (r"vision/blocks/(attn/proj|mlp/fc2)/weight", P(None, "fsdp", "tensor")),
    (r"vision/blocks/(attn/proj|mlp/fc2)/bias", P()),
    (r"vision/blocks/norm[12]/(weight|bias)", P()),
    (r"vision/(merger|projector)/norm/(weight|bias)", P()),
    (r"vision/(merger|projector)/(fc1|linear_1)/weight", P("tensor", "fsdp")),
    (r"vision/(merger|projector)/(fc1|linear_1)/bias", P("tensor")),
    (r"vision/(merger|projector)/(fc2|linear_2)/weight", P("fsdp", "tensor")),
    (r"vision/(merger|projector)/(fc2|linear_2)/bias", P()),
)

_LORA = re.compile(r"(?P<module>.+)/lora/(?P<matrix>[ab])")
_STACKED = re.compile(r"/(layers|blocks)/")


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Creates a mesh over `devices` (default: all devices).

    On several TPU slices, "data" spans the slices and the other axes stay within one: only the gradients of "data"
    cross the slow network between slices.

    Raises:
        ValueError: data * fsdp * tensor is not the number of devices.
        InputError: data is not a multiple of the number of TPU slices.
    """
    devices = list(devices) if devices is not None else jax.devices()
    if data * fsdp * tensor != len(devices):
        raise ValueError(f"The mesh data={data}, fsdp={fsdp}, tensor={tensor} does not match {len(devices)} devices.")
    grid = _device_grid((data, fsdp, tensor), devices)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def _device_grid(shape: tuple[int, int, int], devices: list[Any]) -> np.ndarray:
    # JAX also calls the nodes of a GPU cluster slices. Their network is fast enough for fsdp. `jax.make_mesh` refuses
    # several slices of both kinds.
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if slices <= 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, fsdp, tensor = shape
    if data % slices:
        raise InputError(
            f"The mesh axis data={data} is not a multiple of the {slices} TPU slices. Set data to {slices} or a "
            f"multiple of it: fsdp and tensor stay within a slice, which has {len(devices) // slices} chips."
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, fsdp, tensor), (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def parameter_path(path: Sequence[Any]) -> str:
    """Returns "decoder/norm/weight" for ("decoder", "norm", "weight") or such a key path of `jax.tree_util`."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", p))) for p in path)


def parameter_spec(path: str) -> P:
    """Returns the spec of one parameter.

    The matrices A and B of LoRA, ".../lora/a" and ".../lora/b", are split as the input and the output of their weight.

    Raises:
        ValueError: no rule or several rules match the path.
    """
    if match := _LORA.fullmatch(path):
        weight = parameter_spec(f"{match['module']}/weight")
        stacked = (None,) if _STACKED.search(path) else ()
        return P(*stacked, None, weight[-1]) if match["matrix"] == "a" else P(*weight[:-1], None)
    specs = [spec for pattern, spec in RULES if re.fullmatch(pattern, path)]
    if len(specs) != 1:
        raise ValueError(f"{len(specs)} sharding rules match parameter {path}; exactly one must.")
    return specs[0]


def parameter_shardings(abstract: nnx.State, mesh: Mesh) -> dict[tuple[Any, ...], NamedSharding]:
    """Returns the sharding of every parameter of an abstract model state, by flat path.

    Raises:
        ValueError: a mesh axis does not divide the dimension that it splits.
    """
    shardings = {}
    for path, leaf in nnx.to_flat_state(abstract):
        name, shape = parameter_path(path), leaf.shape
        spec = parameter_spec(name)
        for dim, axis in zip(shape, spec, strict=False):
            if axis is not None and dim % mesh.shape[axis]:
                raise ValueError(
                    f"Mesh axis {axis}={mesh.shape[axis]} does not divide dimension {dim} of {name} {shape}."
                )
        shardings[path] = NamedSharding(mesh, spec)
    return shardings


def module_specs(module: Any, path: str, is_layer: bool = False) -> Any:
    """Returns the specs of the parameters of a module, as a tree of its structure.

    Args:
        module: A part of the model, with stacked or unstacked layers.
        path: Its path in the model, such as "vision".
        is_layer: Whether the module is one layer of those at `path`.
    """

    def spec(keys: Sequence[Any], _: jax.Array) -> P:
        *keys, _ = keys  # the last one is the value of an nnx.Param
        names = [key for key in keys if not isinstance(key, jax.tree_util.SequenceKey)]
        stacked = parameter_spec(f"{path}/{parameter_path(names)}")
        return P(*stacked[1:]) if is_layer or len(names) < len(keys) else stacked

    return jax.tree_util.tree_map_with_path(spec, module)


def gather_parameters(module: Any, path: str, is_layer: bool = False) -> Any:
    """Returns a module with its whole parameters, within `jax.shard_map`; elsewhere `module`.

    Args:
        module: See `module_specs`.
        path: See `module_specs`.
        is_layer: See `module_specs`.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return module

    def gather(x: jax.Array, spec: P) -> jax.Array:
        axes = tuple(spec)
        for axis in ("fsdp", "tensor"):  # the larger one first, while the arrays are small
            x = jax.lax.all_gather(x, axis, axis=axes.index(axis), tiled=True) if axis in axes else x
        return x

    return jax.tree.map(gather, module, module_specs(module, path, is_layer))


def current_mesh() -> AbstractMesh | None:
    """Returns the mesh of the surrounding `jax.set_mesh`.

    None without one, and within `jax.shard_map`, whose arrays are those of one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.manual_axes else mesh


def tensor_size() -> int:
    """Returns the number of devices of the tensor axis; 1 where `current_mesh` is None."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape[HEADS]


def fit_spec(shape: Sequence[int], axes: Sequence[Any], mesh: AbstractMesh | Mesh) -> P:
    """Returns `axes` as a spec for an array of `shape`.

    An axis that does not divide its dimension is omitted: the dimension is replicated, with a warning per axis and
    shape.
    """
    return P(*(_fit_axis(i, shape, axis, mesh) for i, axis in zip(range(len(shape)), axes, strict=True)))


def _fit_axis(i: int, shape: Sequence[int], axis: Any, mesh: AbstractMesh | Mesh) -> Any:
    names = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
    size = math.prod(mesh.shape[name] for name in names)
    if shape[i] % size == 0:
        return axis
    label = " x ".join(f"{name}={mesh.shape[name]}" for name in names)
    warn(
        f"Mesh axis {label} does not divide dimension {i} of an array {tuple(shape)}, which is replicated. Choose "
        "sizes that the axis divides, or a smaller axis."
    )
    return None


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Shards `x` over the mesh in context, with one axis or None per dimension. Without a mesh it returns `x`."""
    mesh = current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, fit_spec(x.shape, axes, mesh))


def split_tokens(x: jax.Array) -> jax.Array:
    """Returns (B, T, D) as (B, n, T / n, D) if the tensor axis has n > 1 devices, which divide T."""
    (B, T, D), n = x.shape, tensor_size()
    return x if n == 1 or T % n else x.reshape(B, n, T // n, D)


def constrain_tokens(x: jax.Array) -> jax.Array:
    """Shards a result of `split_tokens`: each device of the tensor axis has one of the n parts."""
    return constrain(x, BATCH, *(HEADS,) * (x.ndim - 3), None, None)


def gather_tokens(x: jax.Array) -> jax.Array:
    """Replicates (B, ..., D) over the tensor axis."""
    return constrain(x, BATCH, *(None,) * (x.ndim - 1))


def bin_padding(groups: int, bins: int) -> int:
    """Returns the number of empty bins per group with which the devices divide the bins, under a tensor axis."""
    mesh = current_mesh()
    if mesh is None or mesh.shape[HEADS] == 1:
        return 0
    return -bins % (mesh.size // math.gcd(groups, mesh.size))
