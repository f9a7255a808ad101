"""The demo describes the embedded clip, and shows its frames."""

from pathlib import Path

import pytest
from PIL import Image

from eval.shapes.judge import UNREAD, events_of
from infer import quickstart
from infer.contact_sheet import contact_sheet
from tarsier_jax.errors import InputError


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "demo.png"
    assert quickstart.main(quickstart.parse(["--output", str(picture)])) == 0
    out = capsys.readouterr().out
    events = events_of(out.splitlines()[0])
    assert len(events) >= 2 and UNREAD not in {event.verb for event in events} and str(picture) in out
    width, height = Image.open(picture).size
    assert width == 8 * 126 + 6 and height > 2 * 126 + 12  # two rows of eight over the caption


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--output .* cannot be written \(No such file"):
        quickstart.main(quickstart.parse(["--output", str(tmp_path / "nowhere" / "demo.png")]))


def test_a_sheet_shows_every_frame_and_the_caption() -> None:
    frames = [Image.new("RGB", (60, 30), colour) for colour in ("red", "lime", "blue") * 3]
    sheet = contact_sheet(frames, "Nine frames. " * 40)
    centres = [(6 + 126 * (i % 8) + 60, 6 + 126 * (i // 8) + 30) for i in range(9)]
    assert [sheet.getpixel(c) for c in centres] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)] * 3
    text = sheet.crop((0, 2 * 126 + 6, sheet.width, sheet.height)).convert("L")
    assert text.getextrema() == (0, 255) and sheet.height > contact_sheet(frames, "Short.").height
