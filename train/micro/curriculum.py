"""Moving shapes as training data: a line of annotations is a seed, and its clip is drawn when it is loaded.

A seed stands for a clip and for what is asked about it: a description, a description grounded in frames, or questions.
So a file of seeds is as many fresh clips as it has lines.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.shapes.annotations import GROUNDED_PROMPT, IMAGE_PROMPT, PROMPT
from eval.shapes.clips import draw_scene
from eval.shapes.describe import describe, describe_frame, describe_grounded
from eval.shapes.questions import questions
from eval.shapes.render import render
from eval.shapes.world import Scene
from tarsier_jax.errors import InputError
from tarsier_jax.processing.frame_sampling import sample_uniform

_QUESTIONS = 2  # of a clip, in turns of one conversation
_GROUNDED, _ASKED = 0.05, 0.45  # how many of any clips are grounded, and how many have questions

# Of a curriculum: so many clips, and what their lines say in turn beside the seed.
Stage = tuple[int, Sequence[Mapping[str, Any]]]


def write_seeds(path: Path, stages: Sequence[Stage], first: int = 0) -> Path:
    """Lines for the stages of a curriculum: see `moving_shapes`."""
    seeds = itertools.count(first)
    with path.open("w", encoding="utf-8") as file:
        for count, lines in stages:
            for seed, line in zip(itertools.islice(seeds, count), itertools.cycle(lines)):
                file.write(json.dumps({"task": "moving_shapes", "seed": seed, "idx": seed, **line}) + "\n")
    return path


def moving_shapes(sample: Mapping[str, Any], rng: np.random.Generator, n_frames: int) -> dict[str, Any]:
    """The chat sample of a line, from whose seed all is drawn; `rng` is not used.

    With "still" it is about a single frame; with "events": n, a description of a clip of n events; else it is of any
    clip, described, or described with the frames of each event, some with questions about it. "shapes" is how many
    there are, "verb" what the first event is, or the last where the clip is played backwards.

    Raises:
        InputError: the line has no seed.
    """
    seed = sample.get("seed")
    if not isinstance(seed, int) or seed < 0:
        raise InputError(f"A moving_shapes line needs a seed, a whole number from 0 on, not {seed!r}.")
    rng = np.random.default_rng(seed)
    shapes, events, verb = (sample.get(name) for name in ("shapes", "events", "verb"))
    scene, size = draw_scene(rng, shapes=shapes, events=events, verb=verb)
    indices, kind = sample_uniform(scene.frames, n_frames), "video"
    if sample.get("still"):
        indices, kind = [int(rng.choice([0, *(event.last for event in scene.events)]))], "image"
        turns = [(IMAGE_PROMPT, describe_frame(scene, indices[0]))]
    elif sample.get("events"):
        turns = [(PROMPT, describe(scene))]
    else:
        turns = _turns(scene, rng, n_frames)
    messages = []
    for question, answer in turns:
        messages += [_turn("user", question), _turn("assistant", answer)]
    frames = list(render(scene, *size, indices))
    messages[0]["content"].insert(0, {"type": kind, kind: {"frames": frames if kind == "video" else frames[0]}})
    return {"messages": messages, "task": f"{kind}/QA"}


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _turns(scene: Scene, rng: np.random.Generator, n_frames: int) -> list[tuple[str, str]]:
    """Questions and answers: a grounded description, or a plain one, with questions before and after it for some clips.

    Descriptions are worded in one way only: that a thing could be said in another is noise to a small model. Answers
    that come after the description can be read off it, those before it have to be seen.
    """
    kind = rng.random()
    if kind < _GROUNDED:
        return [(GROUNDED_PROMPT, describe_grounded(scene, n_frames))]
    asked = questions(scene, rng) if kind < _GROUNDED + _ASKED else []
    order = rng.permutation(len(asked))[:_QUESTIONS].tolist()
    turns = [(asked[i].prompt(), asked[i].reply()) for i in order]
    turns.insert(int(rng.integers(len(turns) + 1)), (PROMPT, describe(scene)))
    return turns
