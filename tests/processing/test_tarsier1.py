"""The processor of the first Tarsier equals the original's (tests/data/tarsier1) unless a test says otherwise."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from tarsier_jax.errors import CheckpointError, InputError
from tarsier_jax.families import load_config
from tarsier_jax.processing import chat
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.chat import VICUNA, encode_messages, load_tokenizer, render_template
from tarsier_jax.processing.formats import normalize_sample
from tarsier_jax.processing.frame_sampling import SamplingRules, select_frames
from tarsier_jax.processing.processor import Processor, media_sample
from tarsier_jax.processing.square_image import ClipImageProcessor
from tarsier_jax.processing.tarsier1 import load_processor
from tarsier_jax.processing.templates import save_chat_template
from tests.processing.conftest import user, video_item
from tests.tarsier1 import FIRST_CLASS, GOLDENS, case_ids, make_example, read_arrays, read_cases, write_checkpoint

MEDIA = GOLDENS / "media"
RULES = SamplingRules(repeat_frames=True, floor_times=True)
LoadedProcessor = Callable[[str], Processor]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tarsier1")
    for name in (*FIRST_CLASS, "ps56-qwen2"):
        write_checkpoint(directory, name)
    return directory


@pytest.fixture(scope="session")
def load(checkpoints: Path) -> LoadedProcessor:
    return lambda name: load_processor(checkpoints / name, load_config(checkpoints / name))


@pytest.fixture
def processor(load: LoadedProcessor) -> Processor:
    return load("t56-gqa")


# Frames


def test_indices_are_the_originals() -> None:
    """Except for one frame of a part of a video: the original returns frame 0, which is not in that part."""
    for start, total, n, expected in read_cases("t56-gqa")["indices"]["rows"]:
        part = {"start_frame": start, "end_frame": start + total - 1}
        indices = select_frames(part, start + total, 25.0, n, rules=RULES)
        assert indices == (expected if n > 1 else [start])


def test_times_are_rounded_down() -> None:
    part = {"start_time": 1.99, "end_time": 3.99}
    assert select_frames(part, 100, 2.0, 2, rules=RULES) == [3, 7]
    assert select_frames(part, 100, 2.0, 2) == [4, 8]
    assert select_frames({"time_indices": [0.9, 1.0]}, 100, 1.0, 2, rules=RULES) == [0, 1]


def test_a_short_video_repeats_frames_but_a_list_does_not(processor: Processor, render: Callable[..., Path]) -> None:
    path = render("clip.mp4", "-movflags", "faststart", "-g", "10")
    item = {"type": "video", "video": {"video_file": str(path), "start_frame": 7, "end_frame": 9}}
    assert processor(user(item)).selections[0].indices == (7, 7, 8, 8, 8, 8, 9, 9)
    frames = [Image.new("RGB", (56, 56))] * 3
    assert processor(user(video_item(*frames))).selections[0].indices == (0, 1, 2)


def test_endings_in_upper_case_are_read(processor: Processor, mp4: Path, tmp_path: Path) -> None:
    """The original rejects them."""
    copy = tmp_path / "CLIP.MP4"
    shutil.copy(mp4, copy)
    np.testing.assert_array_equal(processor(media_sample(copy)).pixel_values, processor(media_sample(mp4)).pixel_values)


# Whole examples


def video(file: Any, **keys: Any) -> dict[str, Any]:
    """A video item of a golden case's file, GIF, image or list of images."""
    if isinstance(file, list):
        return {"type": "video", "video": {"frames": [str(MEDIA / each) for each in file], **keys}}
    path = MEDIA / file
    if path.suffix == ".mp4":
        if not (directory := os.environ.get("TARSIER1_CLIPS")):
            pytest.skip("TARSIER1_CLIPS is not set to a directory with bikes.mp4 and demo_test.mp4")
        path = Path(directory) / file
    return {"type": "video", "video": {"video_file": str(path), **keys}}


def fill(text: str, visuals: list[dict[str, Any]]) -> dict[str, Any]:
    """A message of the user, with visuals in place of <image>, <video> and {visual}."""
    parts, places = re.split(r"<image>|<video>|\{visual\}", text), iter(visuals)
    content: list[dict[str, Any]] = [{"type": "text", "text": parts[0]}]
    for part in parts[1:]:
        content += [item for item in [next(places, None)] if item] + [{"type": "text", "text": part}]
    return {"role": "user", "content": content}


