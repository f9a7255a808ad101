"""Disturbing the order and choice of a video's frames, so that the model describes it wrongly: DPO's rejected answers.

Source: Tarsier2 (arXiv 2501.07888), section 3.3.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from tarsier_jax.errors import InputError

_PARTS = 4


def disturb(indices: Sequence[int], kind: str | None, rng: np.random.Generator, name: str = "The video") -> list[int]:
    """The frame indices, disturbed in one of four ways; without a `kind`, in one drawn from `rng`.

    exchange: of four parts, as even as can be, two change places.
    crop: as many frames as before, evenly from a random three quarters of the clip, as the original code has it; the
    paper says half.
    reverse: a random span of more than half of the frames, up to all, runs backwards.
    discard: half of the frames, drawn at random, are left out; of an odd number, the larger half.

    Raises:
        InputError: there is no such kind, or there are fewer than two frames. `name` begins the latter.
    """
    if kind is None:
        kind = KINDS[rng.integers(len(KINDS))]
    if kind not in _WAYS:
        raise InputError(f"Frames cannot be disturbed by {kind!r}. The kinds are {', '.join(KINDS)}.")
    if len(indices) < 2:
        raise InputError(f"{name} shows {len(indices)} frames, too few to disturb. Show two or more, or leave it out.")
    return _WAYS[kind](list(indices), rng)


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
    kept = rng.choice(len(indices), len(indices) // 2, replace=False)
    return [indices[i] for i in sorted(kept)]


_WAYS: dict[str, Callable[[list[int], np.random.Generator], list[int]]] = {
    "exchange": _exchange,
    "crop": _crop,
    "reverse": _reverse,
    "discard": _discard,
}
KINDS = tuple(_WAYS)
