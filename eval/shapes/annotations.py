"""Annotations in the formats of the benchmarks: descriptions as in DREAM-1K, questions as in TVBench."""

from collections.abc import Mapping
from typing import Any

from eval.shapes.describe import describe, event_sentences
from eval.shapes.questions import Question
from eval.shapes.world import Scene

VIDEO_PROMPT = "Describe the video in detail."
IMAGE_PROMPT = "Describe the image in detail."
GROUNDED_PROMPT = "Describe the video in detail, and give the frames of each event."
_QUESTION_SETS = {"order": "Event Order", "direction": "Moving Direction", "antonym": "Event Antonym"}


def annotation(
    scene: Scene,
    video: Mapping[str, Any],
    idx: int,
    rate: float = 16.0,
    reference: str | None = None,
    prompt: str = VIDEO_PROMPT,
) -> dict[str, Any]:
    """Returns the annotation of a description.

    Besides the keys of DREAM-1K, `extra_info` has `spans`, the first and last frame of every event (see `world`).
    Clips are grouped by their number of events: `dataset` is "Shapes/3_events".

    Args:
        video: Source of the video item, {"video_file": "0.mp4"} or {"frames": array}.
        rate: Frames per second.
        reference: The description; `describe(scene)` if None.
    """
    events = event_sentences(scene)
    extra = {
        "duration": round(scene.frames / rate, 2),
        "events": events,
        "spans": [[event.first, event.last] for event in scene.events],
        "n_events": len(events),
        "n_shots": 1,
        "n_subjects": len(scene.shapes),
    }
    answer = {"type": "text", "text": "", "reference": describe(scene) if reference is None else reference}
    return {
        "messages": [user_turn(video, prompt), {"role": "assistant", "content": [answer]}],
        "dataset": f"Shapes/{len(events)}_events",
        "task": "video/caption",
        "idx": idx,
        "extra_info": extra,
        "vid": idx,
    }


def question_annotation(question: Question, video: Mapping[str, Any], idx: int, vid: int) -> dict[str, Any]:
    """Returns the annotation of a question; its reference is the text of the right option, then its letter."""
    answer = {"type": "text", "text": "", "reference": question.reply()}
    return {
        "messages": [user_turn(video, question.prompt()), {"role": "assistant", "content": [answer]}],
        "dataset": f"ShapesQA/{_QUESTION_SETS[question.kind]}",
        "task": "video/QA",
        "idx": idx,
        "vid": vid,
    }


def user_turn(video: Mapping[str, Any], prompt: str = VIDEO_PROMPT) -> dict[str, Any]:
    """Returns the user's turn: a video item with the source `video` (see `annotation`), and a prompt."""
    items = [{"type": "video", "video": dict(video)}, {"type": "text", "text": prompt}]
    return {"role": "user", "content": items}
