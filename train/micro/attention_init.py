"""Initial weights of an untrained model: `look` aims attention heads, `see_change` aims patch filters.

Starting from random weights, most of a short run is spent learning to compare a patch with the same position in the
previous frame. Here heads start with attention to one offset from their query, as in a convolution. Only biases define
the offset; values are random as usual, and training may change all weights.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tarsier_jax.config import Qwen2VisionConfig
from tarsier_jax.models.rope import inverse_frequencies
from tarsier_jax.models.tarsier import Tarsier

SHARPNESS = 5.0  # nats by which a head's score falls one step away from its offset along any axis
_STRONGER = 1.5  # factor of filters of differences, since most of a frame does not change
_FAINT = 0.1  # factor of the head's query and key weights: positions count, not content

# One offset per head of a layer: (time, row, column), or (row, column) in the vision tower.
Offsets = Sequence[tuple[int, ...]]
Projection = tuple[
    np.ndarray, np.ndarray
]  # weights [heads * H, D] and biases [heads * H] of one layer's queries or keys


def look(model: Tarsier, decoder: Sequence[Offsets], vision: Sequence[Offsets]) -> None:
    """Sets queries and keys of the first heads of the first layers, one head per offset."""
    text, tower = model.config.text, model.config.vision
    assert isinstance(tower, Qwen2VisionConfig)
    q, k, qkv = model.decoder.layers.attn.q, model.decoder.layers.attn.k, model.vision.blocks.attn.qkv
    axes = np.repeat(np.arange(len(text.mrope_section)) % 3, text.mrope_section)
    frequencies = inverse_frequencies(text.head_dim, text.rope_theta)
    queries, keys = _copied(q.weight, q.bias), _copied(k.weight, k.bias)
    for layer, offsets in enumerate(decoder):
        a_key = text.num_heads // text.num_kv_heads
        _aim(_of(queries, layer), _of(keys, layer), a_key, [head_biases(frequencies, axes, o) for o in offsets])
    _write((q.weight, q.bias), queries)
    _write((k.weight, k.bias), keys)

    frequencies = np.tile(inverse_frequencies(tower.head_dim // 2, tower.rope_theta), 2)  # rows, then columns
    axes = np.repeat([0, 1], len(frequencies) // 2)
    all_three = _copied(qkv.weight, qkv.bias)  # [L, 3, E, E] and [L, 3, E]
    for layer, offsets in enumerate(vision):
        queries, keys = _of(all_three, (layer, 0)), _of(all_three, (layer, 1))
        _aim(queries, keys, 1, [head_biases(frequencies, axes, o) for o in offsets])
    _write((qkv.weight, qkv.bias), all_three)


def see_change(model: Tarsier) -> None:
    """Sets half of the patch filters to the mean of the two frames of a temporal patch, half to their difference."""
    config, weight = model.config.vision, model.vision.patch_embed.weight
    E, T = config.embed_dim, config.temporal_patch_size
    filters = np.array(weight, np.float32).reshape(E, -1, T, config.patch_size**2)  # [E, colours, T, pixels]
    first, half = filters[:, :, :1] * T**-0.5, E // 2
    filters[:half] = first[:half]
    filters[half:] = _STRONGER * first[half:] * (-1.0) ** np.arange(T)[:, None]
    _write([weight], [filters.reshape(E, -1)])


def head_biases(frequencies: np.ndarray, axes: np.ndarray, offset: Sequence[int]) -> Projection:
    """Returns the biases (H,) of a head's query and key. Their product after RoPE is highest at key - query = `offset`.

    Rotated by position p, pair i of the key is a_i (cos f_i p, sin f_i p). The product is the sum of
    a_i^2 cos(f_i (p_k - p_q - offset)) over the pairs.

    Args:
        frequencies: (H/2,) rotation of pair i per step.
        axes: (H/2,) axis of pair i.
        offset: Steps along each axis.
    """
    decay = np.bincount(axes, weights=1 - np.cos(frequencies))  # one step away along each axis, where a_i is 1
    amplitude = np.sqrt(SHARPNESS * np.sqrt(2 * len(axes)) / decay[axes])  # scores are divided by the root of H
    angles = frequencies * np.asarray(offset)[axes]
    query = np.concatenate([amplitude * np.cos(angles), amplitude * np.sin(angles)])
    return query, np.concatenate([amplitude, np.zeros_like(amplitude)])


def _aim(queries: Projection, keys: Projection, a_key: int, biases: Sequence[Projection]) -> None:
    """Writes the biases of the first heads of a layer; `a_key` heads share a key."""
    for head, (query, key) in enumerate(biases):
        H = len(query)
        for (weight, bias), at, value in ((queries, head, query), (keys, head // a_key, key)):
            rows = slice(at * H, (at + 1) * H)
            if (bias[rows] == value).all():
                continue  # an earlier head shares the key
            weight[rows] *= _FAINT
            bias[rows] = value


def _copied(*parameters: object) -> Projection:
    weight, bias = (np.array(p, np.float32) for p in parameters)
    return weight, bias


def _write(parameters: Sequence[nnx.Param], values: Sequence[np.ndarray]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter[...] = jnp.asarray(value, parameter.dtype)


def _of(projection: Projection, layer: int | tuple[int, int]) -> Projection:
    """Returns views of one layer."""
    weight, bias = projection
    return weight[layer], bias[layer]
