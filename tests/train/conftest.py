"""A clip whose frames encode their number, and the processor of a tiny Tarsier2."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tarsier_jax.families import parse_config
from tarsier_jax.processing.processor import Processor, load_processor
from train.debug_data import TINY
from train.untrained import train_tokenizer


@pytest.fixture
def clip(tmp_path: Path) -> str:
    """A directory of 40 frames of 64 x 48 pixels; frame i is grey of brightness 20 + 5 i."""
    directory = tmp_path / "clip"
    directory.mkdir()
    for i in range(40):
        Image.new("RGB", (64, 48), (20 + 5 * i,) * 3).save(directory / f"{i}.png")
    return str(directory)


@pytest.fixture
def processor(tmp_path: Path) -> Processor:
    release = TINY.release
    tokenizer = train_tokenizer(TINY.texts, release.special_tokens)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens))
    return load_processor(tmp_path, parse_config(release.config_json(TINY.text, TINY.vision, tokenizer)))


def trained_on(processor: Processor, sample: dict) -> str:
    """The text that training on a sample teaches."""
    example = processor(sample, training=True)
    return str(processor.tokenizer.decode(example.labels[example.labels != -100]))


def question_and_answer(sample: dict) -> tuple[str, str]:
    """The texts of a sample of two turns."""
    question, answer = sample["messages"]
    assert (question["role"], answer["role"]) == ("user", "assistant")
    return question["content"][-1]["text"], answer["content"][0]["text"]
