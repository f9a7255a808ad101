"""Rows in both formats of the original."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def question_row(idx: Any, vid: str = "a/1.avi", dataset: str = "TVBench/Action Count", **video: Any) -> dict[str, Any]:
    """Returns a row with `messages`, as in TVBench.jsonl."""
    user = [
        {"type": "video", "video": {"video_file": "<placeholder>", **video}},
        {"type": "text", "text": "Question: What jumps?\n(A) A ring.\n(B) A star."},
    ]
    answer = [{"type": "text", "text": " Answer: ("}, {"type": "text", "text": "", "reference": "B"}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "dataset": dataset, "task": "video/QA", "idx": idx, "vid": vid}


def caption_row(idx: Any, dataset: str = "DREAM/youtube") -> dict[str, Any]:
    """Returns a row with `messages`, as in DREAM-1k.jsonl."""
    empty = {"reference": None, "text": None, "video": None}
    user = [
        {**empty, "type": "video", "video": {"video_file": "<placeholder>"}},
        {**empty, "type": "text", "text": "Describe the video in detail."},
    ]
    answer = [{**empty, "type": "text", "text": "", "reference": "A ring\u2028jumps."}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    extra = {"events": ["A ring jumps."], "n_events": 1, "n_shots": 1, "n_subjects": 1}
    return {"messages": messages, "dataset": dataset, "idx": idx, "vid": idx, "extra_info": extra}


def text_row(idx: Any, prompt: str, dataset: str = "Video-MME", **fields: Any) -> dict[str, Any]:
    """Returns a row with `text`, as in the files of the original's first version."""
    text = {"prompt": prompt, "response": "B", "prediction": None}
    return {"text": text, "dataset": dataset, "idx": idx, "vid": "001", "video_file": "<placeholder>", **fields}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
