"""The first Tarsier against the original's own classes: features, logits, greedy answers, losses and gradients."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tarsier_jax.models.clip_vit
import tarsier_jax.models.vision_layers
from tarsier_jax.config import ModelConfig
from tarsier_jax.families import family_of
from tarsier_jax.generation.decode import generate_batch
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.models.tarsier import Tarsier, unstack
from tarsier_jax.processing.batch import Batch, Buckets, Example, make_batch
from tarsier_jax.processing.packing import Row, RowShape
from tarsier_jax.weights.names import parameters
from tests import tarsier1
from tests.reference import load_ours
from train.losses import sft_loss

ATOL = 1e-4
BUCKETS = Buckets(patches=(16, 576), frames=(8, 16), tokens=(256, 1536, 3072, 5120))
EOS = {"t56-gqa": [1146], "t336-mha": [2]}
PROMPTS = tarsier1.case_ids(lambda case: "greedy_tokens" in case)
VISUALS = tarsier1.case_ids(lambda case: "projected" in case)
LOSSES = tarsier1.case_ids(lambda case: case["kind"] == "loss")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tarsier1")
    for name in tarsier1.NAMES:
        tarsier1.write_checkpoint(directory, name)
    return directory


@pytest.fixture(scope="module")
def models(directory: Path) -> dict[str, Tarsier]:
    return {name: load_ours(directory / name) for name in tarsier1.NAMES}


@jax.jit
def logits_at(model: Tarsier, batch: Batch, positions: Any) -> jax.Array:
    """The logits at some positions of each row: those of 5,000 positions and 32,000 words would fill the memory."""
    return model.decoder.logits(jnp.take_along_axis(model.hidden(batch), positions[..., None], axis=1))


@jax.jit
def features(model: Tarsier, batch: Batch) -> jax.Array:
    return model.encode_frames(batch.patches, batch.frame_hw)


def read_case(name: str, case: str, config: ModelConfig) -> tuple[dict[str, Any], list[Example]]:
    golden = tarsier1.read_cases(name)[case]
    return golden, tarsier1.case_examples(golden, config)


def check_logits(model: Tarsier, name: str, case: str) -> None:
    golden, examples = read_case(name, case, model.config)
    check_rows(model, examples, golden, tarsier1.read_arrays(name), golden["merged_length"])


def check_rows(model: Tarsier, examples: list[Example], golden: dict[str, Any], arrays: Any, length: int) -> None:
    """Compares the logits at the golden positions, which count the padding on the left of each row."""
    batch = make_batch(examples, model.config, BUCKETS)
    padding = length - np.array([len(example.input_ids) for example in examples])
    positions = np.array(golden["positions"]) - padding[:, None]
    logits = np.asarray(logits_at(model, batch, np.maximum(positions, 0)))
    if (key := f"{golden['name']}/vocab_ids") in arrays:
        logits = logits[..., arrays[key]]
    expected, valid = arrays[f"{golden['name']}/logits"], positions >= 0
    assert np.abs(expected).max() > 5
    np.testing.assert_allclose(logits[valid], expected[valid], atol=ATOL, rtol=0)


@pytest.mark.parametrize(("name", "case"), PROMPTS + LOSSES)
def test_logits(models: dict[str, Tarsier], name: str, case: str) -> None:
    """Among them a batch of unequal rows, which the original pads on the left."""
    check_logits(models[name], name, case)


def test_unstacked_layers_give_the_same(directory: Path) -> None:
    check_logits(unstack(load_ours(directory / "t56-gqa")), "t56-gqa", "image")


@pytest.mark.parametrize(("name", "case"), VISUALS)
def test_features(models: dict[str, Tarsier], name: str, case: str) -> None:
    """Those of the first and the last frame at some patches."""
    golden, examples = read_case(name, case, models[name].config)
    output = np.asarray(features(models[name], make_batch(examples, models[name].config, BUCKETS)))[0]
    frames = output.reshape(-1, models[name].config.vision.num_patches, output.shape[-1])
    patches = [0, 1, 4, 15] if name == "t56-gqa" else [0, 1, 24, 575]
    outputs = frames[[0, golden["num_images"] - 1]][:, patches]
    np.testing.assert_allclose(outputs, tarsier1.read_arrays(name)[f"{case}/projected"], atol=ATOL, rtol=0)


@pytest.mark.parametrize(("name", "case"), PROMPTS)
def test_greedy_answers(models: dict[str, Tarsier], name: str, case: str) -> None:
    """Up to the first step whose margin is below the tolerance."""
    golden, examples = read_case(name, case, models[name].config)
    options = SamplingOptions(max_new_tokens=golden.get("max_new_tokens", 32))
    answers = generate_batch(models[name], make_batch(examples, models[name].config, BUCKETS), options, EOS[name])
    margins = golden["margins"] or [[1.0] * options.max_new_tokens] * len(answers)
    for answer, expected, steps in zip(answers, golden["greedy_tokens"], margins, strict=True):
        num_steps = next((i for i, margin in enumerate(steps) if margin < 2 * ATOL), len(steps))
        expected = expected[:num_steps]
        if answer.finish_reason == "eos":  # the original's rows contain the end token and padding
            assert expected[len(answer.tokens)] in EOS[name]
            expected = expected[: len(answer.tokens)]
        assert answer.tokens[:num_steps] == expected
        assert len(set(answer.tokens)) > 4


@pytest.mark.parametrize("case", ["one", "three", "padded"])
def test_pixel_shuffle_and_qwen2(models: dict[str, Tarsier], case: str) -> None:
    """The original's newer class: features, logits and greedy answers."""
    model, arrays, golden = models["ps56-qwen2"], *_newer(case)
    examples = newer_examples(golden, model.config)
    check_rows(model, examples, golden, arrays, len(golden["input_ids"][0]))
    batch = make_batch(examples, model.config, BUCKETS)
    embeddings = np.asarray(model.merge_vision_embeddings(batch, features(model, batch)))
    is_visual = np.concatenate([visual_tokens(e.input_ids, model.config) for e in examples])
    rows = np.concatenate([row[: len(e.input_ids)] for row, e in zip(embeddings, examples, strict=True)])
    expected = arrays[f"{case}/projected"]
    np.testing.assert_allclose(rows[is_visual].reshape(expected.shape), expected, atol=ATOL, rtol=0)
    for answer, tokens in zip(
        generate_batch(model, batch, SamplingOptions(max_new_tokens=16), []), golden["greedy_tokens"], strict=True
    ):
        assert min(golden["smallest_margin"]) > 2 * ATOL
        assert answer.tokens == tokens


