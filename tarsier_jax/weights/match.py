"""Matches the tensors of a checkpoint and the parameters of the model, strictly and in both directions."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import CheckpointError
from tarsier_jax.families import family_of
from tarsier_jax.weights.names import Parameter, detect_layout, parameters
from tarsier_jax.weights.safetensors import Tensor, open_tensors

_MAX_LISTED = 10  # names per kind of problem in an error
_PIECE = 2**24  # values per comparison


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face directory whose tensors fit the model.

    Attributes:
        directory: The directory.
        layout: Key of `Family.layouts`.
        tied_head: Whether the files contain an output head although it is tied to the embedding.
        sources: Every parameter with its tensors, one per layer.
    """

    directory: Path
    layout: str
    tied_head: bool
    sources: tuple[tuple[Parameter, tuple[Tensor, ...]], ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensors in self.sources for tensor in tensors)


def open_checkpoint(directory: Path, config: ModelConfig) -> Checkpoint:
    """Matches names, shapes and dtypes. Reads values only to compare a tied head with the embedding.

    Raises:
        CheckpointError: a tensor is missing, belongs to no parameter, or has another shape; the layers of one
            parameter have different dtypes; a tied head differs from the embedding. One error lists all problems.
    """
    family = family_of(config)
    tensors = open_tensors(directory, family.ignored_names)
    layout = detect_layout(family, tensors)
    if layout is None:
        raise CheckpointError(
            f"{directory} contains no vision tower: no tensor's name starts with "
            f"{', '.join(each.vision for each in family.layouts.values())}. Use a {family.name} checkpoint."
        )
    remaining = dict(tensors)
    head = remaining.pop(family.layouts[layout].lm_head, None) if config.text.tie_embeddings else None
    missing, misshapen, mixed = [], [], []
    sources = []
    for parameter in parameters(config, layout):
        matches = [remaining.pop(name, None) for name in parameter.names]
        missing += [name for name, t in zip(parameter.names, matches, strict=True) if t is None]
        misshapen += [
            f"{name} {t.shape} instead of {parameter.tensor_shape}"
            for name, t in zip(parameter.names, matches, strict=True)
            if t is not None and t.shape != parameter.tensor_shape
        ]
        present = tuple(t for t in matches if t is not None)
        if len({t.dtype for t in present}) > 1:
            mixed.append(f"{parameter.names[0]} to {parameter.names[-1]}")
        sources.append((parameter, present))
    problems = [
        *_list_names("missing", missing),
        *_list_names("not part of the model", remaining),
        *_list_names("misshapen", misshapen),
        *_list_names("of different dtypes from layer to layer", mixed),
    ]
    if head is not None and not problems:
        embedding = next(present[0] for parameter, present in sources if parameter.path[:2] == ("decoder", "embed"))
        if not _equal(head, embedding):
            problems.append("config.json ties the output head to the embedding, but their tensors differ")
    if problems:
        raise CheckpointError(
            f"{directory} does not fit its config.json ({layout} layout): {'; '.join(problems)}. "
            "Download the checkpoint again, or correct its config.json."
        )
    return Checkpoint(directory, layout, head is not None, tuple(sources))


def _list_names(problem: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return [f"{len(names)} tensors are {problem}: {', '.join(names[:_MAX_LISTED])}{more}"]


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = np.uint32 if a.dtype.itemsize == 4 else np.uint16
    ranges = ((i, min(i + _PIECE, a.size)) for i in range(0, a.size, _PIECE))
    return all(np.array_equal(a.read(i, j).view(bits), b.read(i, j).view(bits)) for i, j in ranges)
