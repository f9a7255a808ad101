"""How programs end: errors made for people, and errors of files, are one line and exit status 1."""

import errno
import os
import sys
import warnings
from typing import TextIO

import pytest

from tarsier_jax.errors import InputError
from tarsier_jax.programs import run


def raising(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("clip.mp4 is empty. Use another one."), "clip.mp4 is empty. Use another one."),
        (OSError(errno.EACCES, "Permission denied", "/o.json"), "/o.json: Permission denied. Check its permissions"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device. Make room on the disk"),
        (OSError(errno.EISDIR, "Is a directory", b"/out"), "/out: Is a directory. Pass the path of a file."),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files. Raise the limit of open files"),
        (OSError(errno.ENOENT, "No such file or directory"), "No such file or directory. The current directory may"),
        (OSError(errno.EDOM, "Out of domain", "/o.json"), "/o.json: Out of domain. Choose another path."),
        (ConnectionResetError(errno.ECONNRESET, "Reset by peer"), "Reset by peer. Run the program again."),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe. Run the program again."),  # not stdout's
        (OSError("cannot identify the image"), "cannot identify the image"),
    ],
)
def test_errors_for_people(error: Exception, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: raising(error)) == 1
    message_line = capsys.readouterr().err
    assert message_line.startswith(f"error: {message}") and message_line.count("\n") == 1
    assert ("Make room" in message_line) == (getattr(error, "errno", None) == errno.ENOSPC)
    with pytest.raises(type(error)):
        run(lambda: raising(error), traceback=True)


def test_status() -> None:
    assert (run(lambda: None), run(lambda: 3), run(lambda: raising(KeyboardInterrupt()))) == (0, 3, 130)


def test_mistakes_of_ours_are_not_hidden() -> None:
    with pytest.raises(KeyError):
        run(lambda: raising(KeyError("x")))


def test_warnings_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which `run` replaces
    run(lambda: None)
    assert warnings.formatwarning(UserWarning("a.webp is an animation."), UserWarning, "x.py", 3) == (
        "warning: a.webp is an animation.\n"
    )
    assert warnings.formatwarning("old", DeprecationWarning, "x.py", 3) == "x.py:3: DeprecationWarning: old\n"


def pipe_without_reader(buffering: int = -1) -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", buffering, encoding="utf-8")


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_the_reader_of_a_pipe_goes_away(
    name: str, flush: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with `| head -1`: without a message, and with nothing left for the interpreter to fail at."""
    stream = pipe_without_reader(1 if name == "stderr" else -1)
    monkeypatch.setattr(sys, name, stream)
    assert run(lambda: print("a caption", file=stream, flush=flush)) == 141
    monkeypatch.undo()
    assert capsys.readouterr() == ("", "")
    stream.close()


def test_closed_streams(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Python has None for a stream that was closed before the start; print to it does nothing."""
    monkeypatch.setattr(sys, "stdout", None)
    assert run(lambda: 0) == 1
    assert "The standard output is closed. Redirect it" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(sys, "stderr", None)
    assert run(lambda: print("progress", file=sys.stderr)) == 0
    assert capsys.readouterr().out == ""


def test_characters_that_stdout_cannot_encode(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file name that is not UTF-8 is printed with escapes."""
    with open(f"{tmp_path}/out", "w", encoding="utf-8", errors="strict") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run(lambda: print(os.fsdecode(b"caf\xe9.gif"))) == 0
        monkeypatch.undo()
    with open(f"{tmp_path}/out", encoding="utf-8") as file:
        assert file.read() == "caf\\udce9.gif\n"
