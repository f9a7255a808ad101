"""A conversation about images and videos, as in the chat and on the web page.

A model answers: `LocalModel` in this process, or `infer.remote.RemoteModel` on a server.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from PIL import Image

from infer.engine import Completion, Engine, EngineConfig, Frontend, Submission, fit_config
from infer.media import MediaLoader
from tarsier_jax.errors import InputError
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.frame_sampling import FrameSelection
from tarsier_jax.processing.jsonl import parse_json, read_lines, to_json
from tarsier_jax.processing.processor import Processor, media_sample
from tarsier_jax.processing.sample import read_messages
from tarsier_jax.processing.unpatch import frames_of
from tarsier_jax.processing.visuals import VisualInputs

Messages = list[dict[str, Any]]

_TEXT_TOKENS = 1024  # tokens of a conversation beside its images and videos


class Media(Protocol):
    """The images and videos of a conversation, ready for a model."""

    @property
    def selections(self) -> Sequence[FrameSelection]:
        """The frames of each image and video, or nothing while they are unknown."""
        ...


class Answer(Protocol):
    """An answer in progress."""

    def stream(self) -> Iterator[str]:
        """Yields the text in pieces. Raises InputError for a conversation that cannot be answered."""
        ...

    def cancel(self) -> None:
        """Ends the answer early, from any thread."""
        ...

    @property
    def finish_reason(self) -> str:
        """After the stream: "eos", "length", "stop" or "cancelled"."""
        ...

    @property
    def selections(self) -> Sequence[FrameSelection]:
        """After the stream: the frames of each image and video."""
        ...


class Model(Protocol):
    """Answers conversations."""

    def read_media(self, messages: Messages, options: Mapping[str, Any]) -> Any:
        """Returns the `Media` of a conversation. Raises InputError for a file that cannot be used."""
        ...

    def answer(self, messages: Messages, media: Any, sampling: SamplingOptions, options: Mapping[str, Any]) -> Answer:
        """Starts the answer to the last message; `media` is the result of `read_media`."""
        ...


class Conversation:
    """The messages of a user and a model.

    A file is decoded when it is opened, and not again in later turns.

    Args:
        model: Answers.
        sampling: How answers are generated.
        options: Fields of ProcessorOptions, such as n_frames.

    Attributes:
        messages: In the annotation format. A turn is added when its answer ends.
        sampling: As above; it can be replaced between turns.
        options: As above.
        finish_reason: Reason of the end of the last answer; see `Answer`.
    """

    def __init__(self, model: Model, sampling: SamplingOptions | None = None, options: Mapping[str, Any] | None = None):
        self._model = model
        self.sampling, self.options = sampling or SamplingOptions(), dict(options or {})
        self.reset()

    def reset(self) -> None:
        """Removes all messages and files."""
        self.messages: Messages = []
        self.finish_reason = ""
        self._opened: list[dict[str, Any]] = []  # items of the next question
        self._media: Media | None = None
        self._media_options: dict[str, Any] = {}  # those that `_media` was read with
        self._selections: Sequence[FrameSelection] = ()
        self._answer: Answer | None = None
        self._is_cancelled = False

    def open(self, path: str | Path) -> None:
        """Adds an image, a video, an animation or a directory of frames to the next question.

        Raises:
            InputError: the file cannot be used. The conversation does not change.
        """
        item = media_sample(os.path.abspath(path))["messages"][0]["content"][0]
        self._read_media([*self.messages, _user([*self._opened, item])])
        self._opened.append(item)

    def ask(self, text: str) -> Iterator[str]:
        """Yields the answer to a question in pieces. The begun part of a cancelled answer remains.

        Raises:
            InputError: the conversation cannot be answered. The question and the files opened for it are removed.
        """
        messages = [*self.messages, _user([*self._opened, {"type": "text", "text": text}])]
        pieces: list[str] = []
        self._is_cancelled = False
        try:
            if self._media is None or self._media_options != self.options:
                self._read_media(messages)
            if self._is_cancelled:
                self.finish_reason = "cancelled"
                return
            self._answer = answer = self._model.answer(messages, self._media, self.sampling, self.options)
            for piece in answer.stream():
                pieces.append(piece)
                yield piece
            self.finish_reason, self._selections = answer.finish_reason, answer.selections
        except InputError:
            if not self._is_cancelled:
                self._remove_opened()
                raise
            self.finish_reason = "cancelled"
        finally:
            self.cancel()  # without effect after the end
            if pieces:
                content = [{"type": "text", "text": "".join(pieces)}]
                self.messages, self._opened = [*messages, {"role": "assistant", "content": content}], []

    def cancel(self) -> None:
        """Ends the answer in progress, from any thread."""
        self._is_cancelled = True
        if self._answer is not None:
            self._answer.cancel()

    @property
    def files(self) -> list[str]:
        """The path of each image and video."""
        return [item[item["type"]][f"{item['type']}_file"] for item in self._visual_items]

    @property
    def selections(self) -> Sequence[FrameSelection]:
        """The frames of each image and video that the model receives; empty while a server has not reported them."""
        return self._selections

    @property
    def media(self) -> Any:
        """The images and videos, the result of the model's `read_media`; None before a file is opened."""
        return self._media

    def pictures(self, index: int) -> list[Image.Image]:
        """Returns the frames of one file as a LocalModel receives them."""
        assert isinstance(self._model, LocalModel) and isinstance(self._media, VisualInputs)
        return frames_of(self._media, index, self._model.processor)

    def save(self, path: str | Path) -> None:
        """Appends the conversation to a file of JSON lines in the annotation format.

        Raises:
            InputError: the conversation is empty.
            OSError: the file cannot be written.
        """
        if not self.messages:
            raise InputError("The conversation is empty. Ask a question first.")
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(to_json(_sample(self.messages)) + "\n")

    def load(self, path: str | Path) -> None:
        """Continues the last conversation in a file that `save` has written.

        Raises:
            InputError: the file contains no conversation that ends with an answer, or a file in it cannot be used.
            OSError: the file cannot be read.
        """
        lines = list(read_lines(Path(path)))
        sample = parse_json(lines[-1], f"{path}, last line") if lines else {}
        messages = read_messages(sample)
        if messages[-1]["role"] != "assistant":
            raise InputError(f"{path}: the last conversation does not end with an answer. Add one, or remove its end.")
        self._read_media(messages)
        self.messages, self._opened = messages, []

    @property
    def _visual_items(self) -> list[dict[str, Any]]:
        items = [item for message in self.messages for item in message["content"]]
        return [item for item in [*items, *self._opened] if item["type"] != "text"]

    def _read_media(self, messages: Messages) -> None:
        options = dict(self.options)
        self._media = media = self._model.read_media(messages, options)
        self._media_options, self._selections = options, media.selections

    def _remove_opened(self) -> None:
        if self._opened:
            self._opened, self._media, self._selections = [], None, ()


