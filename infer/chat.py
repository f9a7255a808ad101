"""Talks about videos and images: `python -m infer.chat --model CHECKPOINT [--input clip.mp4 ...]`.

A line is a question; its answer is streamed. A line that starts with a slash is a command, and /help lists them. Ctrl-C
stops an answer, and Ctrl-D ends the program. Without a terminal, questions are read from stdin and answers are written
to stdout, one after the other; the exit status is 1 if a file or a question cannot be used.

With --url, a server with OpenAI's chat completions answers, such as `python -m infer.serve`. The environment variable
TARSIER_API_KEY contains its key.
"""

import argparse
import contextlib
import dataclasses
import difflib
import os
import shlex
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tarsier_jax
from infer.conversation import Conversation, LocalModel, fit_conversations
from infer.engine import Engine
from infer.media import MediaLimits, MediaLoader
from infer.remote import RemoteModel
from tarsier_jax.errors import InputError
from tarsier_jax.files import cache_directory, is_remote, source_text
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.processing.frame_sampling import FrameSelection
from tarsier_jax.processing.processor import ProcessorOptions
from tarsier_jax.programs import (
    add_model_flag,
    add_precision_flags,
    add_sampling_flags,
    check_packages,
    prepare_process,
    read_sampling_flags,
    resolve_dtype,
    run,
)
from tarsier_jax.storage import local_copy
from tarsier_jax.weights import EMBEDDED, resolve

