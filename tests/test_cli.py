"""How programs end: errors made for people, and errors of files, are one line and exit status 1."""

import errno
import warnings

import pytest

from tarsier_jax.cli import run
from tarsier_jax.errors import InputError


def raising(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InputError("clip.mp4 is empty. Give another one."), "error: clip.mp4 is empty. Give another one."),
        (OSError(errno.EACCES, "Permission denied", "/out.json"), "error: /out.json: Permission denied. Mend that"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device. Make room on the disk"),
    ],
)
def test_errors_for_people(error: Exception, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: raising(error)) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(told) and printed.count("\n") == 1
    with pytest.raises(type(error)):
        run(lambda: raising(error), traceback=True)


def test_status() -> None:
    assert (run(lambda: None), run(lambda: 3), run(lambda: raising(KeyboardInterrupt()))) == (0, 3, 130)


def test_mistakes_of_ours_are_not_hidden() -> None:
    with pytest.raises(KeyError):
        run(lambda: raising(KeyError("x")))


def test_warnings_about_inputs_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which `run` replaces
    run(lambda: None)
    assert warnings.formatwarning(UserWarning("a.webp is an animation."), UserWarning, "x.py", 3) == (
        "warning: a.webp is an animation.\n"
    )
    assert warnings.formatwarning("old", DeprecationWarning, "x.py", 3) == "x.py:3: DeprecationWarning: old\n"