def fit_conversations(
    processor: Processor, slots: int, new_tokens: int, prompt_tokens: int | None = None
) -> EngineConfig:
    """Returns the config of an engine for conversations, with prompts of two videos and text by default.

    Args:
        processor: Its options determine the size of a video.
        slots: Number of answers in progress at once.
        new_tokens: Limit of an answer, in tokens.
        prompt_tokens: Limit of a conversation, in tokens.
    """
    if prompt_tokens is None:
        video = fit_config(processor, slots, new_tokens).prompt_tokens
        prompt_tokens = min(2 * video + _TEXT_TOKENS, processor.options.max_seq_len)
    config = fit_config(processor, slots, new_tokens, prompt_tokens=prompt_tokens)
    buckets = config.buckets[::-2]  # fewer programs to compile; the largest frames fit
    return dataclasses.replace(config, buckets=buckets, reuse_prefixes=True)


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """An argument of the front-end's `prepare`."""

    messages: Messages
    media: VisualInputs
    options: Mapping[str, Any]


class LocalModel:
    """Answers conversations with an engine of this process. `close` it, or use it in a `with` statement.

    Args:
        engine: Must not be used by others. It should reuse prefixes: then a turn runs its new tokens only.
        loader: Reads images and videos.
    """

    def __init__(self, engine: Engine, loader: MediaLoader):
        self.processor: Processor = engine.processor
        self._loader = loader
        self._frontend = Frontend(engine, prepare=self._prepare)

    def read_media(self, messages: Messages, options: Mapping[str, Any]) -> VisualInputs:
        """Decodes the images and videos. Raises InputError."""
        example = self._loader(_sample(messages), **options)
        return VisualInputs(example.pixel_values, example.grid_thw, example.frames, example.selections)

    def answer(
        self, messages: Messages, media: VisualInputs, sampling: SamplingOptions, options: Mapping[str, Any]
    ) -> "LocalAnswer":
        """Starts an answer."""
        prompt = _Prompt(messages, media, options)
        return LocalAnswer(self._frontend.submit(prompt, sampling, stream=True), media.selections)

    def close(self) -> None:
        """Waits for the answers in progress, and ends the threads."""
        self._frontend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: Mapping[int, object]) -> Self:
        return self  # a copy of a conversation has the same model

    def _prepare(self, prompt: _Prompt) -> Example:
        processor = self.processor.replace(**prompt.options)
        messages, _ = processor.read(_sample(prompt.messages))
        return processor.encode(messages, prompt.media)


class LocalAnswer:
    """An answer of `LocalModel`.

    Attributes:
        selections: The frames of each image and video.
    """

    def __init__(self, submission: Submission, selections: Sequence[FrameSelection]):
        self._submission, self.selections = submission, selections

    def stream(self) -> Iterator[str]:
        """Yields the text in pieces. Raises InputError."""
        yield from self._submission.stream()

    def cancel(self) -> None:
        """Ends the answer early."""
        self._submission.cancel()

    @property
    def completion(self) -> Completion:
        """The entire answer, after the stream."""
        result = self._submission.result()
        assert isinstance(result, Completion)  # the stream raises an error
        return result

    @property
    def finish_reason(self) -> str:
        """Reason of the end."""
        return self.completion.finish_reason


def _sample(messages: Messages) -> dict[str, Any]:
    """Returns the messages as a sample, in which `<image>` and `<video>` in a text are text."""
    return {"messages": messages, "placeholders": False}


def _user(content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": "user", "content": content}
