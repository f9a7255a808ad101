import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image

from infer.media import MediaLoader
from tarsier_jax.families import family_of, load_config
from tarsier_jax.processing.processor import Processor
from tarsier_jax.weights import EMBEDDED, resolve


@pytest.fixture(scope="session")
def processor() -> Processor:
    directory = resolve(EMBEDDED)
    config = load_config(directory)
    return family_of(config).load_processor(directory, config)


@pytest.fixture(scope="module")
def loader(processor: Processor) -> Iterator[MediaLoader]:
    with MediaLoader(processor, root="/", workers=1) as loader:
        yield loader


def sample(kind: str, *sources: Any, text: str = "Describe.", **keys: Any) -> dict[str, Any]:
    """A question about images or videos."""
    items = [{"type": kind, kind: {f"{kind}_file": source, **keys}} for source in sources]
    return {"messages": [{"role": "user", "content": [*items, {"type": "text", "text": text}]}]}


def picture(width: int = 56, height: int = 56, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(file, format, **options)
    return file.getvalue()


def animation(frames: int, format: str = "GIF", duration: int = 100) -> bytes:
    images = [Image.new("RGB", (32, 32), (i % 256, i // 256, 0)) for i in range(frames)]
    file = io.BytesIO()
    images[0].save(file, format, save_all=True, append_images=images[1:], duration=duration)
    return file.getvalue()


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch, processor: Processor) -> Iterator[Callable[..., MediaLoader]]:
    """Starts loaders whose children fail as the name of a file says."""
    monkeypatch.setattr("infer.media.children.PROGRAM", "tests.infer.media.faulty")
    loaders: list[MediaLoader] = []

    def start(*args: Any, **options: Any) -> MediaLoader:
        loaders.append(MediaLoader(processor, *args, root="/", **{"workers": 1, **options}))
        return loaders[-1]

    yield start
    for loader in loaders:
        loader.close()