# A user chooses the files of a conversation, so that only their decoding is limited.
_OWN_FILES = MediaLimits(max_bytes=1 << 40, max_frames=10_000_000, max_seconds=86_400.0, timeout=600.0)
_PROCESSOR_OPTIONS = ("n_frames", "max_pixels")
_BIDI = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they change the order of a line
_HELP = """\
/open PATH        add a video, GIF, image or directory of frames to the next question
/frames           the frames that the model receives, with their times
/set NAME VALUE   change an option; without a name, list the options
/save FILE        append the conversation to a file of JSON lines, in the annotation format
/reset            start again, without messages and files
/help             this list
/exit             end, as Ctrl-D does"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infer.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flag(parser)
    parser.add_argument("--url", help="address of a server that answers, such as http://localhost:8000")
    parser.add_argument(
        "--input", type=source_text, nargs="+", default=(), help="videos, GIFs and images of the first question"
    )
    parser.add_argument("--n_frames", type=int, help="frames sampled from each video (default: the model's, 8 or 16)")
    parser.add_argument("--max_pixels", type=int, help="limit of the pixels of a frame or image")
    parser.add_argument(
        "--prompt_tokens",
        type=int,
        help="limit of a conversation, in tokens (default: room for two videos of --n_frames, and 1024 of text)",
    )
    add_precision_flags(parser)
    add_sampling_flags(parser)
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    prepare_process()
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        check_packages("infer.chat", "chat", "prompt_toolkit")
    options = {name: getattr(args, name) for name in _PROCESSOR_OPTIONS if getattr(args, name) is not None}
    ProcessorOptions(**options)  # checked before the model is loaded
    sampling = read_sampling_flags(args)
    with contextlib.ExitStack() as stack:
        model = _connect(args, stack) if args.url else _load(args, sampling, options, stack)
        chat = Chat(Conversation(model, sampling, options), is_terminal)
        for path in args.input:
            chat.handle(f"/open {path}")
        chat.run(_terminal_lines(chat) if is_terminal else (line.rstrip("\n") for line in sys.stdin))
    return 1 if chat.num_failed and not is_terminal else 0


class Chat:
    """Answers lines: questions and commands.

    Attributes:
        conversation: The messages so far.
        num_failed: Number of lines that could not be used.
    """

    def __init__(self, conversation: Conversation, is_terminal: bool):
        self.conversation, self.num_failed = conversation, 0
        self._is_terminal = is_terminal
        self._commands: Mapping[str, Callable[[str], None]] = {
            "/open": self._open,
            "/frames": self._frames,
            "/set": self._set,
            "/save": self._save,
            "/reset": self._reset,
            "/help": lambda _: print(_HELP),
            "/exit": lambda _: None,
        }

    def run(self, lines: Iterator[str]) -> None:
        """Answers the lines until the end or /exit."""
        for line in lines:
            if line.strip() == "/exit":
                return
            self.handle(line)

    def handle(self, line: str) -> None:
        """Answers a line. An error is printed."""
        name, _, value = line.strip().partition(" ")
        try:
            if not name:
                return
            if not name.startswith("/"):
                self._ask(line.strip())
            elif name in self._commands:
                self._commands[name](value.strip())
            else:
                raise InputError(f"{name} is not a command.{_suggestion(name, self._commands)} /help lists them.")
        except KeyboardInterrupt:  # while a file is decoded
            if not self._is_terminal:
                raise
            _log("[stopped]")
        except (InputError, OSError) as error:
            self.num_failed += 1
            _log(f"error: {_text_of(error)}")

    def _ask(self, text: str) -> None:
        files = self.conversation.files
        try:
            with self._interrupts_cancel():
                for piece in self.conversation.ask(text):
                    print(visible(piece), end="", flush=True)
        finally:
            if removed := files[len(self.conversation.files) :]:
                _log(f"removed with the question: {', '.join(removed)}")
        print(flush=True)
        if self.conversation.finish_reason == "length":
            _log("[the answer reached max_new_tokens]")
        elif self.conversation.finish_reason == "cancelled":
            _log("[stopped]")

    @contextlib.contextmanager
    def _interrupts_cancel(self) -> Iterator[None]:
        """Makes Ctrl-C end the answer and not the program. Without a terminal, Ctrl-C ends the program."""
        if not self._is_terminal:
            yield
            return
        earlier = signal.signal(signal.SIGINT, lambda *_: self.conversation.cancel())
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, earlier)

    def _open(self, value: str) -> None:
        if not value:
            raise InputError("/open needs the path of a video, GIF, image or directory of frames.")
        path = _path(value)
        self.conversation.open(path)
        selections = self.conversation.selections
        _log(f"opened {path}" + (f": {_summary(selections[-1])}" if selections else ""))

    def _frames(self, _: str) -> None:
        files, selections = self.conversation.files, self.conversation.selections
        if not files:
            raise InputError("No file is open. Add one with /open PATH.")
        for i, path in enumerate(files):
            if i >= len(selections):
                print(visible(f"{path}: the server reports its frames with the next answer"))
                continue
            print(visible(f"{path}: {_summary(selections[i])}"))
            print("\n".join(_frame_lines(selections[i])))

    def _set(self, value: str) -> None:
        if not value:
            for name, current in self._options().items():
                print(f"{name} {'default' if current is None else current}")
            return
        name, _, text = value.partition(" ")
        if name not in self._options():
            names = ", ".join(self._options())
            raise InputError(
                f"The option {name} does not exist.{_suggestion(name, self._options())} The options are {names}."
            )
        if not text.strip():
            raise InputError(f"/set {name} needs a value.")
        self._set_option(name, text.strip())
        _log(f"{name} {self._options()[name]}")

    def _set_option(self, name: str, text: str) -> None:
        conversation = self.conversation
        if name in _PROCESSOR_OPTIONS:
            options = {**conversation.options, name: _number(name, text, int)}
            ProcessorOptions(**options)  # raises InputError
            conversation.options = options
            return
        current = getattr(conversation.sampling, name)
        new = (text,) if name == "stop" else _number(name, text, type(current))
        conversation.sampling = dataclasses.replace(conversation.sampling, **{name: new})

    def _options(self) -> dict[str, Any]:
        options = self.conversation.options
        return {**vars(self.conversation.sampling), **{name: options.get(name) for name in _PROCESSOR_OPTIONS}}

    def _save(self, value: str) -> None:
        if not value:
            raise InputError("/save needs the name of a file.")
        path = Path(value).expanduser()
        self.conversation.save(path)
        _log(f"saved the conversation in {path}")

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        _log("the conversation is empty")


def visible(text: str) -> str:
    """Returns a text whose control characters are escapes, except for line breaks and tabs.

    An answer or the name of a file could otherwise send commands to the terminal, such as changing its title.
    """
    return "".join(_escape(character) if _is_control(character) else character for character in text)


def _is_control(character: str) -> bool:
    return character in _BIDI or (unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _load(
    args: argparse.Namespace, sampling: SamplingOptions, options: Mapping[str, Any], stack: contextlib.ExitStack
) -> LocalModel:
    """Loads the model into this process."""
    _log(f"loading {args.model}")
    dtype = resolve_dtype(args.dtype)
    parameters, processor = tarsier_jax.load(args.model, dtype, int8=args.int8, adapter=args.adapter)
    processor = processor.replace(**options)
    config = fit_conversations(processor, 1, sampling.max_new_tokens, args.prompt_tokens)
    _log(f"preparing for conversations of {config.prompt_tokens} tokens")
    engine = Engine(parameters, processor, config)
    loader = stack.enter_context(MediaLoader(processor, _OWN_FILES, workers=1, root="/"))
    if purpose := _purpose(resolve(args.model)):
        _log(purpose)
    _log("A model that is trained for descriptions follows few other instructions. /help lists the commands.")
    return stack.enter_context(LocalModel(engine, loader))


def _connect(args: argparse.Namespace, stack: contextlib.ExitStack) -> RemoteModel:
    """Connects to the server of --url."""
    local = {"--model": args.model != EMBEDDED, "--dtype": args.dtype != "auto"}
    local |= {"--int8": args.int8 is True, "--w8a8": args.int8 == "w8a8"}
    local["--adapter"] = args.adapter is not None
    local["--prompt_tokens"] = args.prompt_tokens is not None
    if flags := [name for name, is_set in local.items() if is_set]:
        raise InputError(f"{', '.join(flags)} has no effect on the server of --url. Remove it, or start the server so.")
    check_packages("infer.chat --url", "chat", "httpx2")
    model = RemoteModel(args.url)
    stack.callback(model.close)
    _log(f"{model.name} at {args.url} answers. /help lists the commands.")
    return model


def _purpose(directory: Path) -> str:
    """Returns the first paragraph of the checkpoint's model card, or ""."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = (directory / "README.md").read_text(encoding="utf-8")
        if text.startswith("---\n"):  # metadata
            text = text.partition("\n---\n")[2]
        paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
        return next((part[:400] for part in paragraphs if part and part[0] not in "#<![|`"), "")
    return ""


