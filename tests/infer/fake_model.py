"""A model that answers without weights, for tests of conversations. Run as a program, it is a chat in a terminal."""

import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from infer.chat import Chat, _terminal_lines
from infer.conversation import Conversation
from tarsier_jax.errors import InputError
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.processing.frame_sampling import FrameSelection
from tarsier_jax.programs import run

WORDS = ["one", "two", "three", "four", "five"]
SELECTION = FrameSelection((0, 7), (0.0, 1.25), (84, 112))


class FakeModel:
    """Answers with WORDS, and with an error to a conversation that contains "fail".

    Attributes:
        prompts: The messages of each question.
        num_reads: Number of calls of `read_media`.
    """

    def __init__(self, pause: float = 0.0):
        self.prompts: list[list[dict[str, Any]]] = []
        self.num_reads, self._pause = 0, pause

    def read_media(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> Any:
        self.num_reads += 1
        items = [item for message in messages for item in message["content"] if item["type"] != "text"]
        paths = [item[item["type"]][f"{item['type']}_file"] for item in items]
        for path in paths:
            if Path(path).read_bytes() == b"broken":
                raise InputError(f"{path} cannot be decoded. Copy it again.")
        return SimpleNamespace(selections=[SELECTION for _ in paths])

    def answer(
        self, messages: list[dict[str, Any]], media: Any, sampling: SamplingOptions, options: Mapping[str, Any]
    ) -> "FakeAnswer":
        self.prompts.append(messages)
        return FakeAnswer("fail" in str(messages[-1]), media.selections, self._pause)


class FakeAnswer:
    """Streams words, with pauses."""

    def __init__(self, fails: bool, selections: Sequence[FrameSelection], pause: float, words: Sequence[str] = WORDS):
        self.finish_reason, self.selections = "eos", selections
        self._fails, self._pause, self._words, self._cancelled = fails, pause, words, threading.Event()

    def stream(self) -> Iterator[str]:
        if self._fails:
            raise InputError("The prompt has 99 tokens. Use fewer frames.")
        for i, word in enumerate(self._words):
            if self._cancelled.wait(self._pause):
                self.finish_reason = "cancelled"
                return
            yield f" {word}" if i else word

    def cancel(self) -> None:
        self._cancelled.set()


def main() -> int:
    """Answers in a terminal, a word every tenth of a second."""
    chat = Chat(Conversation(FakeModel(0.1)), is_terminal=True)
    print("ready", file=sys.stderr, flush=True)
    time.sleep(0.1)
    chat.run(_terminal_lines(chat))
    print("the end", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
