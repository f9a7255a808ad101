"""Scenes as pixels: `render_scene`, and `write_clip` for files."""

import functools
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from eval.shapes.world import Background, Scene, Sprite, sprites_at
from tarsier_jax.errors import InputError

_FINER = 4  # masks are drawn larger by this factor, and averaged
# A white rim makes the kind of a shape visible at any colour. Its width is a share of the size, or 1.2 pixels if more.
_RIM, _RIM_SHARE, _RIM_PIXELS = (245, 245, 245), 0.13, 1.2
# With one palette for all frames and no dithering, pixels that do not change do not flicker.
_GIF_FILTER = "split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none"
_GIF: dict[str, Any] = {"codec": "gif", "pix_fmt_out": "pal8", "output_params": ["-filter_complex", _GIF_FILTER]}
# Full range, 256 levels instead of the usual 220: less is lost in the conversion to YUV and back.
_MP4: dict[str, Any] = {
    "codec": "libx264",
    "quality": 8,
    "output_params": ["-vf", "scale=out_range=pc", "-color_range", "pc"],
}


def render_scene(scene: Scene, height: int = 112, width: int = 112, indices: Sequence[int] | None = None) -> np.ndarray:
    """Returns the frames of a scene, uint8 (T, height, width, 3), centred and anti-aliased.

    Args:
        indices: Frames to draw, (T,); all if None.
    """
    ground = _draw_background(scene, height, width)
    indices = range(scene.frames) if indices is None else indices
    frames = np.empty((len(indices), height, width, 3), np.uint8)
    previous: list[Sprite] | None = None
    for i, index in enumerate(indices):
        sprites = sprites_at(scene, index)
        if sprites == previous:
            frames[i] = frames[i - 1]
            continue
        frames[i] = ground
        for sprite in sprites:
            _draw(frames[i], sprite, *_fit(scene, height, width))
        previous = sprites
    return frames


def write_clip(path: str | Path, frames: np.ndarray, rate: float = 16.0) -> Path:
    """Writes frames, uint8 (T, H, W, 3), as an mp4 file (H.264) or a GIF.

    Args:
        path: Ends in .mp4 or .gif.
        rate: Frames per second.

    Raises:
        InputError: `path` has another ending, the height or width of an mp4 is odd, or imageio-ffmpeg is not installed.
    """
    try:
        import imageio_ffmpeg
    except ImportError:
        raise InputError(f"Writing {path} needs imageio-ffmpeg: pip install -e '.[eval]'.") from None
    path = Path(path)
    options = {".mp4": _MP4, ".gif": _GIF}.get(path.suffix.lower())
    if options is None:
        raise InputError(f"{path}: clips are written as .mp4 or .gif. Choose one of the two endings.")
    height, width = frames.shape[1:3]
    if options is _MP4 and (height % 2 or width % 2):
        raise InputError(f"{path}: an mp4 needs an even height and width, not {height} and {width}.")
    options = {"fps": rate, "macro_block_size": 1, "ffmpeg_log_level": "error", **options}
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)  # by JAX; does not apply
        writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    return path


def _fit(scene: Scene, height: int, width: int) -> tuple[float, float, float]:
    """Returns pixels per unit, and x and y of the scene's corner in pixels."""
    scale = min(height / scene.height, width / scene.width)
    return scale, (width - scale * scene.width) / 2, (height - scale * scene.height) / 2


def _draw_background(scene: Scene, height: int, width: int) -> np.ndarray:
    scale, x_offset, y_offset = _fit(scene, height, width)
    y, x = (np.mgrid[:height, :width] + 0.5 - np.array([y_offset, x_offset])[:, None, None]) / scale
    share = _pattern(scene.background, x, y)[..., None]
    a, b = (np.array(c, float) for c in scene.background.colours)
    return np.rint(a * (1 - share) + b * share).astype(np.uint8)