def _newer(case: str) -> tuple[Any, dict[str, Any]]:
    return tarsier1.read_arrays("ps56-qwen2"), tarsier1.read_cases("ps56-qwen2")[case]


def visual_tokens(ids: np.ndarray, config: ModelConfig) -> np.ndarray:
    return np.isin(ids, (config.image_token_id, config.image_newline_id, config.image_new_id))


def newer_examples(golden: dict[str, Any], config: ModelConfig) -> list[Example]:
    """The newer class's prompts have an image token per visual embedding, and pixels from a seed."""
    pixels = np.random.RandomState(golden["pixel_seed"]).random_sample(golden["pixel_shape"]) * 4 - 2
    frames = iter(pixels.astype(np.float32))
    examples = []
    for ids, mask, n in zip(golden["input_ids"], golden["attention_mask"], golden["num_images"], strict=True):
        ids = np.array(ids)[np.array(mask, bool)]
        own = np.stack([next(frames) for _ in range(n)]) if n else np.zeros((0, *pixels.shape[1:]), np.float32)
        is_image = ids == config.image_token_id
        number = np.cumsum(is_image) - 1  # of each image token
        ids = ids[~is_image | (number % golden["tokens_per_image"] == 0)]  # one per frame
        examples.append(tarsier1.make_example(ids, ids, own, config))
    return examples


@pytest.mark.parametrize(("name", "case"), LOSSES)
def test_loss_and_gradients(models: dict[str, Tarsier], name: str, case: str) -> None:
    """The vision tower is frozen in the golden data. Two frames share a bin."""
    model = models[name]
    golden, (example,) = read_case(name, case, model.config)
    bins, patches = -(-golden["num_images"] // 2), 2 * model.config.vision.num_patches
    row = Row(RowShape(len(example.input_ids) + 7, bins, patches, 2, 1), model.config)
    assert row.add([example])
    batch = row.build(pad_id=0)
    graph, state = nnx.split(model)

    def mean_loss(state: Any) -> jax.Array:
        total, weight, _ = sft_loss(nnx.merge(graph, state), batch, {})
        return total / weight

    loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(state)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
    flat = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(gradients)}
    norms = {}
    for parameter in parameters(model.config, "tarsier"):
        values = flat[parameter.path]
        layers = values if parameter.stacked else values[None]
        norms |= {name: np.linalg.norm(layer) for name, layer in zip(parameter.names, layers, strict=True)}
    expected = golden["gradient_norms"]
    assert len(expected) > 20
    np.testing.assert_allclose([norms[key] for key in expected], list(expected.values()), rtol=1e-4)
    table = flat["decoder", "embed", "weight"]
    ids = model.config.image_newline_id, model.config.image_new_id, model.config.image_token_id
    np.testing.assert_allclose(
        np.linalg.norm(table[list(ids)], axis=1), list(golden["embedding_gradient_norms"].values()), rtol=1e-4
    )
    idle = [v[-1] if "blocks" in path else v for path, v in flat.items() if _is_idle(path)]
    assert len(idle) == 18  # tensors of the last block and the last norm, which are not run
    assert not any(np.any(v) for v in idle)