def chat_messages(case: dict[str, Any], visual: list[dict[str, Any]], answers: list[str]) -> list[dict[str, Any]]:
    """The messages of a chat, with the visual first. The original deletes placeholders from all texts."""
    turns = [re.sub(r"<(image|video)>\n*", "", turn) for turn in case["turns"]]
    messages = [{"role": "user", "content": [*visual, {"type": "text", "text": turns[0]}]}]
    for answer, question in zip(answers, turns[1 : case["turn"]], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    return messages


def run(processor: Processor, cases: dict[str, Any], case: dict[str, Any], row: dict[str, Any]) -> Example:
    """The example of a row of a case. n_frames beyond the original's limit of 8 is that limit here."""
    n_frames = min(row.get("n_frames", 8), 8)
    times = {key: row[key] for key in ("start_time", "end_time") if key in row}
    files = row.get("files") or ([[row["file"], 0]] if row.get("file") else [])
    visuals = [video(file, **times, **({"min_n_frames": n} if n else {})) for file, n in files]
    n_frames = sum(n for _, n in files) or n_frames
    if case["kind"] == "chat":
        name = case["name"].split(".")[0]
        answers = [cases[f"{name}.{turn}"]["answer"] for turn in range(1, case["turn"])]
        messages = chat_messages(case, visuals, answers)
    else:
        messages = [fill(row["instruction"], visuals)]
    if case["kind"] == "loss":
        messages.append({"role": "assistant", "content": case["response"]})
    image = dataclasses.replace(processor.image, pad=row.get("do_image_padding", False))
    processor = dataclasses.replace(processor.replace(n_frames=n_frames), image=image)
    return processor({"messages": messages}, training=case["kind"] == "loss")


def rows_of(case: dict[str, Any]) -> list[dict[str, Any]]:
    files = case["file"] if case["kind"] == "batch" else [case.get("file")]
    return case.get("rows") or [{**case, "file": file} for file in files]


@pytest.mark.parametrize(("name", "case"), case_ids(lambda case: "prompt" in case))
def test_an_example_is_the_originals(load: LoadedProcessor, name: str, case: str) -> None:
    processor, cases, arrays = load(name), read_cases(name), read_arrays(name)
    golden = cases[case]
    examples = [run(processor, cases, golden, row) for row in rows_of(golden)]
    masks = golden.get("attention_mask") or [[1] * len(ids) for ids in golden["input_ids"]]
    no_pixels = np.zeros((0, 3, processor.image.image_size, processor.image.image_size), np.float32)
    for row, (example, mask) in enumerate(zip(examples, masks, strict=True)):
        valid = np.array(mask, bool)
        ids = np.array(golden["input_ids"][row])[valid]
        labels = np.array(golden.get("labels", golden["input_ids"])[row])[valid]
        expected = make_example(ids, labels, no_pixels, processor.config)
        np.testing.assert_array_equal(example.input_ids, expected.input_ids)
        if "labels" in golden:
            np.testing.assert_array_equal(example.labels, expected.labels)
        np.testing.assert_array_equal(example.position_ids, expected.position_ids)
    lengths = golden.get("merged_mask_sum", [golden["merged_length"]] * len(examples))
    assert [len(example.input_ids) for example in examples] == lengths
    pixels = np.concatenate([to_images(example, processor.image) for example in examples])
    assert len(pixels) == golden.get("num_images", 0)
    if len(pixels):
        assert list(pixels.shape) == golden["pixel_shape"]
        part = pixels[golden["pixel_frames"]][:, :, golden["pixel_lines"]]
        np.testing.assert_allclose(part, arrays[f"{case}/pixels"], rtol=0, atol=1e-5)
        values = pixels.astype(np.float64)
        moments = np.stack([values.mean(axis=(2, 3)), values.std(axis=(2, 3), ddof=1)], -1)
        np.testing.assert_allclose(moments, arrays[f"{case}/pixel_mean_std"], rtol=0, atol=1e-5)


def to_images(example: Example, image: ClipImageProcessor) -> np.ndarray:
    """The pixels of an example, (frames, 3, height, width)."""
    side, p = image.image_size // image.patch_size, image.patch_size
    patches = example.pixel_values.reshape(-1, side, side, 3, p, p)
    return patches.transpose(0, 3, 1, 4, 2, 5).reshape(-1, 3, side * p, side * p)


# Prompts

# (text, number of images) that the original rejects, or whose placeholders without files it deletes silently.
OURS = {
    ("Describe the video in detail.", 8): f"USER: {'<image>' * 8}\nDescribe the video in detail. ASSISTANT: ",
    ("<video> and <video>", 2): "USER: <image> and <image> ASSISTANT: ",
    ("<image>\nDescribe", 2): InputError,
    ("<image> then <video>", 1): InputError,
    ("<video>\nDescribe the video in detail.", 0): InputError,
    ("<image><image>\nHi", 0): InputError,
    ("<video> and <video>", 0): InputError,
}


def rendered(text: str, num_images: int) -> str:
    """The prompt for a text with placeholders: <image> for one image each, or <video> for all."""
    num_videos = text.count("<video>") or int("<image>" not in text)
    kind, files = ("videos", min(num_videos, num_images)) if "<image>" not in text else ("images", num_images)
    listed = {kind: ["a.mp4" if kind == "videos" else "a.png"] * files} if files else {}
    sample = normalize_sample({"messages": [{"role": "user", "content": text}], **listed})
    content = sample["messages"][0]["content"]
    for item in content if isinstance(content, list) else ():
        if item["type"] != "text":
            item["num_vision_tokens"] = num_images // files
    return render_template(VICUNA, sample["messages"], add_generation_prompt=True, eos_token="</s>")[0]


@pytest.mark.parametrize("row", read_cases("t56-gqa")["prompts"]["rows"], ids=lambda row: f"{row[0]!r}-{row[1]}")
def test_prompts_are_the_originals(row: list[Any]) -> None:
    """Except `OURS`: several videos are accepted, and placeholders and files that differ in number are an error."""
    text, num_images, expected = row
    expected = OURS.get((text, num_images), expected)
    if isinstance(expected, str):
        assert rendered(text, num_images) == expected
    else:
        with pytest.raises(expected, match="Correct the texts or the list"):
            rendered(text, num_images)


def turns(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        (turns("Hi", "Yes", "Why?"), "USER: Hi ASSISTANT: Yes</s>USER: Why? ASSISTANT: "),
        (turns("", "Yes", "Why?"), "USER: ASSISTANT: Yes</s>USER: Why? ASSISTANT: "),
        (turns("Hi", "", "Why?"), "USER: Hi ASSISTANT: USER: Why? ASSISTANT: "),
        (turns("USER: a ASSISTANT: b", "c", "d"), "USER: USER: a ASSISTANT: b ASSISTANT: c</s>USER: d ASSISTANT: "),
    ],
)
def test_a_chat_is_the_originals(messages: list[dict[str, Any]], prompt: str) -> None:
    assert render_template(VICUNA, messages, add_generation_prompt=True, eos_token="</s>")[0] == prompt


