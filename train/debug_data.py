"""Tiny random checkpoints and rendered clips for the debug size of a recipe, which then needs no files."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from train.config import TrainConfig
from train.processes import write_once
from train.untrained import TARSIER1, UntrainedModel, write_untrained

RANDOM = "random"  # in config.data.train: the clips
_CLIPS = 8
_COLORS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 210), "yellow": (220, 200, 60)}
_PROMPT = "Describe the video in detail."
_WRONG_ANSWERS = ("Nothing happens.", "A white circle moves up.")


def _texts() -> Iterator[str]:
    yield from 2 * ["system\nYou are a helpful assistant.user\nassistant\n", _PROMPT, *_WRONG_ANSWERS]
    yield from 2 * [_answer(color) for color in _COLORS]


TINY = UntrainedModel(
    text={
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    },
    vision={"depth": 2, "embed_dim": 64, "num_heads": 2},
    texts=_texts,
)
TINY_TARSIER1 = UntrainedModel(
    text={
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
    },
    vision={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,  # two of them run
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    },
    texts=_texts,
    release=TARSIER1,
)
# In config.model: the checkpoint.
MODELS = {"random": TINY, "random_tarsier1": TINY_TARSIER1}


def write_debug_data(config: TrainConfig, workdir: Path, is_shared: bool = True) -> TrainConfig:
    """Returns the configuration with files in the workdir in place of the keys of `MODELS` and of `RANDOM`.

    Args:
        is_shared: Whether all processes have the same workdir, see `write_once`.
    """
    if untrained := MODELS.get(config.model):
        write = functools.partial(write_untrained, untrained=untrained)
        config = dataclasses.replace(config, model=str(write_once(workdir / "random_model", write, is_shared)))
    if config.data.train == RANDOM:
        directory = write_once(workdir / "random_clips", write_debug_clips, is_shared)
        files = str(directory / "annotations.jsonl")
        data = dataclasses.replace(config.data, train=files, eval=files, media_root=str(directory))
        config = dataclasses.replace(config, data=data)
    return config


def write_debug_clips(directory: Path) -> Path:
    """Writes GIFs of several sizes and lengths and their annotations, each with a chosen and a rejected answer.

    Returns:
        The annotation file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    annotations = directory / "annotations.jsonl"
    with annotations.open("w", encoding="utf-8") as file:
        for i in range(_CLIPS):
            color = list(_COLORS)[i % len(_COLORS)]
            clip = _draw(16 + 4 * i, 96 + 16 * (i % 3), 128 + 32 * (i % 2), _COLORS[color])
            images = [Image.fromarray(frame) for frame in clip]
            images[0].save(directory / f"{i}.gif", save_all=True, append_images=images[1:], duration=60)
            video = {"type": "video", "video": {"video_file": f"{i}.gif"}}
            answer = {"type": "text", "text": _answer(color), "chosen": _answer(color)}
            answer["rejected"] = _WRONG_ANSWERS[i % len(_WRONG_ANSWERS)]
            messages = [
                {"role": "user", "content": [video, {"type": "text", "text": _PROMPT}]},
                {"role": "assistant", "content": [answer]},
            ]
            file.write(json.dumps({"messages": messages, "task": "video/caption", "idx": i}) + "\n")
    return annotations


def _answer(color: str) -> str:
    return f"A {color} square moves to the right."


def _draw(length: int, height: int, width: int, color: tuple[int, int, int]) -> np.ndarray:
    """Returns uint8 (length, height, width, 3): a square that moves from the left to the right."""
    clip = np.full((length, height, width, 3), 160, np.uint8)
    side = height // 4
    for i, x in enumerate(np.linspace(0, width - side, length).astype(int)):
        clip[i, side : 2 * side, x : x + side] = color
    return clip