@pytest.mark.parametrize("max_patches", [8192, 32])  # all bins at once, and one by one
def test_frames_that_share_a_bin(models: dict[str, Tarsier], max_patches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarsier_jax.models.vision_layers, "_MAX_PATCHES", max_patches)
    for name in ("t56-gqa", "ps56-qwen2"):
        vision = models[name].vision
        patches = np.random.default_rng(0).standard_normal((4, 16, 588)).astype(np.float32)
        alone = vision(patches, np.full((4, 1, 2), 4, np.int32))
        together = vision(patches.reshape(2, 32, 588), np.full((2, 2, 2), 4, np.int32))
        np.testing.assert_allclose(together.reshape(alone.shape), alone, atol=ATOL, rtol=0)


def test_a_bin_of_a_part_of_a_frame(models: dict[str, Tarsier]) -> None:
    with pytest.raises(ValueError, match="A bin has 24 patches, but must contain whole frames of 16"):
        models["t56-gqa"].vision(np.zeros((2, 24, 588), np.float32), np.full((2, 1, 2), 4, np.int32))


@pytest.mark.parametrize("name", ["t56-gqa", "ps56-qwen2"])
def test_flops_of_a_forward_pass(models: dict[str, Tarsier], name: str) -> None:
    """Written out matrix by matrix for two frames: two of the three blocks run, with a class token per frame."""
    config = models[name].config
    E, D, vision = config.vision.embed_dim, config.text.hidden_size, config.vision
    block = 17 * (4 * E * E + 2 * E * vision.mlp_dim) + 2 * 17 * 17 * E
    projector = {"t56-gqa": 16 * (E * D + D * D), "ps56-qwen2": 4 * (4 * E * D + D * D)}[name]
    frame = 16 * 588 * E + 2 * block + projector
    _, tower = family_of(config).forward_flops(config, 0, 0, 2 * 16, 2 * 16 * 16)
    assert tower == pytest.approx(2 * 2 * frame, rel=1e-12)


def _is_idle(path: tuple[Any, ...]) -> bool:
    return path[0] == "vision" and path[1] in ("blocks", "post_norm")


def _swapped_rows(model: Tarsier, monkeypatch: pytest.MonkeyPatch) -> Tarsier:
    ids = {"image_newline_id": model.config.image_new_id, "image_new_id": model.config.image_newline_id}
    return _with_config(model, dataclasses.replace(model.config, **ids))


def _third_last_layer(model: Tarsier, monkeypatch: pytest.MonkeyPatch) -> Tarsier:
    vision = dataclasses.replace(model.config.vision, feature_layer=-3)
    return _with_config(model, dataclasses.replace(model.config, vision=vision))


def _with_config(model: Tarsier, config: ModelConfig) -> Tarsier:
    graph = nnx.graphdef(nnx.eval_shape(lambda: type(model)(config, nnx.Rngs(0))))
    return nnx.merge(graph, nnx.state(model))


def _gelu(model: Tarsier, monkeypatch: pytest.MonkeyPatch) -> Tarsier:
    mlp = tarsier_jax.models.vision_layers.VisionMlp
    monkeypatch.setattr(mlp, "__call__", lambda self, x: self.fc2(jax.nn.gelu(self.fc1(x), approximate=False)))
    return model


def _gelu_by_tanh(model: Tarsier, monkeypatch: pytest.MonkeyPatch) -> Tarsier:
    gelu = jax.nn.gelu
    monkeypatch.setattr(jax.nn, "gelu", lambda x, approximate=True: gelu(x))
    return model


def _no_class_token(model: Tarsier, monkeypatch: pytest.MonkeyPatch) -> Tarsier:
    monkeypatch.setattr(
        tarsier_jax.models.clip_vit.ClipEmbeddings,
        "__call__",
        lambda self, x: jnp.pad(x + self.position_embedding.weight[1:], ((0, 0), (1, 0), (0, 0))),
    )
    return model


@pytest.mark.parametrize("bug", [_swapped_rows, _third_last_layer, _gelu, _gelu_by_tanh, _no_class_token])
def test_a_planted_bug_is_seen(
    models: dict[str, Tarsier],
    bug: Callable[[Tarsier, pytest.MonkeyPatch], Tarsier],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = bug(models["t56-gqa"], monkeypatch)
    logits_at.clear_cache()  # the program without the bug
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_logits(model, "t56-gqa", "image")
    logits_at.clear_cache()