def decoded(processor: Processor, example: Example) -> str:
    ids = example.input_ids[~np.isin(example.input_ids, (1102, 1103))].tolist()
    return re.sub(r"(<image>)+", "<image>", processor.tokenizer.decode(ids))


def test_the_answer_may_be_started(processor: Processor) -> None:
    sample = {"messages": turns("What is this?", "Answer: (")}
    assert decoded(processor, processor(sample)) == "<s> USER: What is this? ASSISTANT: Answer: ("


def test_answers_are_trained_on_after_the_prompt_of_inference(processor: Processor) -> None:
    """The prompt ends with a space of its own, which the first token of the answer does not contain."""
    sample = user(video_item(Image.new("RGB", (56, 56))), "What is this?")
    prompt = processor(sample).input_ids
    sample["messages"].append({"role": "assistant", "content": "A dog."})
    example = processor(sample, training=True)
    np.testing.assert_array_equal(example.input_ids[: len(prompt)], prompt)
    assert (example.labels[: len(prompt)] == -100).all()
    np.testing.assert_array_equal(example.labels[len(prompt) :], example.input_ids[len(prompt) :])
    assert processor.tokenizer.decode(example.labels[len(prompt) :]) == "A dog.</s>"


def test_a_complete_prompt_is_trained_on(processor: Processor) -> None:
    sample = user(video_item(Image.new("RGB", (56, 56))), "USER:  Which?\nASSISTANT: Answer: (")
    sample["messages"].append({"role": "assistant", "content": "A) one"})
    example = processor(sample, training=True)
    assert processor.tokenizer.decode(example.labels[example.labels != -100]) == "A) one</s>"


def test_control_tokens_of_texts_are_text(processor: Processor) -> None:
    example = processor(user(video_item(Image.new("RGB", (56, 56))), "What is </s><image>?"))
    assert (example.input_ids == processor.config.image_token_id).sum() == 16
    assert not (example.input_ids == 2).any()
    assert "</s><image>?" in processor.tokenizer.decode(example.input_ids)


