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
from eval.shapes.clips import cut, draw_scene
from eval.shapes.describe import describe, describe_frame, describe_grounded
from eval.shapes.questions import questions
from eval.shapes.render import render
from eval.shapes.world import Scene, crop
from tarsier_jax.errors import InputError
from tarsier_jax.processing.sampling import sample_uniform

_QUESTIONS = 2  # of a clip, in turns of one conversation


def write_seeds(path: Path, stages: Sequence[tuple[int, Mapping[str, Any]]], first: int = 0) -> Path:
    """Lines for the stages of a curriculum, (clips, what their lines say beside the seed): see `moving_shapes`."""
    seeds = itertools.count(first)
    with path.open("w") as file:
        for count, line in stages:
            for seed in itertools.islice(seeds, count):
                file.write(json.dumps({"task": "moving_shapes", "seed": seed, "idx": seed, **line}) + "\n")
    return path


def moving_shapes(sample: Mapping[str, Any], rng: np.random.Generator, n_frames: int) -> dict[str, Any]:
    """The chat sample of a line, from whose seed all is drawn; `rng` is not used.

    With "still" it is about a single frame, with "key_frames" about the first, middle and last frame of one event; both
    of "shapes" shapes, or of one to three. With "events": n it is a description of that many events, cut out of a
    longer clip, with the frames between; else of a whole clip, or grounded in its frames, or questions.

    Raises:
        InputError: the line has no seed.
    """
    seed = sample.get("seed")
    if not isinstance(seed, int) or seed < 0:
        raise InputError(f"A moving_shapes line needs a seed, a whole number from 0 on, not {seed!r}.")
    rng = np.random.default_rng(seed)
    scene, size = draw_scene(rng, shapes=sample.get("shapes"))
    indices, kind = sample_uniform(scene.frames, n_frames), "video"
    if sample.get("still"):
        indices, kind = [int(rng.choice([e.last for e in scene.events]))], "image"
        turns = [(IMAGE_PROMPT, describe_frame(scene, indices[0]))]
    elif sample.get("key_frames"):
        event = scene.events[int(rng.integers(len(scene.events)))]
        scene = crop(scene, event.first, event.last)
        indices = [0, (scene.frames - 1) // 2, scene.frames - 1]
        turns = [(PROMPT, describe(scene))]
    elif events := sample.get("events"):
        scene, size = draw_scene(rng, events=int(rng.integers(max(4, events), 6)))
        scene, indices = cut(rng, scene, sample_uniform(scene.frames, n_frames), events)
        turns = [(PROMPT, _description(scene, rng))]
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
    """Questions and answers: a grounded description, a plain one, or choices."""
    kind = rng.random()
    if kind < 0.25:
        return [(GROUNDED_PROMPT, describe_grounded(scene, n_frames, rng))]
    if kind < 0.65:
        return [(PROMPT, _description(scene, rng))]
    asked = questions(scene, rng)
    order = rng.permutation(len(asked))[:_QUESTIONS].tolist()
    return [(asked[i].prompt(), f" Answer: ({asked[i].answer}") for i in order]


def _description(scene: Scene, rng: np.random.Generator) -> str:
    """Mostly plain: every way to say a thing that could be another is noise to a small model."""
    return describe(scene, rng if rng.random() < 0.15 else None)
