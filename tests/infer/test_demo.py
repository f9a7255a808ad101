"""The demo runs on a clip that it renders, and says that its words are noise."""

import pytest

from infer import demo


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main() == 0
    out, err = capsys.readouterr()
    assert "noise" in out
    assert "disc.mp4" in out
    assert "[1/1]" in err
