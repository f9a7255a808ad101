"""Each part against the Hugging Face module of the same name, in float32."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import tarsier_jax.models.qwen2_vit
from tarsier_jax.models import decoder
from tarsier_jax.models.qwen2_vit import patch_coordinates
from tarsier_jax.models.rope import mrope_tables, vision_tables
from tarsier_jax.models.tarsier import Tarsier, unstack
from tests import reference

ATOL = 1e-4
T, H, W = 3, 6, 10  # frames, and their height and width in patches
PATCHES = 64  # the padded size of frames of 60 patches
SIZES = {"tiny": reference.TINY, "true widths": reference.TRUE_WIDTHS}


@pytest.fixture(scope="module", params=["tiny", pytest.param("true widths", marks=pytest.mark.slow)])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tarsier]:
    directory: Path = tmp_path_factory.mktemp("modules")
    theirs = reference.make_reference(directory, SIZES[request.param])
    return theirs, unstack(reference.load_ours(directory))


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def call(module: Any, *args: Any) -> Any:
    """The module's output, from one compiled program."""
    return jax.jit(lambda module, args: module(*args))(module, args)


def position_ids() -> np.ndarray:
    """Ids of text, of a video, and of text around position 1,000; (1, S, 3)."""
    config = reference.ModelConfig(image_token_id=reference.IMAGE, video_token_id=reference.VIDEO)
    return reference.make_example([40, (T, H, W), 1000, (2, 4, 4), 20], config).position_ids.T[None]


def test_mrope_tables(models: tuple[Any, Tarsier]) -> None:
    theirs, ours = models
    text, ids = ours.config.text, position_ids()
    expected = theirs.model.language_model.rotary_emb(torch.zeros(1), torch.from_numpy(ids).permute(2, 0, 1).long())
    tables = mrope_tables(ids, text.head_dim, text.rope_theta, text.mrope_section)
    for a, b in zip(tables, expected, strict=True):
        np.testing.assert_allclose(np.tile(a, 2), b.numpy(), atol=ATOL, rtol=0)


def vision_rope(theirs: Any, ours: Tarsier) -> tuple[Any, Any, Any, Any]:
    """The reference's tables for T frames in one sequence, and ours for frames padded to PATCHES."""
    visual, vision = theirs.model.visual, ours.config.vision
    rows = reference.block_order(H, W)
    expected = visual.rotary_pos_emb(torch.zeros(1), torch.from_numpy(np.tile(rows, (T, 1))).long())
    coordinates = patch_coordinates(jnp.array([[[H, W]]] * T), PATCHES, vision.spatial_merge_size)
    np.testing.assert_array_equal(coordinates[:, : H * W], np.broadcast_to(rows, (T, H * W, 2)))
    return *expected, *vision_tables(coordinates, vision.head_dim, vision.rope_theta)


def test_vision_tables(models: tuple[Any, Tarsier]) -> None:
    cos, sin, our_cos, our_sin = vision_rope(*models)
    for a, b in ((our_cos, cos), (our_sin, sin)):
        np.testing.assert_allclose(np.tile(a[:, : H * W], 2).reshape(b.shape), b.numpy(), atol=ATOL, rtol=0)


def test_vision_block(models: tuple[Any, Tarsier]) -> None:
    theirs, ours = models
    width = ours.config.vision.embed_dim
    x = random(T, H * W, width)
    cos, sin, our_cos, our_sin = vision_rope(theirs, ours)
    with torch.no_grad():
        expected = theirs.model.visual.blocks[1](
            torch.from_numpy(x.reshape(-1, width)),
            cu_seqlens=torch.arange(T + 1) * H * W,
            position_embeddings=(cos, sin),
        )
    padded = np.pad(x, ((0, 0), (0, PATCHES - H * W), (0, 0)), constant_values=3.0)  # padding has no effect
    output = call(ours.vision.blocks[1], padded, our_cos, our_sin, {"kv_lengths": jnp.full(T, H * W)})[:, : H * W]
    np.testing.assert_allclose(output.reshape(expected.shape), expected.numpy(), atol=ATOL, rtol=0)


