"""From the body of a request to a sample in the annotation format, and the options of its processing and answer.

The number of frames and the frames per second of a request are per video. `n_frames` of the server is shared by the
videos of a request, as in all programs.
"""

import dataclasses
import secrets
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote

from infer.serve.errors import ApiError, bad_request
from infer.serve.protocol import ChatRequest, FrameChoice, ImagePart, ImageUrl, PixelLimits, TextPart, VideoUrl
from tarsier_jax.errors import InputError
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.processing.processor import ProcessorOptions

_CHARACTERS_PER_TOKEN = 32  # no text has more, so longer texts are refused before they are tokenized
_MAX_URL = 2048  # characters of a URL without content
_ROLES = {"developer": "system"}


@dataclasses.dataclass(frozen=True)
class PromptLimits:
    """Limits of a request, from the flags of the server.

    Attributes:
        prompt_tokens: Largest number of tokens of a prompt.
        new_tokens: Largest number of tokens of an answer, and the default.
        processor: Options of the processor; a request may lower max_pixels, and select up to max_n_frames frames.
        local_files: Whether file:// URLs are accepted.
    """

    prompt_tokens: int
    new_tokens: int
    processor: ProcessorOptions
    local_files: bool = False


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A request that is ready for the engine's front-end.

    Attributes:
        sample: In the annotation format.
        processor_options: Options of the processor that differ from the server's.
        sampling: How the answer is generated.
        kinds: "image" or "video" for each image and video, in order.
        frame_limits: The largest number of frames of each video that has frames per second but no number of frames;
            None for the other images and videos.
    """

    sample: dict[str, Any]
    processor_options: dict[str, Any]
    sampling: SamplingOptions
    kinds: tuple[str, ...]
    frame_limits: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class _Medium:
    """An image or video of a request.

    Attributes:
        place: Its part of the request, such as "messages[0].content[1]".
        url: Its URL, and the keys beside it.
        source: Path, data URL or http(s) URL.
        fps: Frames per second, or None.
        num_frames: The largest number of frames, or None.
    """

    place: str
    url: ImageUrl | VideoUrl
    source: str
    fps: float | None = None
    num_frames: int | None = None

    @property
    def kind(self) -> str:
        return "video" if isinstance(self.url, VideoUrl) else "image"

    @property
    def has_frame_choice(self) -> bool:
        return self.fps is not None or self.num_frames is not None

    @property
    def is_open(self) -> bool:
        """Whether only fps is set, so the number of frames depends on the video."""
        return self.fps is not None and self.num_frames is None

    def item(self, share: int) -> dict[str, Any]:
        """Returns the item of the annotation format. `share` is the largest number of frames if it is open.

        `min_n_frames` is the limit of the frames of an item if the sample's own number of frames is smaller.
        """
        if not isinstance(self.url, VideoUrl):
            return {"type": "image", "image": {"image_file": self.source}}
        choice = {"fps": self.fps, "min_n_frames": share if self.is_open else self.num_frames}
        part = {"start_time": self.url.start_time, "end_time": self.url.end_time}
        return {"type": "video", "video": {"video_file": self.source, **_without_none({**choice, **part})}}


def read_prompt(request: ChatRequest, limits: PromptLimits) -> Prompt:
    """Converts a request.

    Raises:
        ApiError: values contradict each other, or exceed the limits.
    """
    _check_last_turn(request)
    _check_texts(request, limits)
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options is only for stream=true. Remove it.", "stream_options")
    media = list(_read_media(request, limits))
    frame_options = _frame_options(media, request, limits)
    share = _share(media, limits)
    items = iter([medium.item(share) for medium in media])
    messages = [
        {
            "role": _ROLES.get(message.role, message.role),
            "content": [
                {"type": "text", "text": part.text} if isinstance(part, TextPart) else next(items)
                for part in message.content
            ],
        }
        for message in request.messages
    ]
    return Prompt(
        sample={"messages": messages, "placeholders": False},  # <image> in a text is text
        processor_options={**frame_options, **_pixel_options(media, request, limits)},
        sampling=read_sampling(request, limits.new_tokens),
        kinds=tuple(medium.kind for medium in media),
        frame_limits=tuple(share if medium.fps is not None and medium.num_frames is None else None for medium in media),
    )


def read_sampling(request: ChatRequest, new_tokens: int) -> SamplingOptions:
    """Returns the options of the answer. Without a seed, each request is sampled with its own. Raises ApiError."""
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise bad_request("max_tokens and max_completion_tokens differ. Keep one of them.", "max_tokens")
    max_new_tokens = limits.pop() if limits else new_tokens
    if max_new_tokens is not None and max_new_tokens > new_tokens:
        raise bad_request(
            f"max_tokens is {max_new_tokens}, but the server generates at most {new_tokens}. Use a smaller number, or "
            "start the server with a larger --max_new_tokens.",
            "max_tokens",
        )
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": 0 if request.top_k == -1 else request.top_k,  # vLLM's name for all tokens
        "repetition_penalty": request.repetition_penalty,
        "seed": secrets.randbelow(2**31) if request.seed is None else request.seed,
        "stop": tuple(request.stop),
    }
    try:
        return SamplingOptions(**{name: value for name, value in options.items() if value is not None})
    except InputError as error:
        name = str(error).split()[0]
        raise bad_request(str(error).replace("max_new_tokens", "max_tokens"), name) from None


def _check_last_turn(request: ChatRequest) -> None:
    is_answer = request.messages[-1].role == "assistant"
    if is_answer and not request.continue_final_message:
        raise bad_request(
            "The last message is the assistant's. Set continue_final_message to true (and add_generation_prompt to "
            "false) to continue it, or end with a message of the user.",
            "messages",
        )
    if request.continue_final_message and not is_answer:
        raise bad_request(
            "continue_final_message needs a last message of the assistant, which is the beginning of the answer.",
            "continue_final_message",
        )
    if request.add_generation_prompt is request.continue_final_message:
        raise bad_request(
            "add_generation_prompt and continue_final_message exclude each other: one of them must be true.",
            "add_generation_prompt",
        )


def _check_texts(request: ChatRequest, limits: PromptLimits) -> None:
    length = sum(len(part.text) for m in request.messages for part in m.content if isinstance(part, TextPart))
    if length > (most := _CHARACTERS_PER_TOKEN * limits.prompt_tokens):
        raise bad_request(
            f"The texts have {length} characters; the server takes at most {most}. Shorten them.", "messages"
        )


def _read_media(request: ChatRequest, limits: PromptLimits) -> Iterator[_Medium]:
    """Yields the images and videos in order of appearance. Raises ApiError."""
    for i, message in enumerate(request.messages):
        for j, part in enumerate(message.content):
            if isinstance(part, TextPart):
                continue
            place = f"messages[{i}].content[{j}]"
            if message.role != "user":
                raise bad_request(f"{place} is in a message of the {message.role}. Only the user sends media.", place)
            if isinstance(part, ImagePart):
                url = part.image_url
                yield _Medium(place, url, _source(url.url, f"{place}.image_url.url", limits))
                continue
            choices = [(f"{place}.video_url", part.video_url), *_frame_kwargs(request)]
            source = _source(part.video_url.url, f"{place}.video_url.url", limits)
            fps, num_frames = _one(choices, "fps"), _one(choices, "num_frames", "n_frames")
            yield _Medium(place, part.video_url, source, fps, num_frames)


def _frame_kwargs(request: ChatRequest) -> list[tuple[str, FrameChoice]]:
    """Returns the places outside the messages that select frames."""
    return [
        ("mm_processor_kwargs", request.mm_processor_kwargs),
        ("media_io_kwargs.video", request.media_io_kwargs.video),
    ]


def _frame_options(media: Sequence[_Medium], request: ChatRequest, limits: PromptLimits) -> dict[str, Any]:
    """Returns the options of the processor for a request that selects frames: each video then has its own number."""
    videos, most = [medium for medium in media if medium.kind == "video"], limits.processor.max_n_frames
    choices = [medium for medium in videos if medium.has_frame_choice]
    if not videos and _one(_frame_kwargs(request), "fps", "num_frames", "n_frames") is not None:
        raise bad_request("The request selects frames, but does not contain a video. Remove fps and num_frames.")
    if choices and len(choices) < len(videos):
        raise bad_request("Some videos have fps or num_frames and others have neither. Set one for each.", "messages")
    num_frames = len(media) - len(videos) + sum(medium.num_frames or 1 for medium in videos)
    if num_frames > most:
        raise bad_request(
            f"The request has {num_frames} frames and images; the server takes at most {most}. Use fewer (num_frames).",
            "num_frames",
        )
    return {"n_frames": 1} if choices else {}


def _share(media: Sequence[_Medium], limits: PromptLimits) -> int:
    """Returns the largest number of frames of each open video, which share the frames that the others leave."""
    others = sum((medium.num_frames or 1) for medium in media if not medium.is_open)
    return (limits.processor.max_n_frames - others) // max(sum(medium.is_open for medium in media), 1)


def _pixel_options(media: Sequence[_Medium], request: ChatRequest, limits: PromptLimits) -> dict[str, Any]:
    """Returns max_pixels and min_pixels, which all images and videos of a request share."""
    kwargs = ("mm_processor_kwargs", request.mm_processor_kwargs)
    options: dict[str, Any] = {}
    for name in ("max_pixels", "min_pixels"):
        values = {_one([(f"{m.place}.{m.kind}_url", m.url), kwargs], name) for m in media}
        if not media and _one([kwargs], name) is not None:
            raise bad_request(f"The request has {name}, but does not contain an image or video. Remove it.", name)
        if len(values) > 1:
            raise bad_request(
                f"{name} differs between the images and videos of the request, which share it. Set it in "
                "mm_processor_kwargs.",
                name,
            )
        options[name] = next(iter(values), None)
    options = _without_none(options)
    low = options.get("min_pixels", limits.processor.min_pixels)
    high = options.get("max_pixels", limits.processor.max_pixels)
    if max(low, high) > limits.processor.max_pixels or low > high:
        raise bad_request(
            f"min_pixels {low} and max_pixels {high} must be in order, and at most {limits.processor.max_pixels}, the "
            "server's --max_pixels.",
            "max_pixels",
        )
    return options


def _one(choices: Sequence[tuple[str, PixelLimits | FrameChoice]], *names: str) -> Any:
    """Returns the value of a field that has several places and names, or None. Raises ApiError if values differ."""
    values = {
        f"{place}.{name}": value
        for place, choice in choices
        for name in names
        if (value := getattr(choice, name, None)) is not None
    }
    if len(set(values.values())) > 1:
        texts = " and ".join(f"{name} is {value}" for name, value in values.items())
        raise bad_request(f"{texts}. Keep one of them.", next(iter(values)))
    return next(iter(values.values()), None)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _source(url: str, place: str, limits: PromptLimits) -> str:
    """Returns a data URL or an http(s) URL as it is, and the path of a file:// URL. Raises ApiError."""
    if url.startswith("data:"):
        return url
    if len(url) > _MAX_URL:
        raise bad_request(f"{place} has {len(url)} characters; a URL has at most {_MAX_URL}.", place)
    if url.startswith(("http://", "https://")):
        return url
    if not url.startswith("file://"):
        raise bad_request(f"{place} must start with data:, https://, http:// or file://.", place)
    if not limits.local_files:
        raise ApiError(400, f"{place} is a local file, which this server does not read.", place, "forbidden")
    path = unquote(url.removeprefix("file://").removeprefix("localhost"))
    if not path.startswith("/") or "\0" in path:
        raise bad_request(f"{place} must be like file:///directory/clip.mp4.", place)
    return path
