"""Perturbs the order and choice of a video's frames. Descriptions of perturbed videos are DPO's rejected answers.

Source: Tarsier2 (arXiv 2501.07888), section 3.3.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from tarsier_jax.errors import InputError

_PARTS = 4


def perturb(indices: Sequence[int], kind: str | None, rng: np.random.Generator, name: str = "The video") -> list[int]:
    """Perturbs frame indices in one of four ways.

    * exchange: two of four nearly equal parts change places.
    * crop: the same number of frames, evenly spaced over a random three quarters of the clip, as in the original code.
      The paper says half.
    * reverse: a random span of more than half of the frames, up to all, is reversed.
    * discard: a random half of the frames is removed; of an odd number, the larger half.

    Args:
        indices: Frame indices.
        kind: One of PERTURBATIONS; None draws one from `rng`.
        rng: Random generator.
        name: Name of the video in errors.

    Raises:
        InputError: `kind` is unknown, or there are fewer than two frames.
    """
    if kind is None:
        kind = PERTURBATIONS[rng.integers(len(PERTURBATIONS))]
    if kind not in _FUNCTIONS:
        raise InputError(f"Frames cannot be perturbed by {kind!r}. The kinds are {', '.join(PERTURBATIONS)}.")
    if len(indices) < 2:
        raise InputError(
            f"{name} has {len(indices)} frames, too few to disturb. Use two or more frames, or remove disturb."
        )
    return _FUNCTIONS[kind](list(indices), rng)


def _exchange(indices: list[int], rng: np.random.Generator) -> list[int]:
    n, count = len(indices), min(_PARTS, len(indices))
    parts = [indices[i * n // count : (i + 1) * n // count] for i in range(count)]
    a, b = rng.choice(count, 2, replace=False)
    parts[a], parts[b] = parts[b], parts[a]
    return [index for part in parts for index in part]


def _crop(indices: list[int], rng: np.random.Generator) -> list[int]:
    n, cut = len(indices), math.ceil(len(indices) / 4)
    first = int(rng.integers(cut + 1))
    return np.linspace(indices[first], indices[first + n - 1 - cut], n, dtype=int).tolist()


def _reverse(indices: list[int], rng: np.random.Generator) -> list[int]:
    n = len(indices)
    span = int(rng.integers(n // 2 + 1, n + 1))
    start = int(rng.integers(n - span + 1))
    end = start + span
    return indices[:start] + indices[start:end][::-1] + indices[end:]


def _discard(indices: list[int], rng: np.random.Generator) -> list[int]:
    positions = rng.choice(len(indices), len(indices) // 2, replace=False)
    return [indices[i] for i in sorted(positions)]


_FUNCTIONS: dict[str, Callable[[list[int], np.random.Generator], list[int]]] = {
    "exchange": _exchange,
    "crop": _crop,
    "reverse": _reverse,
    "discard": _discard,
}
PERTURBATIONS = tuple(_FUNCTIONS)
