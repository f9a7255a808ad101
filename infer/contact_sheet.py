"""Frames of a clip and its caption as one picture."""

import math
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_COLUMNS, _TILE, _GAP, _FONT = 8, 120, 6, 16
_LETTER = 0.52  # mean width of a letter, in font sizes


def contact_sheet(frames: Sequence[Image.Image], caption: str) -> Image.Image:
    """Frames in rows of eight, scaled to fit their tiles and numbered from 1, over the caption."""
    columns, rows = min(_COLUMNS, len(frames)), math.ceil(len(frames) / _COLUMNS)
    width = max(columns, 4) * (_TILE + _GAP) + _GAP
    lines = textwrap.wrap(caption, int((width - 2 * _GAP) / (_FONT * _LETTER)))
    line_height = round(_FONT * 1.4)
    height = rows * (_TILE + _GAP) + 2 * _GAP + len(lines) * line_height
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, frame in enumerate(frames):
        corner = _GAP + i % _COLUMNS * (_TILE + _GAP), _GAP + i // _COLUMNS * (_TILE + _GAP)
        _paste(sheet, draw, frame, corner, str(i + 1))
    font = ImageFont.load_default(_FONT)
    for i, line in enumerate(lines):
        draw.text((_GAP, rows * (_TILE + _GAP) + _GAP + i * line_height), line, fill="black", font=font)
    return sheet


def _paste(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, frame: Image.Image, corner: tuple[int, int], label: str
) -> None:
    scale = _TILE / max(frame.size)
    tile = frame.resize((max(1, round(frame.width * scale)), max(1, round(frame.height * scale))))
    sheet.paste(tile, corner)
    draw.text((corner[0] + 3, corner[1] + 2), label, fill="white", stroke_width=1, stroke_fill="black")
