"""Every tensor of a checkpoint against every parameter of the model, strictly and in both directions."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import CheckpointError
from tarsier_jax.families import family_of
from tarsier_jax.weights.names import Parameter, detect_layout, parameters
from tarsier_jax.weights.safetensors import Tensor, open_tensors

_SHOWN = 10  # names of each kind of problem that an error lists
_PIECE = 2**24  # values compared at a time


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face directory whose tensors are known to fit the model."""

    directory: Path
    layout: str
    tied_head: bool  # it holds an output head although that is tied to the embedding
    sources: tuple[tuple[Parameter, tuple[Tensor, ...]], ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensors in self.sources for tensor in tensors)


def open_checkpoint(directory: Path, config: ModelConfig) -> Checkpoint:
    """Matches names, shapes and dtypes; reads no values, but for a tied head.

    Raises:
        CheckpointError: a tensor is missing, is one too many, or has another shape; the layers of one parameter have
            different dtypes; a tied head differs from the embedding. All problems are told at once.
    """
    family, tensors = family_of(config), open_tensors(directory)
    layout = detect_layout(family, tensors)
    if layout is None:
        raise CheckpointError(
            f"{directory} contains no vision tower: no tensor's name begins with "
            f"{', '.join(each.vision for each in family.layouts.values())}. Give a {family.name} checkpoint."
        )
    wanted = parameters(config, layout)
    left = {
        name: t
        for name, t in tensors.items()
        if not any(re.fullmatch(pattern, name) for pattern in family.ignored_names)
    }
    head = left.pop(family.layouts[layout].lm_head, None) if config.text.tie_embeddings else None
    missing, misshapen, mixed = [], [], []
    sources = []
    for parameter in wanted:
        found = [left.pop(name, None) for name in parameter.names]
        missing += [name for name, t in zip(parameter.names, found, strict=True) if t is None]
        misshapen += [
            f"{name} {t.shape} instead of {parameter.tensor_shape}"
            for name, t in zip(parameter.names, found, strict=True)
            if t is not None and t.shape != parameter.tensor_shape
        ]
        present = tuple(t for t in found if t is not None)
        if len({t.dtype for t in present}) > 1:
            mixed.append(f"{parameter.names[0]} to {parameter.names[-1]}")
        sources.append((parameter, present))
    problems = [
        *_told("missing", missing),
        *_told("not part of the model", left),
        *_told("misshapen", misshapen),
        *_told("of different dtypes from layer to layer", mixed),
    ]
    if head is not None and not problems:
        embedding = next(present[0] for parameter, present in sources if parameter.path[:2] == ("decoder", "embed"))
        if not _equal(head, embedding):
            problems.append("config.json ties the output head to the embedding, but their tensors differ")
    if problems:
        raise CheckpointError(
            f"{directory} does not fit its config.json ({layout} layout): {'; '.join(problems)}. "
            "Download the checkpoint again, or mend its config.json."
        )
    return Checkpoint(directory, layout, head is not None, tuple(sources))


def _told(what: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{len(names)} tensors are {what}: {', '.join(names[:_SHOWN])}{more}"]


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = np.uint32 if a.dtype.itemsize == 4 else np.uint16
    ranges = ((i, min(i + _PIECE, a.size)) for i in range(0, a.size, _PIECE))
    return all(np.array_equal(a.read(i, j).view(bits), b.read(i, j).view(bits)) for i, j in ranges)
