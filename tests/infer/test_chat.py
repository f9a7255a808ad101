"""The chat: its commands, plain lines in a pipe, and a real terminal."""

import fcntl
import io
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infer import chat
from infer.chat import Chat, visible
from infer.conversation import Conversation
from tarsier_jax.errors import InputError
from tarsier_jax.weights import EMBEDDED_CLIP
from tests.infer.fake_model import WORDS, FakeModel

ANSWER = " ".join(WORDS)
PROMPT = "\x1b[?2004h"  # of prompt_toolkit, when it reads a line: bracketed paste is on


@pytest.fixture
def plain() -> Chat:
    return Chat(Conversation(FakeModel()), is_terminal=False)


def handle(chat: Chat, capsys: pytest.CaptureFixture[str], line: str) -> tuple[str, str]:
    """Returns the lines on stdout and stderr."""
    chat.handle(line)
    return tuple(capsys.readouterr())


def test_a_conversation(plain: Chat, capsys: pytest.CaptureFixture[str], gif: Path, tmp_path: Path) -> None:
    assert handle(plain, capsys, f"/open {gif}") == ("", f"opened {gif}: 2 frames of 112 x 84 pixels\n")
    assert handle(plain, capsys, "What happens?") == (f"{ANSWER}\n", "")
    out, _ = handle(plain, capsys, "/frames")
    assert out.splitlines() == [
        f"{gif}: 2 frames of 112 x 84 pixels",
        "    1  frame     0      0.00 s",
        "    2  frame     7      1.25 s",
    ]
    handle(plain, capsys, f"/save {tmp_path / 'chat.jsonl'}")
    (line,) = (tmp_path / "chat.jsonl").read_text().splitlines()
    assert json.loads(line) == {"messages": plain.conversation.messages, "placeholders": False}
    handle(plain, capsys, "/reset")
    assert plain.conversation.messages == [] and plain.num_failed == 0
    assert "/open PATH" in handle(plain, capsys, "/help")[0]
    assert handle(plain, capsys, "  ") == ("", "")


def test_options(plain: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    assert "temperature 0.0\n" in handle(plain, capsys, "/set")[0]
    for line in ("/set temperature 0.5", "/set top_k 7", "/set n_frames 4", "/set stop two words"):
        assert handle(plain, capsys, line)[0] == ""
    sampling = plain.conversation.sampling
    assert (sampling.temperature, sampling.top_k, sampling.stop) == (0.5, 7, ("two words",))
    assert plain.conversation.options == {"n_frames": 4} and plain.num_failed == 0


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/opne a.mp4", "/opne is not a command. Do you mean /open? /help lists them."),
        ("/set temprature 1", "The option temprature does not exist. Do you mean temperature?"),
        ("/set temperature warm", "temperature must be a number, not 'warm'."),
        ("/set n_frames 2.5", "n_frames must be a whole number, not '2.5'."),
        ("/set n_frames 0", "n_frames must be at least 1, not 0."),
        ("/set top_p 2", "top_p is 2.0; it must be above 0"),
        ("/set top_p", "/set top_p needs a value."),
        ("/open", "/open needs the path"),
        ("/save", "/save needs the name of a file."),
        ("/save /tmp", "The conversation is empty."),
        ("/frames", "No file is open."),
        ("fail", "The prompt has 99 tokens."),
    ],
)
def test_errors(plain: Chat, capsys: pytest.CaptureFixture[str], line: str, problem: str) -> None:
    out, err = handle(plain, capsys, line)
    assert out == "" and err.startswith(f"error: {problem}") and plain.num_failed == 1
    assert handle(plain, capsys, "What?") == (f"{ANSWER}\n", "")  # the conversation goes on


def test_the_files_of_a_failed_question(plain: Chat, capsys: pytest.CaptureFixture[str], gif: Path) -> None:
    handle(plain, capsys, f"/open {gif}")
    assert f"removed with the question: {gif}\n" in handle(plain, capsys, "fail")[1]
    assert plain.conversation.files == []