def _path(value: str) -> str:
    """Returns the path in a line, of a copy for a URL. A terminal that a file is dropped on quotes its name."""
    if is_remote(value):
        return str(local_copy(value))
    path = os.path.expanduser(value)
    if not os.path.exists(path):
        with contextlib.suppress(ValueError):
            words = shlex.split(value)
            if len(words) == 1:
                return os.path.expanduser(words[0])
    return path


def _number(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{name} must be {'a whole number' if kind is int else 'a number'}, not {text!r}.") from None


def _suggestion(name: str, names: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, names, 1)
    return f" Do you mean {close[0]}?" if close else ""


def _summary(selection: FrameSelection) -> str:
    height, width = selection.frame_size
    count = len(selection.indices)
    return f"{count} {'frame' if count == 1 else 'frames'} of {width} x {height} pixels"


def _frame_lines(selection: FrameSelection) -> Iterator[str]:
    """Yields a line per frame: its number in the model's input, its index in the clip, and its time."""
    for i, index in enumerate(selection.indices):
        time = "" if selection.times is None else f"  {selection.times[i]:8.2f} s"
        yield f"  {i + 1:3}  frame {index:5}{time}"


def _text_of(error: Exception) -> str:
    """Returns the message of an error. That of an OSError names the file."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}. Choose another path."
    return str(error)


def _log(message: str) -> None:
    print(visible(message), file=sys.stderr, flush=True)


def _terminal_lines(chat: Chat) -> Iterator[str]:
    """Yields the lines that the user edits, until Ctrl-D."""
    from infer.terminal import LineReader

    reader = LineReader(sorted(chat._commands), sorted(chat._options()), cache_directory("chat"))
    while True:
        try:
            yield reader.read()
        except KeyboardInterrupt:
            continue  # the line is dropped
        except EOFError:
            return


if __name__ == "__main__":
    args = parse()
    sys.exit(run(lambda: main(args), args.traceback))
