"""The body of a request for a chat completion.

Types are strict, and a field that the server does not honour is an error that names it. OpenAI's and vLLM's fields
whose value asks for nothing, such as n=1, are accepted. null is the same as an absent field.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, from_json

from infer.serve.errors import ApiError, bad_request

MAX_MESSAGES = 1000
_MAX_PARTS = 1000  # per message
_MAX_FACTOR = 100  # of temperature and repetition_penalty
_MAX_STOPS, _MAX_STOP = 16, 256  # number of stop strings, and characters of each

# Fields that are accepted with these values only, which change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "length_penalty": (1,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "add_special_tokens": (False,),
    "echo": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "priority": (0,),
    "chat_template_kwargs": ({},),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


Url: TypeAlias = Annotated[str, Field(min_length=1)]


class PixelLimits(_Strict):
    """Limits of the pixels of a frame or image, for the processor."""

    max_pixels: Annotated[int, Field(ge=1)] | None = None
    min_pixels: Annotated[int, Field(ge=0)] | None = None


class FrameChoice(_Strict):
    """The frames of a video: a number of frames (under two names), or frames per second."""

    fps: Annotated[float, Field(gt=0)] | None = None
    num_frames: Annotated[int, Field(ge=1)] | None = None
    n_frames: Annotated[int, Field(ge=1)] | None = None


class ImageUrl(PixelLimits):
    """An image. `detail` is OpenAI's; sizes are set with max_pixels."""

    url: Url
    detail: Literal["auto"] = "auto"


class VideoUrl(PixelLimits, FrameChoice):
    """A video, and the part of it in seconds."""

    url: Url
    start_time: Annotated[float, Field(ge=0)] | None = None
    end_time: Annotated[float, Field(ge=0)] | None = None


class TextPart(_Strict):
    """A text."""

    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class VideoPart(_Strict):
    """A video in a message."""

    type: Literal["video_url"]
    video_url: VideoUrl


Part: TypeAlias = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(_Strict):
    """One turn. A content that is a string becomes one part."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], Field(max_length=_MAX_PARTS)]

    @model_validator(mode="before")
    @classmethod
    def _content_parts(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("content"), str):
            return {**data, "content": [{"type": "text", "text": data["content"]}]}
        return data


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: Literal[False] = False


class ProcessorKwargs(PixelLimits, FrameChoice):
    """vLLM's mm_processor_kwargs: for every image and video of the request."""


class MediaIoKwargs(_Strict):
    """vLLM's media_io_kwargs: for every video of the request."""

    video: FrameChoice = FrameChoice()


StopString: TypeAlias = Annotated[str, Field(min_length=1, max_length=_MAX_STOP)]


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: Annotated[float, Field(ge=0, le=_MAX_FACTOR)] | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=_MAX_FACTOR)] | None = None
    seed: int | None = None
    stop: Annotated[list[StopString], Field(max_length=_MAX_STOPS)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None
    mm_processor_kwargs: ProcessorKwargs = ProcessorKwargs()
    media_io_kwargs: MediaIoKwargs = MediaIoKwargs()

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {key: value for key, value in data.items() if not _is_neutral(key, value)}
        return {**data, "stop": [data["stop"]]} if isinstance(data.get("stop"), str) else data


def _is_neutral(name: str, value: Any) -> bool:
    return any(_equal(value, neutral) for neutral in _NEUTRAL.get(name, ()))


def _equal(value: Any, neutral: Any) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def read_request(body: bytes) -> ChatRequest:
    """Returns the request of a body.

    Raises:
        ApiError: the body is not JSON, or a field is unknown, not supported or not valid; the first one is named.
    """
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"The body is not valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise bad_request("The body must be a JSON object with messages.")
    try:
        return ChatRequest.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        raise _field_error(errors[0], len(errors), data) from None


def _field_error(error: ErrorDetails, count: int, data: Mapping[str, Any]) -> ApiError:
    path = _path(error["loc"])
    more = f" There are {count - 1} further errors." if count > 1 else ""
    if error["type"] != "extra_forbidden":
        return bad_request(f"{path}: {error['msg'][:300]}.{more}", path)
    if path in _NEUTRAL:
        value, values = json.dumps(data[path])[:60], " or ".join(map(json.dumps, _NEUTRAL[path]))
        return bad_request(f"{path} is {value}, but only {values} is supported. Remove it.{more}", path)
    return bad_request(f"The field {path[:200]} is not supported. Remove it; see docs/serving.md.{more}", path)


def _path(location: tuple[int | str, ...]) -> str:
    """Returns a location as text, such as messages[0].content[1].video_url.fps.

    Before the fields of a part, pydantic inserts its type.
    """
    path, after_part = "", False
    for i, name in enumerate(location):
        if isinstance(name, int):
            path += f"[{name}]"
            after_part = i > 0 and location[i - 1] == "content"
            continue
        if not after_part:
            path += f".{name}" if path else name
        after_part = False
    return path or "The body"
