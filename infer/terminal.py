"""Edits the lines of the chat in a terminal, with history and completion."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

_PROMPT = "> "


class LineReader:
    """Reads lines. Earlier lines, also of earlier runs, are recalled with the arrow keys.

    Args:
        commands: The commands, which are completed.
        options: The names after /set, which are completed.
        directory: Directory of the history file; None keeps the history in memory.
    """

    def __init__(self, commands: Sequence[str], options: Sequence[str], directory: Path | None):
        self._session: PromptSession[str] = PromptSession(
            history=_open_history(directory),
            completer=_CommandCompleter(commands, options),
            complete_while_typing=False,
            enable_history_search=True,
        )

    def read(self) -> str:
        """Returns the next line, which contains line breaks if several lines were pasted.

        Raises:
            KeyboardInterrupt: the user pressed Ctrl-C.
            EOFError: the user pressed Ctrl-D.
        """
        return self._session.prompt(_PROMPT)


class _CommandCompleter(Completer):
    """Completes commands, the paths after /open and /save, and the names after /set."""

    def __init__(self, commands: Sequence[str], options: Sequence[str]):
        self._commands = WordCompleter(list(commands), sentence=True)
        paths = PathCompleter(expanduser=True)
        self._arguments: dict[str, Completer] = {
            "/open": paths,
            "/save": paths,
            "/set": WordCompleter(list(options), sentence=True),
        }

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        command, space, argument = text.partition(" ")
        if not space:
            return self._commands.get_completions(document, complete_event) if text.startswith("/") else ()
        completer = self._arguments.get(command)
        return completer.get_completions(Document(argument), complete_event) if completer else ()


def _open_history(directory: Path | None) -> History:
    """Returns the history in a file that only the user can read."""
    if directory is None:
        return InMemoryHistory()
    file = directory / "history"
    os.close(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600))
    os.chmod(file, 0o600)
    return FileHistory(str(file))
