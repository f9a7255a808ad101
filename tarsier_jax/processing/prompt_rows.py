"""Rows of the first Tarsier's annotation files, which have a prompt in place of messages.

    {"text": {"prompt": "USER: <video> Why? ASSISTANT: Answer: (", "response": "B"}, "video_file": "a.mp4", "idx": 1}

The prompt is a user's turn and the beginning of the answer, or the text of a user's turn.
"""

from collections.abc import Mapping
from typing import Any

_TIMES = ("start_time", "end_time")


def is_prompt_row(sample: Any) -> bool:
    """Returns whether a sample has a prompt in place of messages."""
    text = sample.get("text") if isinstance(sample, Mapping) else None
    return isinstance(text, Mapping) and isinstance(text.get("prompt"), str)


def messages_of_prompt(row: Mapping[str, Any], keep_prompt: bool) -> list[dict[str, Any]]:
    """Returns the messages of a row, without its answer.

    Args:
        row: A row with a prompt.
        keep_prompt: Return the prompt as the text of one turn, for chat templates that leave complete prompts as they
            are. Otherwise it is split into the turns of the user and the assistant.
    """
    prompt, file = row["text"]["prompt"], row.get("video_file")
    times = {key: row[key] for key in _TIMES if row.get(key) and not isinstance(file, list)}  # frames have no times
    video = {"type": "video", "video": {"video_file": file, **times}}
    if keep_prompt:
        before, _, after = prompt.rpartition("<video>")
        return [{"role": "user", "content": [*_texts(before), video, *_texts(after)]}]
    question, _, prefill = prompt.rpartition("ASSISTANT:") if "ASSISTANT:" in prompt else (prompt, "", "")
    before, _, after = question.strip().removeprefix("USER:").rpartition("<video>")
    content = [*_texts(before.strip()), video, {"type": "text", "text": after.strip()}]
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": prefill}]},
    ]


def with_prompt_answer(row: Mapping[str, Any], answer: str) -> dict[str, Any]:
    """Returns the row with an answer, in the format of the original's predictions."""
    return {**row, "text": {**row["text"], "prediction": answer}}


def _texts(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []
