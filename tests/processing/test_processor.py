import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import CheckpointError, InputError
from tarsier_jax.processing.processor import Processor, ProcessorOptions, load_processor, media_sample
from tarsier_jax.processing.video import open_clip
from tests.processing.conftest import formula_frame, user, video_item, write_json

PROMPT = "Describe the video in detail."


def test_an_example(processor: Processor, mp4: Path) -> None:
    example = processor.replace(n_frames=8)(media_sample(mp4))
    np.testing.assert_array_equal(example.grid_thw, [[8, 4, 4]])
    assert example.pixel_values.shape == (8 * 16, 1176)
    pads = "<|image_pad|>" * (8 * 4)
    assert processor.tokenizer.decode(example.input_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (example.labels == -100).all()
    assert example.position_ids.shape == (3, len(example.input_ids))
    dtypes = {name: str(value.dtype) for name, value in vars(example).items() if isinstance(value, np.ndarray)}
    assert vars(example).keys() - dtypes.keys() == {"num_truncated", "frames", "selections"}
    assert dtypes == {name: "float32" if name == "pixel_values" else "int32" for name in dtypes}


def test_an_example_names_its_frames(processor: Processor, mp4: Path) -> None:
    item = {"type": "image", "image": {"video_file": str(mp4), "frame_indices": 2}}
    frames = [formula_frame(56, 56, i) for i in range(2)]
    (clip,) = processor.replace(n_frames=3)(media_sample(mp4)).selections
    still, video = processor(user(item, video_item(*frames), PROMPT)).selections
    times = open_clip(mp4).times
    assert times is not None and clip.indices[0] == 0 and clip.indices[-1] == len(times) - 1
    assert clip.times == tuple(times[list(clip.indices)]) and still.times == (times[2],)
    assert (still.indices, video.indices, video.times) == ((2,), (0, 1), None)


def test_grids_are_the_originals(processor: Processor, tables: dict) -> None:
    for row in tables["grids"]:
        black = Image.new("RGB", (row["width"], row["height"]))
        if row.get("kind") == "image":
            item = {"type": "image", "image": {"frames": black}}
        elif row["n_frames"] * row["width"] * row["height"] > 5_000_000:
            continue  # the larger ones take seconds each
        else:
            item = video_item(*[black] * row["n_frames"])
        fitting = processor.replace(n_frames=row.get("n_frames", 16), max_pixels=row["max_pixels"])
        np.testing.assert_array_equal(fitting(user(item, PROMPT)).grid_thw, [row["grid_thw"]])


def test_many_frames_share_the_budget_of_pixels(processor: Processor) -> None:
    """854 x 480 pixels are within max_pixels; the limit of 64 doubled frames is 147,456 pixels each."""
    visuals = [formula_frame(854, 480, 0)] * 4
    small = processor.replace(max_pixels_per_sample=8 * 147_456)(user(video_item(*visuals)))
    np.testing.assert_array_equal(small.grid_thw, [[4, 20, 36]])  # as in the table, for 64 frames
    paired = processor.replace(max_pixels_per_sample=4 * 147_456, double_frames=False)(user(video_item(*visuals)))
    np.testing.assert_array_equal(paired.grid_thw, [[2, 20, 36]])


def test_a_checkpoint_that_pairs_frames_is_shown_pairs(processor: Processor) -> None:
    """For both values of the option. An odd frame at the end is paired with itself."""
    frames = [formula_frame(56, 56, i) for i in range(3)]
    own = dataclasses.replace(processor, image=dataclasses.replace(processor.image, double_frames=False))
    by_option = processor.replace(double_frames=False)(user(video_item(*frames)))
    by_checkpoint = own(user(video_item(*frames)))
    np.testing.assert_array_equal(by_checkpoint.grid_thw, [[2, 4, 4]])
    assert by_checkpoint.frames == 3
    np.testing.assert_array_equal(by_checkpoint.pixel_values, by_option.pixel_values)


def test_a_sample_may_have_limits_of_its_own(processor: Processor) -> None:
    sample = user(video_item(formula_frame(280, 280, 0)))
    np.testing.assert_array_equal(processor(sample).grid_thw, [[1, 20, 20]])
    sample["image_processing_config"] = {"max_pixels": 112 * 112}
    np.testing.assert_array_equal(processor(sample).grid_thw, [[1, 8, 8]])
    sample["image_processing_config"] = {"max_pixels": 10, "min_pixels": 20}
    with pytest.raises(InputError, match="min_pixels 20 is not between 0 and max_pixels 10"):
        processor(sample)
    sample["image_processing_config"] = {"do_padding": True}
    with pytest.raises(InputError, match="do_padding is not supported"):
        processor(sample)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ([1], r"must be like .*, not \[1\]"),
        ({"max_pixels": "100000"}, "max_pixels must be a number, not '100000'"),
        ({"max_pixels": float("nan")}, "max_pixels must be a number, not nan"),
        ({"min_pixels": True}, "min_pixels must be a number, not True"),
        ({"max_pixels": 0}, "max_pixels must be at least 1, not 0"),
        ({"min_pixels": -5}, "min_pixels -5 is not between 0 and"),
        ({"max_pixels": 10**400}, "max_pixels must be a number, not 1000"),
    ],
)
def test_malformed_limits(processor: Processor, limits: object, message: str) -> None:
    with pytest.raises(InputError, match=f"image_processing_config.*{message}"):
        processor({**user(video_item(formula_frame(56, 56, 0))), "image_processing_config": limits})


