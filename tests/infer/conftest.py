"""A random checkpoint in the released layout, an engine that reuses prefixes, and clips to describe."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import tarsier_jax
from infer.engine import Engine, fit_config
from tarsier_jax.processing.batch import Buckets
from tarsier_jax.weights import EMBEDDED, resolve
from train.debug_data import TINY
from train.micro.checkpoint import MICRO
from train.untrained import write_untrained

ENGINE_SLOTS, ENGINE_TOKENS = 3, 24
TWO_LAYERS = dataclasses.replace(MICRO, text={**MICRO.text, "num_hidden_layers": 2})


@pytest.fixture(scope="session")
def reusing_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Its answers end at their limits only: no token is -1."""
    model, processor = tarsier_jax.load(write_untrained(tmp_path_factory.mktemp("model") / "untrained", TWO_LAYERS))
    config = fit_config(processor, ENGINE_SLOTS, ENGINE_TOKENS)
    config = dataclasses.replace(config, buckets=config.buckets[-1:], reuse_prefixes=True)
    buckets = Buckets(processor.buckets.patches, (16,), (config.prompt_tokens,))  # one shape for `answer`
    return Engine(model, dataclasses.replace(processor, eos_token_ids=(-1,), buckets=buckets), config)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained(tmp_path_factory.mktemp("model") / "random", TINY)


@pytest.fixture(scope="session")
def one_frame_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model for frames of one size: its engine compiles one bucket in place of six."""
    directory = shutil.copytree(resolve(EMBEDDED), tmp_path_factory.mktemp("model") / "one_frame_size")
    file = directory / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "min_pixels": 56 * 56, "max_pixels": 56 * 56}))
    return directory


def write_gif(path: Path, frames: int = 6, size: tuple[int, int] = (64, 48)) -> Path:
    pictures = [Image.new("RGB", size, (40 * i, 255 - 40 * i, 90)) for i in range(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    return path


@pytest.fixture
def gif(tmp_path: Path) -> Path:
    return write_gif(tmp_path / "clip.gif")
