"""A model on a server with OpenAI's chat completions, such as `infer.serve`."""

import base64
import dataclasses
import itertools
import json
import mimetypes
import os
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tarsier_jax.errors import InputError
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.processing.frame_sampling import FrameSelection

KEY_VARIABLE = "TARSIER_API_KEY"
_CONNECT_S, _SILENCE_S = 10.0, 600.0  # seconds; a server sends comments while a request waits
_MAX_FILE = 256 << 20  # bytes
_FINISH_REASONS = {"stop": "eos", "length": "length"}
_ALWAYS = ("temperature", "top_p", "seed")
_NAMES = {"max_new_tokens": "max_tokens"}  # of the protocol, where they differ from those of SamplingOptions


@dataclasses.dataclass(frozen=True)
class RemoteMedia:
    """The images and videos of a conversation as data URLs.

    Attributes:
        urls: The data URL of each file, by its path.
        selections: Empty, because the server selects the frames.
    """

    urls: Mapping[str, str]
    selections: Sequence[FrameSelection] = ()


class RemoteModel:
    """Answers conversations with a server; the `Model` of `infer.conversation.Conversation`.

    The key of the server is read from the environment variable TARSIER_API_KEY.

    Args:
        url: Address of the server, such as "http://localhost:8000", with or without "/v1".

    Raises:
        InputError: the URL is not valid, the server does not answer, or it rejects the key.
    """

    def __init__(self, url: str):
        import httpx2

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"--url {url} is not the address of a server. Use one like http://localhost:8000.")
        self._url = url.rstrip("/") if parts.path.rstrip("/") else f"{url.rstrip('/')}/v1"
        key = os.environ.get(KEY_VARIABLE, "").strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx2.Client(headers=headers, timeout=httpx2.Timeout(_SILENCE_S, connect=_CONNECT_S))
        self.name = self._first_model()

    def read_media(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> RemoteMedia:
        """Reads the files. Raises InputError for one that cannot be read."""
        paths = [_path(item) for message in messages for item in message["content"] if item["type"] != "text"]
        return RemoteMedia({path: _data_url(path) for path in paths})

    def answer(
        self, messages: list[dict[str, Any]], media: RemoteMedia, sampling: SamplingOptions, options: Mapping[str, Any]
    ) -> "RemoteAnswer":
        """Starts an answer."""
        body = {
            "model": self.name,
            "messages": [{**message, "content": _parts(message["content"], media)} for message in messages],
            "stream": True,
            **_sampling_fields(sampling),
            **_processor_fields(messages, options),
        }
        return RemoteAnswer(self._client, f"{self._url}/chat/completions", body)

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _first_model(self) -> str:
        import httpx2

        try:
            response = self._client.get(f"{self._url}/models")
            if response.status_code != 200:
                raise InputError(_reason(response.status_code, response.text))
            return str(response.json()["data"][0]["id"])
        except httpx2.HTTPError as error:
            raise InputError(f"{self._url} does not answer ({_summary(error)}). Check the address.") from None
        except (ValueError, LookupError, TypeError):
            raise InputError(f"{self._url}/models is not the list of a server's models. Check the address.") from None


class RemoteAnswer:
    """An answer of `RemoteModel`. A thread reads the response, so that `cancel` works while the server is silent.

    Attributes:
        finish_reason: "eos", "length" or "cancelled", after the stream. The server reports a stop string as "eos".
        selections: The frames that the server reports, after the stream.
    """

    def __init__(self, client: Any, url: str, body: Mapping[str, Any]):
        self.finish_reason: str = "cancelled"
        self.selections: Sequence[FrameSelection] = ()
        self._client, self._url, self._body = client, url, body
        self._events: queue.SimpleQueue[dict[str, Any] | InputError | None] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def stream(self) -> Iterator[str]:
        """Yields the text in pieces. Raises InputError for an error of the server."""
        while (event := self._events.get()) is not None:
            if isinstance(event, InputError):
                raise event
            for choice in event.get("choices") or ():
                if text := (choice.get("delta") or {}).get("content"):
                    yield text
                if reason := choice.get("finish_reason"):
                    self.finish_reason = _FINISH_REASONS.get(reason) or str(reason)
            if "media" in event:
                self.selections = [_selection(entry) for entry in event["media"]]

    def cancel(self) -> None:
        """Ends the answer: closing the connection stops the server."""
        self._cancelled.set()
        self._events.put(None)

    def _read(self) -> None:
        import httpx2

        try:
            with self._client.stream("POST", self._url, json=self._body) as response:
                if response.status_code != 200:
                    raise InputError(_reason(response.status_code, response.read().decode(errors="replace")))
                lines = itertools.takewhile(lambda _: not self._cancelled.is_set(), response.iter_lines())
                for event in _events(lines):
                    self._events.put(event)
            self._events.put(None)
        except httpx2.HTTPError as error:
            self._events.put(InputError(f"The connection to the server failed ({_summary(error)}). Ask again."))
        except InputError as error:
            self._events.put(error)
        except (ValueError, TypeError, AttributeError):
            self._events.put(InputError("The server's answer is not a stream of chat completions. Check the address."))


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yields the objects of a stream of events until its end. Raises InputError for an error in the stream."""
    for line in lines:
        if not line.startswith("data:"):  # a comment, or the end of an event
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise InputError(_message(event) or "The server failed. Ask again.")
        yield event


def _path(item: Mapping[str, Any]) -> str:
    return item[item["type"]][f"{item['type']}_file"]


def _data_url(path: str) -> str:
    if os.path.isdir(path):
        raise InputError(f"{path} is a directory, which cannot be sent to a server. Send a video or an image.")
    try:
        size = os.path.getsize(path)
        if size > _MAX_FILE:
            raise InputError(f"{path} has {size >> 20} MiB; files of up to {_MAX_FILE >> 20} MiB can be sent.")
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). Check the path.") from None
    if not content:
        raise InputError(f"{path} is empty. Copy the file again.")
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _parts(content: Sequence[Mapping[str, Any]], media: RemoteMedia) -> list[dict[str, Any]]:
    """Returns the parts of a message of the protocol."""
    parts: list[dict[str, Any]] = []
    for item in content:
        if item["type"] == "text":
            parts.append({"type": "text", "text": item["text"]})
        else:
            kind = f"{item['type']}_url"
            parts.append({"type": kind, kind: {"url": media.urls[_path(item)]}})
    return parts


def _sampling_fields(sampling: SamplingOptions) -> dict[str, Any]:
    """Returns the fields of a request for the options of an answer.

    Options with their default values are omitted, except those whose defaults differ between servers.
    """
    default = vars(SamplingOptions())
    values = {name: list(value) if name == "stop" else value for name, value in vars(sampling).items()}
    return {
        _NAMES.get(name, name): value
        for name, value in values.items()
        if name in _ALWAYS or getattr(sampling, name) != default[name]
    }


def _processor_fields(messages: list[dict[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a request for the options of the processor, which concern images and videos.

    Raises:
        InputError: the protocol lacks an option.
    """
    unknown = options.keys() - {"n_frames", "max_pixels"}
    if unknown:
        raise InputError(f"A server takes n_frames and max_pixels, but not {', '.join(sorted(unknown))}. Remove it.")
    kinds = {item["type"] for message in messages for item in message["content"]}
    fields: dict[str, Any] = {}
    if "video" in kinds and "n_frames" in options:
        fields["media_io_kwargs"] = {"video": {"num_frames": options["n_frames"]}}
    if kinds & {"image", "video"} and "max_pixels" in options:
        fields["mm_processor_kwargs"] = {"max_pixels": options["max_pixels"]}
    return fields


def _selection(entry: Mapping[str, Any]) -> FrameSelection:
    """Returns the frames in the report of a server."""
    times = entry.get("frame_times")
    size = entry.get("height", 0), entry.get("width", 0)
    return FrameSelection(tuple(entry["frame_indices"]), None if times is None else tuple(times), size)


def _reason(status: int, body: str) -> str:
    """Returns the message for a response that is an error."""
    try:
        message = _message(json.loads(body))
    except ValueError:
        message = ""
    if status in (401, 403):
        return f"The server refuses the request ({status}). Set {KEY_VARIABLE} to its key."
    return message or f"The server answers with status {status}. Check the address, or read its log."


def _message(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message") or "")[:1000] if isinstance(error, dict) else ""


def _summary(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
