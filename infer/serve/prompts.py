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
from infer.serve.protocol import ChatRequest, FrameChoice, ImagePart, PixelLimits, TextPart, VideoPart
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
        frame_limits: The largest number of frames of each video whose frames per second are given without a number of
            frames; None for the other images and videos.
    """

    sample: dict[str, Any]
    processor_options: dict[str, Any]
    sampling: SamplingOptions
    kinds: tuple[str, ...]
    frame_limits: tuple[int | None, ...]


def read_prompt(request: ChatRequest, limits: PromptLimits) -> Prompt:
    """Converts a request.

    Raises:
        ApiError: values contradict each other, or exceed the limits.
    """
    _check_last_turn(request)
    _check_texts(request, limits)
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options is only for stream=true. Remove it.", "stream_options")
    media = list(_media(request))
    if len(media) > limits.processor.max_n_frames:
        raise bad_request(
            f"The request has {len(media)} images and videos; the server takes at most {limits.processor.max_n_frames}."
            " Split it.",
            "messages",
        )
    frame_limits, video_items, frame_options = _choose_frames(media, request, limits)
    items = iter(video_items)
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
        sample={"messages": messages},
        processor_options={**frame_options, **_choose_pixels(media, request, limits)},
        sampling=read_sampling(request, limits.new_tokens),
        kinds=tuple("video" if isinstance(part, VideoPart) else "image" for _, part in media),
        frame_limits=frame_limits,
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


def _media(request: ChatRequest) -> Iterator[tuple[str, ImagePart | VideoPart]]:
    """Yields the place and the part of each image and video."""
    for i, message in enumerate(request.messages):
        for j, part in enumerate(message.content):
            if isinstance(part, TextPart):
                continue
            place = f"messages[{i}].content[{j}]"
            if message.role != "user":
                raise bad_request(f"{place} is in a message of the {message.role}. Only the user sends media.", place)
            yield place, part


def _choose_frames(
    media: Sequence[tuple[str, ImagePart | VideoPart]], request: ChatRequest, limits: PromptLimits
) -> tuple[tuple[int | None, ...], list[dict[str, Any]], dict[str, Any]]:
    """Returns frame_limits of the `Prompt`, the item of each image and video, and options of the processor.

    If the request selects frames, it does so for all of its videos: `min_n_frames` of an item is then the limit of its
    frames, and the shared number of frames has no effect.
    """
    kwargs: list[tuple[str, FrameChoice]] = [
        ("mm_processor_kwargs", request.mm_processor_kwargs),
        ("media_io_kwargs.video", request.media_io_kwargs.video),
    ]
    num_videos = sum(isinstance(part, VideoPart) for _, part in media)
    if not num_videos and any(_values(choice, "fps", "num_frames", "n_frames") for _, choice in kwargs):
        raise bad_request("The request selects frames, but has no video. Remove fps and num_frames.", "messages")
    share = (limits.processor.max_n_frames - (len(media) - num_videos)) // max(num_videos, 1)
    items: list[dict[str, Any]] = []
    counts: list[int | None] = []
    frame_limits: list[int | None] = []
    for place, part in media:
        if isinstance(part, ImagePart):
            path = _source(part.image_url.url, f"{place}.image_url.url", limits)
            items.append({"type": "image", "image": {"image_file": path}})
            frame_limits.append(None)
            continue
        url = part.video_url
        choices = [(f"{place}.video_url", url), *kwargs]
        fps, count = _one(choices, "fps"), _one(choices, "num_frames", "n_frames")
        counts.append(share if count is None and fps is not None else count)
        frame_limits.append(share if count is None and fps is not None else None)
        video = {"fps": fps, "start_time": url.start_time, "end_time": url.end_time, "min_n_frames": counts[-1]}
        path = _source(url.url, f"{place}.video_url.url", limits)
        items.append({"type": "video", "video": {"video_file": path, **_without_none(video)}})
    return tuple(frame_limits), items, _frame_options(counts, len(media) - num_videos, limits)


def _frame_options(counts: Sequence[int | None], num_images: int, limits: PromptLimits) -> dict[str, Any]:
    numbers = [count for count in counts if count is not None]
    if not numbers:
        return {}
    if len(numbers) < len(counts):
        raise bad_request("Some videos have fps or num_frames and others have neither. Set one for each.", "messages")
    most = limits.processor.max_n_frames
    if sum(numbers) + num_images > most:
        raise bad_request(
            f"num_frames: the request has {sum(numbers) + num_images} frames and images; the server takes at most "
            f"{most}. Use fewer.",
            "num_frames",
        )
    return {"n_frames": 1}


def _choose_pixels(
    media: Sequence[tuple[str, ImagePart | VideoPart]], request: ChatRequest, limits: PromptLimits
) -> dict[str, Any]:
    """Returns max_pixels and min_pixels, which all images and videos of a request share."""
    options: dict[str, Any] = {}
    kwargs = ("mm_processor_kwargs", request.mm_processor_kwargs)
    for name in ("max_pixels", "min_pixels"):
        urls = [(place, part.video_url if isinstance(part, VideoPart) else part.image_url) for place, part in media]
        values = {_one([(place, url), kwargs], name) for place, url in urls}
        if not media and _values(request.mm_processor_kwargs, name):
            raise bad_request(f"The request has {name}, but no image or video. Remove it.", name)
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


def _values(choice: PixelLimits | FrameChoice, *names: str) -> list[Any]:
    return [value for name in names if (value := getattr(choice, name, None)) is not None]


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
