"""Rows of predictions in both formats of the original."""

from collections.abc import Mapping
from typing import Any

from eval.predictions import Prediction, RowFormat


def row(
    dataset: str, idx: Any, text: str | None, reference: Any, row_format: RowFormat = "messages", **more: Any
) -> dict[str, Any]:
    """Returns a row with the answer `text`; `more` are further keys of the row."""
    prompt = more.pop("prompt", "Question: Why?\n(A) One\n(B) Two")
    if row_format == "text":
        answer = {} if text is None else {"prediction": text}
        content: Mapping[str, Any] = {"text": {"prompt": prompt, "response": reference, **answer}}
    else:
        video = {"type": "video", "video": {"video_file": "clips/1.mp4"}}
        user = {"role": "user", "content": [video, {"type": "text", "text": prompt}]}
        answer = [{"type": "text", "text": text, "reference": reference}]
        content = {"messages": [user, {"role": "assistant", "content": answer}]}
    return {**content, "dataset": dataset, "idx": idx, **more}


def prediction(
    dataset: str, idx: Any, text: str | None, reference: Any, row_format: RowFormat = "messages", **more: Any
) -> Prediction:
    return Prediction.of(row(dataset, idx, text, reference, row_format, **more))