def test_several_visuals(processor: Processor) -> None:
    image = {"type": "image", "image": {"frames": formula_frame(56, 84, 3)}}
    videos = video_item(formula_frame(56, 56, 0), formula_frame(56, 56, 1)), video_item(formula_frame(84, 56, 2))
    example = processor(user(videos[0], "then", image, "then", videos[1]))
    np.testing.assert_array_equal(example.grid_thw, [[2, 4, 4], [1, 6, 4], [1, 4, 6]])
    alone = processor(user(image))
    np.testing.assert_array_equal(example.pixel_values[32:56], alone.pixel_values)


def test_text_alone(processor: Processor) -> None:
    example = processor({"messages": [{"role": "user", "content": "Hi"}]})
    assert (example.pixel_values.shape, example.grid_thw.shape) == ((0, 1176), (0, 3))
    np.testing.assert_array_equal(example.position_ids[0], np.arange(len(example.input_ids)))
    assert processor.batch([example]).patches.shape == (1, 0, 0, 1176)


def test_the_sample_is_left_as_it_is(processor: Processor, mp4: Path) -> None:
    sample = media_sample(mp4)
    sample["image_processing_config"] = {"max_pixels": 5000}
    before = copy.deepcopy(sample)
    processor(sample, training=True)
    assert sample == before


def test_training_labels(processor: Processor) -> None:
    sample = user(video_item(formula_frame(56, 56, 0)), "What?")
    sample["messages"].append({"role": "assistant", "content": "A cat."})
    example = processor(sample, training=True)
    assert processor.tokenizer.decode(example.labels[example.labels != -100]) == "A cat.<|im_end|>"


def test_training_draws_frames_with_the_second_sampler(processor: Processor) -> None:
    sample = user(video_item(*(Image.new("RGB", (56, 56), (i, i, i)) for i in range(40))))
    drawing = processor.replace(n_frames=2, video_sampler="v2")

    def first_frame(training: bool, seed: int) -> float:
        return drawing(sample, training, np.random.default_rng(seed)).pixel_values[0, 0]

    assert len({first_frame(True, seed) for seed in range(8)}) > 1
    assert first_frame(True, 5) == first_frame(True, 5)
    assert len({first_frame(False, seed) for seed in range(8)}) == 1


def test_too_long_samples(processor: Processor) -> None:
    sample = user(video_item(formula_frame(280, 280, 0)), "a" * 50)  # 100 visual tokens
    whole = processor(sample, training=True)
    short = len(whole.input_ids) - 20
    with pytest.raises(InputError, match=rf"tokens, 100 of them visual, but max_seq_len is {short}.*fewer frames"):
        processor.replace(max_seq_len=short)(sample)
    cut = processor.replace(max_seq_len=short)(sample, training=True)
    np.testing.assert_array_equal(cut.input_ids, whole.input_ids[:short])
    np.testing.assert_array_equal(cut.position_ids, whole.position_ids[:, :short])
    assert cut.labels.shape == (short,)
    with pytest.raises(InputError, match="max_seq_len is 120"):
        processor.replace(max_seq_len=120)(sample, training=True)


def test_batches_pad_with_the_tokenizers_token(processor: Processor) -> None:
    short, long = user(video_item(formula_frame(56, 56, 0)), "Hi"), user("What do you see?" * 5)
    batch = processor.batch([processor(short), processor(long)])
    assert batch.input_ids.shape == (2, 144)
    assert (batch.input_ids[0, batch.lengths[0] :] == 256).all()
    assert (batch.vision_token_index[0] >= 0).sum() == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_frames": 300}, "above max_n_frames 256"),
        ({"n_frames": 0}, "at least 1"),
        ({"min_pixels": 500_000}, "min_pixels 500000"),
        ({"video_sampler": "v3"}, "one of v1, v2"),
        ({"frames": 3}, "option frames does not exist. The options are n_frames"),
    ],
)
def test_unfit_options(processor: Processor, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        processor.replace(**options)


def test_default_options_are_the_originals() -> None:
    options = ProcessorOptions()
    assert (options.n_frames, options.max_n_frames, options.max_pixels, options.min_pixels) == (16, 256, 460_800, 0)
    assert (options.max_seq_len, options.video_sampler, options.double_frames) == (16_384, "v1", True)


def test_end_of_sequence_tokens(checkpoint: Path, config: ModelConfig) -> None:
    assert load_processor(checkpoint, config).eos_token_ids == (258,)  # the tokenizer's
    write_json(checkpoint / "config.json", {"text_config": {"eos_token_id": 256}})
    assert load_processor(checkpoint, config).eos_token_ids == (256,)
    write_json(checkpoint / "generation_config.json", {"eos_token_id": [258, 256]})
    assert load_processor(checkpoint, config).eos_token_ids == (258, 256)


def test_a_tokenizer_of_another_model(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json has image token 151655.*as 261"):
        load_processor(checkpoint, ModelConfig())


def test_media_samples(tmp_path: Path) -> None:
    image = media_sample(tmp_path / "a.JPG")["messages"][0]["content"]
    assert image[0] == {"type": "image", "image": {"image_file": str(tmp_path / "a.JPG")}}
    assert image[1]["text"] == "Describe the image in detail."
    gif = media_sample("a.gif", "What moves?")["messages"][0]["content"]
    assert gif == [{"type": "video", "video": {"video_file": "a.gif"}}, {"type": "text", "text": "What moves?"}]
    with pytest.raises(InputError, match="are not read"):
        media_sample("a.txt")