def test_patch_merger(models: tuple[Any, Tarsier]) -> None:
    theirs, ours = models
    x = random(T, H * W, ours.config.vision.embed_dim)
    with torch.no_grad():
        expected = theirs.model.visual.merger(torch.from_numpy(x.reshape(-1, x.shape[-1]))).numpy()
    np.testing.assert_allclose(ours.vision.merger(x).reshape(expected.shape), expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("max_patches", [8192, 2 * PATCHES])  # all frames at once, and two by two
def test_vision_tower(models: tuple[Any, Tarsier], max_patches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarsier_jax.models.vision_layers, "_MAX_PATCHES", max_patches)
    theirs, ours = models
    x = random(T, H * W, ours.config.vision.patch_dim)
    with torch.no_grad():
        expected = theirs.model.visual(torch.from_numpy(x.reshape(-1, x.shape[-1])), torch.tensor([[T, H, W]]))
    padded = np.pad(x, ((0, 1), (0, PATCHES - H * W), (0, 0)))
    output = call(ours.vision, padded, jnp.array([[[H, W]]] * T + [[[0, 0]]]))[:T, : H * W // 4]
    expected = expected.pooler_output.numpy()
    np.testing.assert_allclose(output.reshape(expected.shape), expected, atol=ATOL, rtol=0)


def test_frames_that_share_a_bin(models: tuple[Any, Tarsier]) -> None:
    _, ours = models
    sizes = [(4, 6), (2, 4), (6, 4)]
    frames = [random(h * w, ours.config.vision.patch_dim) for h, w in sizes]
    bins = np.full((2, 40, ours.config.vision.patch_dim), 3.0, np.float32)
    bins[0, :24], bins[0, 24:32], bins[1, :24] = frames
    together = call(ours.vision, bins, jnp.array([[(4, 6), (2, 4)], [(6, 4), (0, 0)]]))
    for output, frame, size in zip((together[0, :6], together[0, 6:8], together[1, :6]), frames, sizes, strict=True):
        alone = call(ours.vision, frame[None], jnp.array([[size]]))[0]
        np.testing.assert_allclose(output, alone, atol=ATOL, rtol=0)


def test_decoder_layer(models: tuple[Any, Tarsier]) -> None:
    theirs, ours = models
    text, ids = ours.config.text, position_ids()[:, :600]
    x = random(1, ids.shape[1], text.hidden_size)
    language_model = theirs.model.language_model
    with torch.no_grad():
        tables = language_model.rotary_emb(torch.zeros(1), torch.from_numpy(ids).permute(2, 0, 1).long())
        causal = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)[None, None]
        expected = language_model.layers[-1](torch.from_numpy(x), attention_mask=causal, position_embeddings=tables)
    cos, sin = mrope_tables(ids, text.head_dim, text.rope_theta, text.mrope_section)
    output, _ = ours.decoder.layers[-1](x, cos, sin, None, None, jnp.int32(1))
    np.testing.assert_allclose(output, expected.numpy(), atol=ATOL, rtol=0)


def test_the_mlp_runs_in_parts(models: tuple[Any, Tarsier], monkeypatch: pytest.MonkeyPatch) -> None:
    """In prefill, where its hidden values are the largest temporaries."""
    monkeypatch.setattr(decoder, "_MLP_TOKENS", 8)
    layer, sizes = models[1].decoder.layers[0], []
    x = random(2, 21, models[1].config.text.hidden_size)

    def mlp(x: Any) -> Any:
        sizes.append(x.shape[1])
        return layer.mlp(x)

    output = decoder.add_in_parts(layer.post_norm, mlp, jnp.asarray(x))
    assert sizes == [8, 8, 5]
    np.testing.assert_allclose(output, x + layer.mlp(layer.post_norm(jnp.asarray(x))), atol=ATOL, rtol=0)
