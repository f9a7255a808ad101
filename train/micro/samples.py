"""Moving shapes as training samples: a line of annotations is a seed, and its clip is drawn when it is loaded.

A line has a seed for a clip and its conversation: a description, a description with the frames of each event, or
questions. A file of seeds therefore has as many new clips as lines.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from eval.shapes.annotations import GROUNDED_PROMPT, IMAGE_PROMPT, VIDEO_PROMPT
from eval.shapes.clips import draw_clip_scene
from eval.shapes.describe import describe, describe_frame, describe_grounded
from eval.shapes.questions import questions
from eval.shapes.render import render_scene
from eval.shapes.world import Scene
from tarsier_jax.errors import InputError
from tarsier_jax.processing.frame_sampling import sample_uniform
from train.data import samples
from train.data.pretraining_tasks import Sample

_MAX_QUESTIONS = 2  # about a clip, as turns of one conversation
_GROUNDED, _WITH_QUESTIONS = 0.05, 0.45  # fractions of the clips of any kind


def prepare_line(sample: Sample, rng: np.random.Generator, n_frames: int = 16) -> dict[str, Any]:
    """Returns the chat of a line, as `train.data.samples.prepare`, which cannot read the task moving_shapes."""
    if sample.get("task") == "moving_shapes":
        return moving_shapes(sample, n_frames)
    return samples.prepare(sample, rng, n_frames)


def moving_shapes(sample: Mapping[str, Any], n_frames: int) -> dict[str, Any]:
    """Returns the chat of a line. All random choices are drawn from its seed.

    Args:
        sample: Its keys besides "seed" are optional. "still": true asks about a single frame. "events": n asks for the
            description of a clip of n events. Without either, the clip is described, with or without the frames of
            each event, and some clips also have questions. "shapes" is the number of shapes. "verb" is the verb of the
            first event, or of the last one where the clip is played backwards.
        n_frames: Frames per clip, as the processor samples them.

    Raises:
        InputError: the seed is missing or negative.
    """
    seed = sample.get("seed")
    if not isinstance(seed, int) or seed < 0:
        raise InputError(f"A moving_shapes line needs a seed, a whole number from 0 on, not {seed!r}.")
    rng = np.random.default_rng(seed)
    shapes, events, verb = (sample.get(name) for name in ("shapes", "events", "verb"))
    scene, size = draw_clip_scene(rng, shapes=shapes, events=events, verb=verb)
    indices, kind = sample_uniform(scene.frames, n_frames), "video"
    if sample.get("still"):
        indices, kind = [int(rng.choice([0, *(event.last for event in scene.events)]))], "image"
        turns = [(IMAGE_PROMPT, describe_frame(scene, indices[0]))]
    elif sample.get("events"):
        turns = [(VIDEO_PROMPT, describe(scene))]
    else:
        turns = _turns(scene, rng, n_frames)
    messages = []
    for question, answer in turns:
        messages += [_turn("user", question), _turn("assistant", answer)]
    frames = list(render_scene(scene, *size, indices))
    messages[0]["content"].insert(0, {"type": kind, kind: {"frames": frames if kind == "video" else frames[0]}})
    return {"messages": messages, "task": f"{kind}/QA"}


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _turns(scene: Scene, rng: np.random.Generator, n_frames: int) -> list[tuple[str, str]]:
    """Pairs of question and answer: a grounded description, or a plain one with questions before and after it.

    Descriptions have one wording only, since other wordings are noise to a small model. Answers after the description
    can be read from it; answers before it can only come from the frames.
    """
    kind = rng.random()
    if kind < _GROUNDED:
        return [(GROUNDED_PROMPT, describe_grounded(scene, n_frames))]
    choices = questions(scene, rng) if kind < _GROUNDED + _WITH_QUESTIONS else []
    order = rng.permutation(len(choices))[:_MAX_QUESTIONS].tolist()
    turns = [(choices[i].prompt(), choices[i].reply()) for i in order]
    turns.insert(int(rng.integers(len(turns) + 1)), (VIDEO_PROMPT, describe(scene)))
    return turns
