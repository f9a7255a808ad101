"""Where an untrained model begins to look: `look`, at places beside a token, and `see_change`, at what changes.

Found out from random weights, that what moves is to be compared with the same place a frame ago takes most of a short
training. Heads begin by looking at one place beside their query, as a convolution does: only biases say where, and what
they see there is random as usual. Training may change all of it.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tarsier_jax.models.rope import inverse_frequencies
from tarsier_jax.models.tarsier import Tarsier

SHARPNESS = 5.0  # nats by which a head's score falls one step, along any axis, from where it looks
_STRONGER = 1.5  # filters of changes than others: most of a frame does not change
_FAINT = 0.1  # what is left of the weights of its queries and keys, so that places count and not what is there

# One for each head of a layer: steps of (time, row, column), or of (row, column) in the vision tower.
Offsets = Sequence[tuple[int, ...]]
Projection = tuple[np.ndarray, np.ndarray]  # weights [heads H, D] and biases [heads H] of one layer's queries or keys


def look(model: Tarsier, decoder: Sequence[Offsets], vision: Sequence[Offsets]) -> None:
    """Sets queries and keys of the first heads of the first layers; the others stay as they are."""
    text, tower = model.config.text, model.config.vision
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
    """Half of the patch filters begin with what both frames of a temporal patch show, half with their difference."""
    config, weight = model.config.vision, model.vision.patch_embed.weight
    E, T = config.embed_dim, config.temporal_patch_size
    filters = np.array(weight, np.float32).reshape(E, -1, T, config.patch_size**2)  # [E, colours, T, pixels]
    first, half = filters[:, :, :1] * T**-0.5, E // 2
    filters[:half] = first[:half]
    filters[half:] = _STRONGER * first[half:] * (-1.0) ** np.arange(T)[:, None]
    _write([weight], [filters.reshape(E, -1)])


def head_biases(frequencies: np.ndarray, axes: np.ndarray, offset: Sequence[int]) -> Projection:
    """Biases (H,) of a head's query and key whose product, after RoPE, is highest where key - query is `offset`.

    Turned by p, the key's pair i is a_i (cos f_i p, sin f_i p), so that the product is the sum of a_i^2 cos(f_i (p_k -
    p_q - offset)) over the pairs.

    Args:
        frequencies: (H/2,) by which pair i turns for each step.  axes: (H/2,) along which axis.
    """
    lost = np.bincount(axes, weights=1 - np.cos(frequencies))  # one step away along each axis, where a_i is 1
    amplitude = np.sqrt(SHARPNESS * np.sqrt(2 * len(axes)) / lost[axes])  # scores are divided by the root of H
    angles = frequencies * np.asarray(offset)[axes]
    query = np.concatenate([amplitude * np.cos(angles), amplitude * np.sin(angles)])
    return query, np.concatenate([amplitude, np.zeros_like(amplitude)])


def _aim(queries: Projection, keys: Projection, a_key: int, biases: Sequence[Projection]) -> None:
    """Writes the biases of the first heads of a layer, of which `a_key` share a key."""
    for head, (query, key) in enumerate(biases):
        H = len(query)
        for (weight, bias), at, value in ((queries, head, query), (keys, head // a_key, key)):
            rows = slice(at * H, (at + 1) * H)
            if (bias[rows] == value).all():
                continue  # a key that was written for an earlier head
            weight[rows] *= _FAINT
            bias[rows] = value


def _copied(*parameters: object) -> Projection:
    weight, bias = (np.array(p, np.float32) for p in parameters)
    return weight, bias


def _write(parameters: Sequence[nnx.Param], values: Sequence[np.ndarray]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter[...] = jnp.asarray(value, parameter.dtype)


def _of(projection: Projection, layer: int | tuple[int, int]) -> Projection:
    """Views of one layer."""
    weight, bias = projection
    return weight[layer], bias[layer]
