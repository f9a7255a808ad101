"""The responses of chat completions, whole and in chunks. `media`, this project's addition, reports the
frames that the model received.

See docs/serving.md for the fields.
"""

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from infer.engine import Completion
from infer.engine.frontend import TextDeltas
from infer.serve.errors import ApiError
from infer.serve.service import PREPARED, Answer, Service
from tarsier_jax.processing.batch import Example

_KEEP_ALIVE_S = 15.0  # seconds of silence in a stream until a comment is sent
_KEEP_ALIVE = ": keep-alive\n\n"
_END = "data: [DONE]\n\n"
_FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


async def whole_response(service: Service, answer: Answer) -> dict[str, Any]:
    """Waits for an answer and returns the body of its response. Raises ApiError."""
    result = await answer.result()
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": result.text},
        "finish_reason": _FINISH_REASONS[result.finish_reason],
    }
    return {
        **_head(service, "chat.completion"),
        "choices": [choice],
        "usage": _usage(service, answer, result),
        "media": media_report(result.request.example, answer.prompt.kinds),
    }


async def stream_response(service: Service, answer: Answer, include_usage: bool) -> AsyncIterator[str]:
    """Yields the events of a stream: the role, the text in deltas, the reason of its end, and the usage.

    An error in the stream is an event. Comments keep the connection open while the request waits.
    """
    head = _head(service, "chat.completion.chunk")

    def chunk(delta: dict[str, Any], finish_reason: str | None = None, **fields: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return _event({**head, "choices": [choice], **fields})

    try:
        yield chunk({"role": "assistant", "content": ""})
        deltas = TextDeltas(service.decode, answer.prompt.sampling)
        has_tokens = False
        while True:
            try:
                event = await answer.next_event(_KEEP_ALIVE_S)
            except TimeoutError:
                yield _KEEP_ALIVE
                continue
            if event is None:
                break
            if event is PREPARED:
                continue
            if not has_tokens:
                answer.count_first_token()
            has_tokens = True
            if text := deltas.add(event):
                yield chunk({"content": text})
        result = answer.completion()
        if text := deltas.end(result.text):
            yield chunk({"content": text})
        media = media_report(result.request.example, answer.prompt.kinds)
        yield chunk({}, _FINISH_REASONS[result.finish_reason], media=media)
        if include_usage:
            yield _event({**head, "choices": [], "usage": _usage(service, answer, result)})
    except ApiError as error:
        yield _event(error.body)
    yield _END


def media_report(example: Example, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the frames, times in seconds and size in pixels of each image and video of a prompt."""
    return [
        {
            "type": kind,
            "n_frames": len(selection.indices),
            "frame_indices": list(selection.indices),
            "frame_times": None if selection.times is None else [round(t, 3) for t in selection.times],
            "height": selection.frame_size[0],
            "width": selection.frame_size[1],
            "fetch_seconds": round(selection.fetch_seconds, 4),
            "decode_seconds": round(selection.decode_seconds, 4),
        }
        for kind, selection in zip(kinds, example.selections, strict=True)
    ]


def _usage(service: Service, answer: Answer, result: Completion) -> dict[str, Any]:
    example = result.request.example
    tokens = service.vision.num_tokens(example.grid_thw.prod(axis=1))
    counts = {
        f"{kind}_tokens": int(sum(n for n, each in zip(tokens, answer.prompt.kinds, strict=True) if each == kind))
        for kind in ("image", "video")
    }
    num_prompt, num_new = len(example.input_ids), len(result.tokens)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {**counts, "cached_tokens": result.reused_tokens},
    }


def _head(service: Service, kind: str) -> dict[str, Any]:
    identifier = f"chatcmpl-{secrets.token_hex(12)}"
    return {"id": identifier, "object": kind, "created": int(time.time()), "model": service.name}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
