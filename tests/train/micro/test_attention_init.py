"""Offsets that heads of an untrained model attend to, with the rotary embeddings of decoder and vision tower."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import tarsier_jax
from tarsier_jax.models.rope import inverse_frequencies, mrope_tables, rotate, vision_tables
from tarsier_jax.models.tarsier import Tarsier
from train.micro.attention_init import SHARPNESS, head_biases
from train.micro.checkpoint import DECODER_OFFSETS, MICRO, VISION_OFFSETS
from train.untrained import write_untrained

GRID = np.stack(np.meshgrid(range(5), range(4), range(4), indexing="ij")).reshape(3, -1)  # (time, row, column), S
SECTIONS, H, THETA = (1,) * 8 + (0,), 16, 300.0


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Tarsier:
    directory: Path = write_untrained(tmp_path_factory.mktemp("micro") / "model", MICRO)
    return tarsier_jax.load(directory)[0]


def scores(query: np.ndarray, key: np.ndarray, tables: tuple[jnp.ndarray, jnp.ndarray]) -> np.ndarray:
    """(S, S) of queries and keys that are the same everywhere, before RoPE; in nats."""
    places = tables[0].shape[1]
    q, k = (rotate(jnp.broadcast_to(jnp.asarray(x), (1, places, 1, len(x))), *tables)[0, :, 0] for x in (query, key))
    return np.asarray(q @ k.T) / len(query) ** 0.5


def decoder_scores(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    return scores(query, key, mrope_tables(jnp.asarray(GRID).T[None], H, THETA, SECTIONS))


@pytest.mark.parametrize("offset", [(-1, 0, 0), (-1, 0, 1), (0, -1, 0), (-2, 0, 0), (0, 0, 0)])
def test_a_head_looks_at_one_place_beside_its_query(offset: tuple[int, int, int]) -> None:
    axes = np.repeat(np.arange(len(SECTIONS)) % 3, SECTIONS)
    found = decoder_scores(*head_biases(inverse_frequencies(H, THETA), axes, offset))
    at = {tuple(place): i for i, place in enumerate(GRID.T.tolist())}
    for place, i in at.items():
        aim = tuple(np.add(place, offset).tolist())
        if aim not in at:
            continue
        best = found[i, at[aim]]
        assert found[i].argmax() == at[aim]
        for axis in range(3):
            beside = at.get((*aim[:axis], aim[axis] + 1, *aim[axis + 1 :]))
            if beside is not None:
                np.testing.assert_allclose(best - found[i, beside], SHARPNESS, rtol=1e-4)


def test_the_decoder_of_micro(micro: Tarsier) -> None:
    """For any tokens, heads attend to DECODER_OFFSETS; heads of later layers have no biases."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, GRID.shape[1], 192)), jnp.float32)
    tables = mrope_tables(jnp.asarray(GRID).T[None], H, THETA, SECTIONS)
    middle = GRID.T.tolist().index([3, 2, 2])
    for layer, offsets in enumerate(DECODER_OFFSETS):
        attn = micro.decoder.layers[layer].attn
        q, k = (rotate(f(x).reshape(1, -1, heads, H), *tables)[0] for f, heads in ((attn.q, 12), (attn.k, 4)))
        for head, offset in enumerate(offsets):
            aim = (GRID[:, middle] + offset).tolist()
            assert int((k[:, head // 3] @ q[middle, head]).argmax()) == GRID.T.tolist().index(aim)
    assert not micro.decoder.layers[2].attn.q.bias[...].any()


def test_half_of_the_patch_filters_of_micro_see_changes_only(micro: Tarsier) -> None:
    rng = np.random.default_rng(0)
    before, after = rng.standard_normal((2, 1, 3, 1, 14 * 14))
    still, changed = (np.concatenate(pair, axis=2).reshape(1, -1) for pair in ((before, before), (before, after)))
    seen, seen_changed = (
        np.asarray(micro.vision.patch_embed(jnp.asarray(x, jnp.float32)))[0] for x in (still, changed)
    )
    half = len(seen) // 2
    np.testing.assert_allclose(seen[half:], 0.0, atol=1e-5)
    assert np.abs(seen[:half]).min() > 1e-5 and np.abs(seen_changed[half:]).min() > 1e-5


def test_the_vision_tower_of_micro(micro: Tarsier) -> None:
    config = micro.config.vision
    rows, columns = np.divmod(np.arange(36), 6)
    tables = vision_tables(jnp.asarray(np.stack([rows, columns], -1))[None], config.head_dim, config.rope_theta)
    for layer, offsets in enumerate(VISION_OFFSETS):
        biases = np.asarray(micro.vision.blocks[layer].attn.qkv.bias[...]).reshape(3, config.num_heads, -1)
        for head, (down, right) in enumerate(offsets):
            aim = (2 + down) * 6 + 2 + right
            assert scores(biases[0, head], biases[1, head], tables)[2 * 6 + 2].argmax() == aim