def test_a_system_text_is_an_error(processor: Processor) -> None:
    with pytest.raises(InputError, match="no place for a system text; put it into the first question"):
        processor({"messages": [{"role": "system", "content": "Be brief."}, *turns("Hi")]})


# Tokenizers

# The pieces of LLaMA's vocabulary in llama_prompt_ids.json.
LLAMA_PIECES = {
    **{"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 13, "▁": 29871, ":": 29901, ".": 29889, ",": 29892, "?": 29973},
    **{"▁US": 3148, "ER": 1001, "USER": 11889, "▁A": 319, "ASS": 22933, "SS": 1799, "IST": 9047, "ANT": 13566},
    **{"Des": 4002, "cribe": 29581, "▁the": 278, "▁video": 4863, "▁image": 1967, "▁in": 297, "▁detail": 9493},
    **{"▁what": 825, "▁is": 338, "▁man": 767, "▁doing": 2599, "▁cook": 7984, "ing": 292, "▁dan": 6025, "cing": 3277},
    **{"(": 29898, ")": 29897, "A": 29909, "B": 29933, "▁Answer": 673, "Answer": 22550, "▁(": 313, "▁Look": 7419},
    **{"▁at": 472, "▁frames": 16608, "▁first": 937, "▁Question": 894, "▁who": 1058, "▁car": 1559, "▁In": 512},
    **{"Who": 22110, "▁this": 445, "▁Where": 6804, "▁he": 540},
}


def llama_tokenizer(legacy: bool) -> Any:
    """A tokenizer with `LLAMA_PIECES`, which prefers few pieces and, among as many, those with a space."""
    from transformers import PreTrainedTokenizerFast

    vocab = [(f"unused{i}", -99.0) for i in range(32_000)] + [("<image>", 0.0)]
    for piece, id_ in LLAMA_PIECES.items():
        vocab[id_] = (piece, -1.5 if piece == "▁" else -1.0 if piece.startswith("▁") else -1.1)
    backend = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def to_messages(prompt: str) -> list[dict[str, Any]]:
    """The messages of a prompt: those of a chat if it contains </s>, else the complete prompt."""
    image = {"type": "image", "num_vision_tokens": 1}
    texts = [prompt] if "</s>" not in prompt else re.split(r"USER: | ASSISTANT: |</s>", prompt.rstrip())[1::1]
    texts = [text.removesuffix(" ASSISTANT:") for text in texts if text]
    messages: list[dict[str, Any]] = []
    for i, text in enumerate(texts):
        content: list[dict[str, Any]] = []
        for part in re.split("(<image>)", text):
            content += [image] if part == "<image>" else [{"type": "text", "text": part}] if part else []
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    return messages


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_in_the_vocabulary_of_llama(legacy: bool) -> None:
    tokenizer = llama_tokenizer(legacy)
    for row in json.loads((GOLDENS / "llama_prompt_ids.json").read_text())["rows"]:
        ids, _ = encode_messages(tokenizer, VICUNA, to_messages(row["text"]), [32_000])
        assert ids.tolist() == row["legacy" if legacy else "not_legacy"], row["text"]


@pytest.mark.parametrize("name", FIRST_CLASS)
def test_ids_from_a_tokenizer_model(checkpoints: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("sentencepiece")
    ignored = shutil.ignore_patterns("tokenizer.json", "*.safetensors*")
    directory = Path(shutil.copytree(checkpoints / name, tmp_path / name, ignore=ignored))
    processor, golden = load_processor(directory, load_config(directory)), load_tokenizer(checkpoints / name)
    for case in read_cases(name).values():
        if case["kind"] in ("one", "annotation", "files", "chat"):
            escape = chat._Escape(processor.tokenizer, [case["prompt"]])
            ids, _ = chat._tokenize(processor.tokenizer, case["prompt"], escape)
            assert ids.tolist() == case["input_ids"][0]
            answer = case["input_ids"][0][-5:]
            assert processor.tokenizer.decode(answer) == golden.decode(answer)


def test_a_tokenizer_model_needs_sentencepiece(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(checkpoints / "t56-gqa" / "tokenizer.model", tmp_path)
    monkeypatch.setattr(chat, "_is_installed", lambda package: package != "sentencepiece")
    with pytest.raises(
        CheckpointError, match=r"sentencepiece is not installed\. Run `pip install sentencepiece protobuf`"
    ):
        load_tokenizer(tmp_path)


# The files of a checkpoint


def test_a_template_of_the_tokenizer_is_not_used(checkpoints: Path, tmp_path: Path) -> None:
    """It is that of the decoder's former model. A file with the ending .jinja is used."""
    ignored = shutil.ignore_patterns("*.safetensors*")
    directory = Path(shutil.copytree(checkpoints / "t56-gqa", tmp_path / "copy", ignore=ignored))
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": "of another model"}))
    assert load_processor(directory, load_config(directory)).chat_template == VICUNA
    (directory / "chat_template.jinja").write_text("ours")
    assert load_processor(directory, load_config(directory)).chat_template == "ours"


def test_a_saved_template_is_that_of_other_programs_too(checkpoints: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    ignored = shutil.ignore_patterns("*.safetensors*")
    directory = Path(shutil.copytree(checkpoints / "t56-gqa", tmp_path / "copy", ignore=ignored))
    save_chat_template(directory, VICUNA)
    assert load_processor(directory, load_config(directory)).chat_template == VICUNA
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]},
        *turns("", "A man.")[1:],
    ]
    text = tokenizer.apply_chat_template([*messages, *turns("Why?")], tokenize=False, add_generation_prompt=True)
    assert text == "USER: <image>\nWho? ASSISTANT: A man.</s>USER: Why? ASSISTANT: "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"shortest_edge": 224}}, "has size .*224.*, but vision_config in .* has image_size 56"),
        ({"crop_size": 224}, "has crop_size 224, but vision_config"),
        ({"resample": 2}, r"has other steps than CLIP's \(resample\)"),
        ({"do_normalize": False}, r"has other steps than CLIP's \(do_normalize\)"),
    ],
)
def test_other_steps_than_those_of_clip(
    checkpoints: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    ignored = shutil.ignore_patterns("*.safetensors*")
    directory = Path(shutil.copytree(checkpoints / "t56-gqa", tmp_path / "copy", ignore=ignored))
    file = directory / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message):
        load_processor(directory, load_config(directory))


