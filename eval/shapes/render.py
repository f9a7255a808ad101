"""Scenes as pixels: `render`, and `write_clip` for files."""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw

from eval.shapes.world import Background, Scene, Sprite, sprites_at
from tarsier_jax.errors import InputError

_FINER = 4  # masks are drawn that many times larger, and averaged
# One palette for all frames, and no dithering, so that what does not move does not flicker.
_GIF_FILTER = "split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none"
_GIF: dict[str, Any] = {"codec": "gif", "pix_fmt_out": "pal8", "output_params": ["-filter_complex", _GIF_FILTER]}
_MP4: dict[str, Any] = {"codec": "libx264", "quality": 8}


def render(scene: Scene, height: int = 112, width: int = 112) -> np.ndarray:
    """The frames of a scene, uint8 (scene.frames, height, width, 3), fitted into the middle, anti-aliased."""
    ground = _draw_background(scene, height, width)
    frames = np.empty((scene.frames, height, width, 3), np.uint8)
    drawn: list[Sprite] | None = None
    for i in range(scene.frames):
        sprites = sprites_at(scene, i)
        if sprites == drawn:
            frames[i] = frames[i - 1]
            continue
        frames[i] = ground
        for sprite in sprites:
            _draw(frames[i], sprite, *_fit(scene, height, width))
        drawn = sprites
    return frames


def write_clip(path: str | Path, frames: np.ndarray, rate: float = 16.0) -> Path:
    """Writes frames, uint8 (T, H, W, 3), `rate` a second, as an mp4 (H.264) or a GIF, as the name's ending says.

    Raises:
        InputError: another ending, or an odd height or width of an mp4.
    """
    path = Path(path)
    options = {".mp4": _MP4, ".gif": _GIF}.get(path.suffix.lower())
    if options is None:
        raise InputError(f"{path}: clips are written as .mp4 or .gif. Choose one of the two endings.")
    height, width = frames.shape[1:3]
    if options is _MP4 and (height % 2 or width % 2):
        raise InputError(f"{path}: an mp4 needs an even height and width, not {height} and {width}.")
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), macro_block_size=1, **{"fps": rate, **options})
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    return path


def _fit(scene: Scene, height: int, width: int) -> tuple[float, float, float]:
    """Pixels a unit, and where the scene's corner lies, (x, y)."""
    scale = min(height / scene.height, width / scene.width)
    return scale, (width - scale * scene.width) / 2, (height - scale * scene.height) / 2


def _draw_background(scene: Scene, height: int, width: int) -> np.ndarray:
    scale, left, top = _fit(scene, height, width)
    y, x = (np.mgrid[:height, :width] + 0.5 - np.array([top, left])[:, None, None]) / scale
    share = _pattern(scene.background, x, y)[..., None]
    a, b = (np.array(c, float) for c in scene.background.colours)
    return np.rint(a * (1 - share) + b * share).astype(np.uint8)


def _pattern(ground: Background, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much of the second colour each pixel has, 0 to 1, (H, W)."""
    along = y if ground.vertical else x
    if ground.style == "gradient":
        return np.clip(along / along.max(), 0, 1)
    if ground.style == "stripes":
        return np.floor(along / ground.period) % 2
    if ground.style == "checks":
        return (np.floor(x / ground.period) + np.floor(y / ground.period)) % 2
    return np.zeros_like(along)


def _draw(frame: np.ndarray, sprite: Sprite, scale: float, left: float, top: float) -> None:
    """Draws a sprite into a frame, uint8 (H, W, 3); its mask is computed around it only."""
    if sprite.alpha == 0:
        return
    x, y, size = left + sprite.x * scale, top + sprite.y * scale, sprite.size * scale
    x0, y0 = math.floor(x - size) - 1, math.floor(y - size) - 1
    side = math.ceil(2 * size) + 3
    mask = Image.new("L", (side * _FINER, side * _FINER))
    points = _outline(sprite, x - x0, y - y0, size)
    ImageDraw.Draw(mask).polygon(points, fill=255)
    alpha = np.asarray(mask.reduce(_FINER), np.float32)[..., None] * (sprite.alpha / 255)
    top_, left_ = max(0, -y0), max(0, -x0)
    part = frame[y0 + top_ : y0 + side, x0 + left_ : x0 + side]
    alpha = alpha[top_ : top_ + part.shape[0], left_ : left_ + part.shape[1]]
    part[:] = np.rint(part * (1 - alpha) + np.array(sprite.rgb, np.float32) * alpha).astype(np.uint8)


def _outline(sprite: Sprite, x: float, y: float, size: float) -> list[tuple[float, float]]:
    """Corners in pixels of the finer mask, of a sprite whose centre is (x, y) in pixels of the frame."""
    cos, sin = math.cos(math.radians(sprite.angle)), math.sin(math.radians(sprite.angle))
    turned = ((u * cos - v * sin, u * sin + v * cos) for u, v in _corners(sprite.kind))
    return [((x + u * size) * _FINER - 0.5, (y + v * size) * _FINER - 0.5) for u, v in turned]


@functools.cache
def _corners(kind: str) -> tuple[tuple[float, float], ...]:
    """A shape of size 1, upright, around its centre, y down. The triangle has one short side, so that it has a top."""
    return tuple(_CORNERS[kind]())


def _ring(radii: tuple[float, ...], turns: int, start: float = -90.0) -> Iterator[tuple[float, float]]:
    count = len(radii) * turns
    for i in range(count):
        angle = math.radians(start + 360 * i / count)
        yield radii[i % len(radii)] * math.cos(angle), radii[i % len(radii)] * math.sin(angle)


def _cross(arm: float = 0.34) -> Iterator[tuple[float, float]]:
    tip = math.sqrt(1 - arm**2)
    for cos, sin in ((1, 0), (0, 1), (-1, 0), (0, -1)):
        for u, v in ((-arm, -tip), (arm, -tip), (arm, -arm)):
            yield u * cos - v * sin, u * sin + v * cos


_CORNERS = {
    "circle": lambda: _ring((1.0,), 48),
    "square": lambda: _ring((1.0,), 4, start=-45.0),
    "triangle": lambda: iter(((0.0, -1.0), (0.68, 0.73), (-0.68, 0.73))),
    "star": lambda: _ring((1.0, 0.42), 5),
    "cross": _cross,
}
