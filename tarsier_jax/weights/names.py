"""The names of each parameter's tensors in a Hugging Face checkpoint, from the tables of the model's family.

Weights keep PyTorch's layout: a tensor and its parameter contain the same values in the same order. Only their shapes
may differ, and one parameter contains the tensors of all layers.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx

from tarsier_jax.config import ModelConfig
from tarsier_jax.families import family_of
from tarsier_jax.families.family import Family, Layout
from tarsier_jax.sharding import parameter_path


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of the model, and the tensors in the checkpoint that it is read from.

    Attributes:
        path: Path in the model's state.
        shape: Shape of the parameter, with the layer dimension if it is stacked.
        stacked: Whether the parameter has a leading layer dimension, with one tensor per layer.
        names: Names of the tensors.
        tensor_shape: Shape of each tensor in the checkpoint.
    """

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    stacked: bool
    names: tuple[str, ...]
    tensor_shape: tuple[int, ...]


def abstract_state(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns the model's structure and the shapes of its parameters, without allocating them."""
    graph, state = _abstract_state(config)
    return graph, jax.tree.map(lambda shape: shape, state)  # a copy, since a State can be changed


@functools.lru_cache(maxsize=8)  # tracing the constructor takes a third of a second
def _abstract_state(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: family_of(config).model(config, nnx.Rngs(0))))


def parameters(config: ModelConfig, layout: str) -> list[Parameter]:
    """Returns every parameter of the model, with the names of its tensors in `layout`."""
    family, (_, state) = family_of(config), abstract_state(config)
    names = _templates(family, family.layouts[layout])
    out = []
    for path, leaf in nnx.to_flat_state(state):
        template = names[parameter_path(path)]
        stacked = "{}" in template
        per_layer = leaf.shape[1:] if stacked else leaf.shape
        tensors = tuple(template.format(i) for i in range(leaf.shape[0])) if stacked else (template,)
        out.append(Parameter(path, leaf.shape, stacked, tensors, family.tensor_shape(path, per_layer, config)))
    return out


def _templates(family: Family, layout: Layout) -> dict[str, str]:
    table = {"decoder/lm_head/weight": layout.lm_head}
    for tower, prefix, rows in (
        ("vision", layout.vision, family.vision_names),
        ("vision", layout.projector, family.projector_names),
        ("decoder", layout.decoder, family.decoder_names),
    ):
        for ours, theirs, kinds in rows:
            table |= {f"{tower}/{ours}/{kind}": f"{prefix}{theirs}.{kind}" for kind in kinds}
    return table


def detect_layout(family: Family, names: Iterable[str]) -> str | None:
    """Returns the layout with the prefix of the vision tower among `names`, or None."""
    names = list(names)
    return next(
        (key for key, layout in family.layouts.items() if any(n.startswith(layout.vision) for n in names)), None
    )