def test_a_tokenizer_of_another_model(checkpoints: Path) -> None:
    config = dataclasses.replace(load_config(checkpoints / "t56-gqa"), image_token_id=7)
    with pytest.raises(CheckpointError, match="has image token 7, but the tokenizer beside it has <image> as 1100"):
        load_processor(checkpoints / "t56-gqa", config)


# Sizes


def test_pixel_shuffle_has_rows_of_half_the_patches(load: LoadedProcessor) -> None:
    processor = load("ps56-qwen2")
    example = processor(user(video_item(*[Image.new("RGB", (90, 40))] * 2)))
    image, newline, new = 1100, 1102, 1103
    frame = [image, image, newline, image, image, newline, new]
    visual = example.input_ids[np.isin(example.input_ids, (image, newline, new))]
    assert visual.tolist() == frame * 2
    assert example.pixel_values.shape == (2 * 16, 588)
    np.testing.assert_array_equal(example.position_ids, [np.arange(len(example.input_ids))] * 3)


def test_a_batch_has_features_for_placeholders_only(processor: Processor) -> None:
    examples = [processor(user(video_item(*[Image.new("RGB", (90, 40))] * n))) for n in (1, 3)]
    batch = processor.batch(examples)
    assert batch.patches.shape == (1, 4, 16, 588)
    is_image = np.asarray(batch.input_ids) == processor.config.image_token_id
    np.testing.assert_array_equal(batch.vision_token_index[is_image], np.arange(4 * 16))
    assert (batch.vision_token_index[~is_image] == -1).all()


def test_a_frame_is_never_truncated(processor: Processor) -> None:
    sample = user(video_item(Image.new("RGB", (56, 56))), "What?")
    sample["messages"].append({"role": "assistant", "content": "A dog."})
    example = processor(sample, training=True)
    end = int(np.flatnonzero(example.input_ids == processor.config.image_new_id)[-1])
    assert (
        processor.replace(max_seq_len=end + 1)(sample, training=True).num_truncated == len(example.input_ids) - end - 1
    )
    with pytest.raises(InputError, match="21 of them visual, but max_seq_len is"):
        processor.replace(max_seq_len=end)(sample, training=True)


def test_prompts_longer_than_the_positions_of_the_config(load: LoadedProcessor) -> None:
    """text_config has max_position_embeddings 4096, which the original ignores."""
    processor = load("t336-mha")
    example = processor(user(video_item(*[Image.new("RGB", (336, 336))] * 8), "What?"))
    assert len(example.input_ids) > 8 * 601
    np.testing.assert_array_equal(example.position_ids[0], np.arange(len(example.input_ids)))
