"""A random checkpoint in the released layout, and clips to describe."""

from pathlib import Path

import pytest
from PIL import Image

from train.debug_data import TINY
from train.untrained import write_untrained


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained(tmp_path_factory.mktemp("model") / "random", TINY)


def write_gif(path: Path, frames: int = 6, size: tuple[int, int] = (64, 48)) -> Path:
    pictures = [Image.new("RGB", size, (40 * i, 255 - 40 * i, 90)) for i in range(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    return path


@pytest.fixture
def gif(tmp_path: Path) -> Path:
    return write_gif(tmp_path / "clip.gif")
