"""What the fields of a request mean, and how others are refused."""

import json
from typing import Any

import pytest

from infer.serve.errors import ApiError
from infer.serve.prompts import Prompt, PromptLimits, read_prompt
from infer.serve.protocol import read_request
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.processing.processor import ProcessorOptions

LIMITS = PromptLimits(1024, 64, ProcessorOptions(), local_files=True)
VIDEO = "data:video/mp4;base64,AAAA"


def prompt_of(*parts: Any, **fields: Any) -> Prompt:
    content = [*parts, {"type": "text", "text": "What?"}]
    fields = {"messages": [{"role": "user", "content": content}], **fields}
    return read_prompt(read_request(json.dumps(fields).encode()), LIMITS)


def error_of(*parts: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as error:
        prompt_of(*parts, **fields)
    assert error.value.status == 400
    return error.value


def video(**fields: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": VIDEO, **fields}}


def image(**fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", **fields}}


def test_messages_become_a_sample() -> None:
    """In order; a system text of a developer, and earlier answers."""
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [image(), {"type": "text", "text": "Which?"}, video()]},
        {"role": "assistant", "content": "Both.", "tool_calls": None, "refusal": None},
        {"role": "user", "content": "Why?"},
    ]
    prompt = prompt_of(messages=messages)
    assert prompt.sample == {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": {"image_file": "data:image/png;base64,AAAA"}},
                    {"type": "text", "text": "Which?"},
                    {"type": "video", "video": {"video_file": VIDEO}},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "Both."}]},
            {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
        ],
        "placeholders": False,
    }
    assert prompt.kinds == ("image", "video")
    assert prompt.processor_options == {}


def test_options_of_the_answer() -> None:
    fields = {"max_completion_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "seed": 7, "stop": "END"}
    assert prompt_of(**fields, repetition_penalty=1.1).sampling == SamplingOptions(5, 0.5, 0, 0.9, 1.1, 7, ("END",))
    assert prompt_of(seed=0).sampling == SamplingOptions(64)
    assert prompt_of().sampling.seed != prompt_of().sampling.seed
    assert "at most 64" in error_of(max_tokens=65).message
    assert "top_p is 2.0" in error_of(top_p=2).message
    assert error_of(top_p=2).param == "top_p"


def item(prompt: Prompt) -> dict[str, Any]:
    return prompt.sample["messages"][0]["content"][0]["video"]


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ({"num_frames": 4}, {}),
        ({"n_frames": 4}, {}),
        ({}, {"mm_processor_kwargs": {"num_frames": 4}}),
        ({}, {"media_io_kwargs": {"video": {"num_frames": 4}}}),
        ({"num_frames": 4}, {"media_io_kwargs": {"video": {"num_frames": 4}}}),
    ],
)
def test_number_of_frames(part: dict[str, Any], fields: dict[str, Any]) -> None:
    prompt = prompt_of(video(**part), **fields)
    assert item(prompt) == {"video_file": VIDEO, "min_n_frames": 4}
    assert prompt.processor_options == {"n_frames": 1}


def test_frames_per_second() -> None:
    """The number of frames is then a limit; without it, the server's limit is, shared by the videos."""
    prompt = prompt_of(video(fps=2, num_frames=9, start_time=1.5, end_time=3))
    assert item(prompt) == {"video_file": VIDEO, "fps": 2, "min_n_frames": 9, "start_time": 1.5, "end_time": 3}
    assert prompt.frame_limits == (None,)
    prompt = prompt_of(video(), video(), image(), mm_processor_kwargs={"fps": 1})
    assert item(prompt) == {"video_file": VIDEO, "fps": 1, "min_n_frames": 127}
    assert prompt.frame_limits == (127, 127, None)
    assert prompt_of(video(fps=1), video(num_frames=200)).frame_limits == (56, None)


def test_pixels() -> None:
    assert prompt_of(video(max_pixels=5000)).processor_options == {"max_pixels": 5000}
    options = {"max_pixels": 5000, "min_pixels": 100}
    assert prompt_of(video(), image(), mm_processor_kwargs=options).processor_options == options
    assert "differs between" in error_of(video(max_pixels=5000), image()).message
    assert "at most 460800" in error_of(video(max_pixels=10**6)).message
    assert "in order" in error_of(video(max_pixels=100, min_pixels=200)).message


def test_contradictions_are_named() -> None:
    message = error_of(video(num_frames=4), mm_processor_kwargs={"num_frames": 5}).message
    assert (
        "messages[0].content[0].video_url.num_frames is 4" in message
        and "mm_processor_kwargs.num_frames is 5" in message
    )
    assert "others have neither" in error_of(video(num_frames=4), video()).message
    assert "at most 256" in error_of(video(num_frames=200), video(num_frames=57)).message
    assert "not contain a video" in error_of(image(), mm_processor_kwargs={"fps": 2}).message
    assert "differ" in error_of(max_tokens=3, max_completion_tokens=4).message


def test_a_prefill() -> None:
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "Answer: ("}]
    for fields in ({"add_generation_prompt": False}, {}):
        prompt = prompt_of(messages=turns, continue_final_message=True, **fields)
        assert prompt.sample["messages"][-1] == {
            "role": "assistant",
            "content": [{"type": "text", "text": "Answer: ("}],
        }
    assert "continue_final_message" in error_of(messages=turns).message
    assert "exclude" in error_of(messages=turns, continue_final_message=True, add_generation_prompt=True).message
    assert "needs a last message" in error_of(messages=turns[:1], continue_final_message=True).message


def test_neutral_values_are_accepted() -> None:
    prompt_of(n=1, logprobs=False, presence_penalty=0.0, tools=[], response_format={"type": "text"}, user=None)


@pytest.mark.parametrize(
    "name", ["n", "logprobs", "tools", "response_format", "presence_penalty", "user", "chat_template"]
)
def test_other_fields_are_refused_by_name(name: str) -> None:
    error = error_of(**{name: 2})
    assert error.param == name and name in error.message and "Remove it" in error.message


def test_unknown_keys_of_parts_are_refused_by_name() -> None:
    assert error_of(video(total_pixels=4)).param == "messages[0].content[0].video_url.total_pixels"
    assert error_of(image(fps=4)).param == "messages[0].content[0].image_url.fps"
    assert error_of({**video(), "uuid": "a"}).param == "messages[0].content[0].uuid"
    assert error_of(mm_processor_kwargs={"size": 4}).param == "mm_processor_kwargs.size"


@pytest.mark.parametrize(
    ("url", "path"),
    [("file:///a/b%20c.mp4", "/a/b c.mp4"), ("file://localhost/a.mp4", "/a.mp4"), ("https://a.b/c.mp4", None)],
)
def test_urls(url: str, path: str | None) -> None:
    part = {"type": "video_url", "video_url": {"url": url}}
    assert item(prompt_of(part)) == {"video_file": path or url}


@pytest.mark.parametrize(
    "url", ["/etc/passwd", "file:a.mp4", "file://host/a.mp4", "ftp://a.b/c.mp4", "file:///a%00.mp4"]
)
def test_other_urls_are_refused(url: str) -> None:
    assert error_of({"type": "image_url", "image_url": {"url": url}}).param == "messages[0].content[0].image_url.url"


def test_errors_are_short() -> None:
    """However large the request is."""
    body = json.dumps({"messages": [], **{f"{'x' * 1000}{i}": i for i in range(1000)}}).encode()
    with pytest.raises(ApiError) as error:
        read_request(body)
    assert len(json.dumps(error.value.body)) < 1000