def _pattern(ground: Background, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the share of the second colour per pixel, 0 to 1, (H, W)."""
    along = y if ground.vertical else x
    if ground.style == "gradient":
        return np.clip(along / along.max(), 0, 1)
    if ground.style == "stripes":
        return np.floor(along / ground.period) % 2
    if ground.style == "checks":
        return (np.floor(x / ground.period) + np.floor(y / ground.period)) % 2
    return np.zeros_like(along)


def _draw(frame: np.ndarray, sprite: Sprite, scale: float, x_offset: float, y_offset: float) -> None:
    """Draws a sprite with a white rim into a frame, uint8 (H, W, 3); its masks are computed around it only."""
    if sprite.alpha == 0:
        return
    x0, y0, masks = _masks(sprite, scale, x_offset, y_offset)
    rows, columns = max(0, -y0), max(0, -x0)
    part = frame[y0 + rows : y0 + len(masks[0]), x0 + columns : x0 + len(masks[0])]
    for rgb, mask in zip((_RIM, sprite.rgb), masks, strict=True):
        alpha = mask[rows : rows + part.shape[0], columns : columns + part.shape[1], None]
        part[:] = np.rint(part * (1 - alpha) + np.array(rgb, np.float32) * alpha).astype(np.uint8)


@functools.lru_cache(maxsize=16)  # most sprites of a frame do not differ from the previous frame
def _masks(sprite: Sprite, scale: float, x_offset: float, y_offset: float) -> tuple[int, int, list[np.ndarray]]:
    """Returns x and y of a square around the sprite, and the opacity there of the rim and of the sprite's colour."""
    x, y, size = x_offset + sprite.x * scale, y_offset + sprite.y * scale, sprite.size * scale
    x0, y0 = math.floor(x - size) - 1, math.floor(y - size) - 1
    loops, side = _outline(sprite, x - x0, y - y0, size), math.ceil(2 * size) + 3
    rim = max(_RIM_PIXELS, _RIM_SHARE * size)
    return x0, y0, [_mask(loops, side, width) * np.float32(sprite.alpha) for width in (0.0, rim)]


def _mask(loops: Sequence[Sequence[tuple[float, float]]], side: int, rim: float) -> np.ndarray:
    """Returns the share of each pixel that is inside a shape, `rim` pixels or more from its edge, (side, side)."""
    image = Image.new("L", (side * _FINER, side * _FINER))
    draw = ImageDraw.Draw(image)
    for loop, fill in zip(loops, (255, 0), strict=False):
        draw.polygon(loop, fill=fill)
    for loop in loops if rim else ():
        draw.line([*loop, *loop[:2]], fill=0, width=round(2 * rim * _FINER))
    return np.asarray(image.reduce(_FINER), np.float32) / 255


def _outline(sprite: Sprite, x: float, y: float, size: float) -> list[list[tuple[float, float]]]:
    """Returns the corners, in pixels of the finer mask, of a sprite at (x, y) in pixels: its edge, then its hole."""
    cos, sin = math.cos(math.radians(sprite.angle)), math.sin(math.radians(sprite.angle))

    def place(u: float, v: float) -> tuple[float, float]:
        du, dv = u * cos - v * sin, u * sin + v * cos
        return (x + du * size) * _FINER - 0.5, (y + dv * size) * _FINER - 0.5

    return [[place(u, v) for u, v in loop] for loop in _LOOPS[sprite.kind]]


def _circle(radius: float, corners: int = 48) -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / corners for i in range(corners)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _cross(arm: float = 0.22) -> list[tuple[float, float]]:
    tip = math.sqrt(1 - arm**2)
    corners = []
    for cos, sin in ((1, 0), (0, 1), (-1, 0), (0, -1)):
        corners += [(u * cos - v * sin, u * sin + v * cos) for u, v in ((-arm, -tip), (arm, -tip), (arm, -arm))]
    return corners


def _star(points: int = 6, inner: float = 0.4) -> list[tuple[float, float]]:
    angles = [math.pi * i / points for i in range(2 * points)]
    return [(r * math.cos(a), r * math.sin(a)) for a, r in zip(angles, [1.0, inner] * points, strict=True)]


# Upright shapes of size 1 around their centres, y down. The triangle has one short side to show its orientation.
_LOOPS = {
    "circle": (_circle(1.0),),
    "ring": (_circle(1.0), _circle(0.55)),
    "bar": ([(-0.95, -0.3), (0.95, -0.3), (0.95, 0.3), (-0.95, 0.3)],),
    "triangle": ([(0.0, -1.0), (0.68, 0.73), (-0.68, 0.73)],),
    "cross": (_cross(),),
    "spark": (_star(),),
}
