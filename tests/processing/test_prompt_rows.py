"""Rows of the first Tarsier's annotation files."""

from typing import Any

from tarsier_jax.processing.prompt_rows import is_prompt_row, messages_of_prompt, with_prompt_answer

ROW = {
    "text": {"prompt": "USER: <video> Why?\n(A) So.\nASSISTANT: Answer: (", "response": "A"},
    "video_file": "a.mp4",
    "start_time": 2,
    "end_time": 0,
}
VIDEO = {"type": "video", "video": {"video_file": "a.mp4", "start_time": 2}}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def test_a_prompt_is_one_message_or_two_turns() -> None:
    content = [text("USER: "), VIDEO, text(" Why?\n(A) So.\nASSISTANT: Answer: (")]
    assert messages_of_prompt(ROW, keep_prompt=True) == [{"role": "user", "content": content}]
    question, prefill = [VIDEO, text("Why?\n(A) So.")], [text(" Answer: (")]
    assert messages_of_prompt(ROW, keep_prompt=False) == [
        {"role": "user", "content": question},
        {"role": "assistant", "content": prefill},
    ]


def test_a_list_of_frames_is_without_times() -> None:
    messages = messages_of_prompt({**ROW, "video_file": ["a.png", "b.png"]}, keep_prompt=True)
    assert messages[0]["content"][1] == {"type": "video", "video": {"video_file": ["a.png", "b.png"]}}


def test_the_answer_is_beside_the_prompt() -> None:
    assert is_prompt_row(ROW) and not is_prompt_row({"text": "USER: Why?"}) and not is_prompt_row("text")
    assert with_prompt_answer(ROW, "A) So.")["text"] == {**ROW["text"], "prediction": "A) So."}