def test_a_file_that_cannot_be_written(plain: Chat, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    handle(plain, capsys, "What?")
    assert f"error: {tmp_path}: Is a directory." in handle(plain, capsys, f"/save {tmp_path}")[1]


def test_quoted_paths(plain: Chat, capsys: pytest.CaptureFixture[str], gif: Path) -> None:
    spaced = gif.rename(gif.with_name("a clip.gif"))
    escaped = str(spaced).replace(" ", "\\ ")
    for path in (spaced, f"'{spaced}'", escaped):
        handle(plain, capsys, f"/open {path}")
    assert plain.conversation.files == [str(spaced)] * 3


def test_control_characters_are_visible(capsys: pytest.CaptureFixture[str], plain: Chat) -> None:
    assert visible("a\tb\n") == "a\tb\n" and visible("né 圆 👩‍👩‍👧 שלום") == "né 圆 👩‍👩‍👧 שלום"
    assert visible("\x1b]0;title\x07\r\x9b2J\u202e") == "\\x1b]0;title\\x07\\r\\x9b2J\\u202e"
    assert "\x1b" not in handle(plain, capsys, "/open \x1b[2J.mp4")[1]


def test_the_purpose_of_a_checkpoint(tmp_path: Path) -> None:
    assert chat._purpose(tmp_path) == ""
    (tmp_path / "README.md").write_text("---\nlicense: x\n---\n# Model\n\nIt describes\nclips.\n\nMore.")
    assert chat._purpose(tmp_path) == "It describes clips."


def test_flags_of_a_local_model() -> None:
    arguments = chat.parse(["--url", "http://localhost", "--int8", "--prompt_tokens", "9"])
    with pytest.raises(InputError, match="--int8, --prompt_tokens has no effect"):
        chat.main(arguments)


@pytest.mark.slow
def test_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the embedded model: a question about the clip, after a file that is broken."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(EMBEDDED_CLIP.read_bytes()[:3000])
    lines = f"/open {EMBEDDED_CLIP}\nDescribe the video in detail.\n/exit\nnever asked\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    monkeypatch.setattr(chat, "prepare_process", lambda: None)
    assert chat.main(chat.parse(["--input", str(broken), "--max_new_tokens", "64"])) == 1
    out, err = capsys.readouterr()
    assert out.startswith("The blue cross and the orange triangle collide.") and out.count("\n") == 1
    assert "describes clips of moving shapes" in err and err.count("trained for descriptions") == 1
    assert f"error: {broken} cannot be decoded" in err and "\x1b" not in out + err


class Terminal:
    """A program in a terminal of 80 x 24 characters."""

    def __init__(self, command: list[str], directory: Path):
        self._master, slave = pty.openpty()
        self.resize(24, 80)
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_CACHE_HOME": str(directory)}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.output = ""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def send(self, text: str) -> None:
        self.output = ""
        os.write(self._master, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Reads the output since the last `send` until it contains a text."""
        end = time.monotonic() + seconds
        while text not in self.output:
            assert time.monotonic() < end, f"{text!r} is not in {self.output!r}"
            if select.select([self._master], [], [], 0.2)[0]:
                self.output += os.read(self._master, 65536).decode(errors="replace")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal([sys.executable, "-m", "tests.infer.fake_model"], tmp_path)
    terminal.wait_for(PROMPT)
    yield terminal
    terminal.close()


def test_a_terminal(terminal: Terminal, gif: Path, tmp_path: Path) -> None:
    for text, completion in (("/op\t", "en"), (f" {tmp_path}/cl\t", "ip.gif")):
        terminal.send(text)
        terminal.wait_for(completion)
    terminal.send("\r")
    terminal.wait_for(f"opened {gif}")
    terminal.wait_for(PROMPT)
    terminal.send("What happens?\r")
    terminal.wait_for(ANSWER)
    terminal.wait_for(PROMPT)
    terminal.send("Tell more.\r")
    terminal.wait_for("two")
    terminal.send("\x03")
    terminal.wait_for("[stopped]")
    assert "five" not in terminal.output
    terminal.wait_for(PROMPT)
    terminal.send("a line that is dropped\x03")
    terminal.wait_for(PROMPT)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"broken")
    terminal.resize(10, 40)
    terminal.send(f"/open {broken}\r")
    terminal.wait_for("cannot be decoded")
    terminal.wait_for(PROMPT)
    terminal.send("\x1b[200~first line\nsecond line\x1b[201~\r")
    terminal.wait_for("five")
    terminal.wait_for(PROMPT)
    terminal.send("/set tem\t")
    terminal.wait_for("perature")
    terminal.send(" 0.5\r")
    terminal.wait_for("temperature 0.5")
    terminal.wait_for(PROMPT)  # between two prompts the terminal itself reads Ctrl-D
    terminal.send("\x04")
    terminal.wait_for("the end")
    assert terminal.process.wait(30) == 0
    history = tmp_path / "tarsier_jax" / "chat" / "history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "+first line\n+second line\n" in history.read_text() and "dropped" not in history.read_text()
