"""The device mesh and the one table that says how everything lies on it.

Axes: "data" copies the parameters and splits the batch; "fsdp" splits both; "tensor" splits heads and mlp width.
The mesh has automatic axes: models carry no sharding, only a few `constrain` calls that do nothing without a mesh.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = ("data", "fsdp")
HEADS = "tensor"

# Regex over "decoder/layers/attn/q/weight" -> spec. Exactly one row matches a parameter. Weights are [out, in], and
# those under `layers` or `blocks` carry a leading layer dimension.
RULES: tuple[tuple[str, P], ...] = (
    (r"decoder/(embed|lm_head)/weight", P("tensor", "fsdp")),
    (r"decoder/layers/(attn/[qkv]|mlp/(gate|up))/weight", P(None, "tensor", "fsdp")),
    (r"decoder/layers/attn/[qkv]/bias", P(None, "tensor")),
    (r"decoder/layers/(attn/o|mlp/down)/weight", P(None, "fsdp", "tensor")),
    (r"decoder/layers/(input|post)_norm/weight", P()),
    (r"decoder/norm/weight", P()),
    (r"vision/patch_embed/weight", P("fsdp", None)),
    (r"vision/blocks/attn/qkv/weight", P(None, None, "tensor", "fsdp")),
    (r"vision/blocks/attn/qkv/bias", P(None, None, "tensor")),
    (r"vision/blocks/mlp/fc1/weight", P(None, "tensor", "fsdp")),
    (r"vision/blocks/mlp/fc1/bias", P(None, "tensor")),
    (r"vision/blocks/(attn/proj|mlp/fc2)/weight", P(None, "fsdp", "tensor")),
    (r"vision/blocks/(attn/proj|mlp/fc2)/bias", P()),
    (r"vision/blocks/norm[12]/(weight|bias)", P()),
    (r"vision/merger/norm/(weight|bias)", P()),
    (r"vision/merger/fc1/weight", P("tensor", "fsdp")),
    (r"vision/merger/fc1/bias", P("tensor")),
    (r"vision/merger/fc2/weight", P("fsdp", "tensor")),
    (r"vision/merger/fc2/bias", P()),
)


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of them).

    Raises:
        ValueError: data * fsdp * tensor is not the number of devices.
    """
    count = len(devices) if devices is not None else jax.device_count()
    if data * fsdp * tensor != count:
        raise ValueError(f"The mesh data={data}, fsdp={fsdp}, tensor={tensor} does not match {count} devices.")
    shape, names = (data, fsdp, tensor), ("data", "fsdp", "tensor")
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3, devices=devices)


def parameter_path(path: Sequence[Any]) -> str:
    """("decoder", "norm", "weight") -> "decoder/norm/weight"; also takes the key paths of `jax.tree_util`."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", p))) for p in path)


def parameter_spec(path: str) -> P:
    """The spec of one parameter.

    Raises:
        ValueError: no rule or several rules match the path.
    """
    specs = [spec for pattern, spec in RULES if re.fullmatch(pattern, path)]
    if len(specs) != 1:
        raise ValueError(f"{len(specs)} sharding rules match parameter {path}; exactly one must.")
    return specs[0]


def parameter_shardings(abstract: nnx.State, mesh: Mesh) -> dict[tuple[Any, ...], NamedSharding]:
    """Flat path -> sharding for every parameter of an abstract model state.

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


def current_mesh() -> AbstractMesh | None:
    """The mesh of the surrounding `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def fit_spec(shape: Sequence[int], axes: Sequence[Any], mesh: AbstractMesh | Mesh) -> P:
    """`axes` as a spec, with axes that do not divide their dimension left out (that dimension is replicated)."""

    def fits(dim: int, axis: Any) -> bool:
        names = axis if isinstance(axis, tuple) else (axis,)
        parts = 1
        for name in names:
            parts *= mesh.shape[name]
        return dim % parts == 0

    return P(*(axis if axis is not None and fits(dim, axis) else None for dim, axis in zip(shape, axes, strict=True)))


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Lays `x` out over the mesh in context, one axis (or None) a dimension; without a mesh it returns x."""
    mesh = current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, fit_spec(x.shape, axes, mesh))
