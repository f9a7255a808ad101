"""What names stand for in a configuration: models and clips that are made on the spot, so that recipes need no files.

config.model: "random", a tiny model, or "untrained", the small model of configs/micro.py before training.
config.data.train: "random", a few rendered files, or "shapes", moving shapes from easy to hard.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from eval.shapes.annotations import ask
from eval.shapes.clips import HELD_OUT
from eval.shapes.describe import describe
from eval.shapes.render import render, write_clip
from eval.shapes.script import generate
from tarsier_jax.files import new_directory
from train.config import TrainConfig
from train.micro.checkpoint import MICRO, TINY, write_untrained
from train.micro.curriculum import Stage, write_seeds


def _clip(events: int | None = None, shapes: int | None = None, verb: str | None = None) -> dict[str, Any]:
    """Of moving shapes: so many events and shapes, one of the events of that verb; any where nothing is given."""
    line = {"events": events, "shapes": shapes, "verb": verb}
    return {name: value for name, value in line.items() if value is not None}


# Of moving shapes, from easy to hard: so many clips, and what `train.micro.curriculum` makes of them in turn.
# Stills stay to the end, or what is where is forgotten.
_STILL = {"still": True}
_HARD = [_clip(1, verb=verb) for verb in ("turn", "recolour", "collide")]
STAGES: tuple[Stage, ...] = (
    (16_000, (_STILL, _clip(1, 2), _STILL, _clip(1, 3))),
    (24_000, (_clip(1), _clip(1, 2), _clip(1, 3), _clip(2), _clip(2), _STILL)),
    (20_000, (_clip(1, 3), _clip(2), _clip(3), _clip(2, 3), _clip(), _STILL)),
    (16_000, (*[_clip()] * 6, _clip(1, 3), _STILL)),
    # Turns and new colours are seldom and hard to see, so they are practised once the rest is known.
    (14_000, (*[_clip(1, verb="turn")] * 3, _clip(1, 3))),
    (8_000, (*[_clip(1, verb="recolour")] * 2, _clip(1, verb="turn"), _clip(1, 3))),
    (200_000, (*[_clip()] * 6, *_HARD, _clip(1, 3), _STILL)),
)
_MODELS = {"random": TINY, "untrained": MICRO}
_RANDOM_CLIPS, _HELD_OUT_CLIPS = 8, 32


def with_builtin(config: TrainConfig, workdir: Path) -> TrainConfig:
    """The configuration with files in the workdir in place of names."""
    if config.model in _MODELS:
        write = functools.partial(write_untrained, sizes=_MODELS[config.model])
        config = dataclasses.replace(config, model=str(_once(workdir / f"{config.model}_model", write)))
    data = config.data
    if data.train == "random":
        directory = _once(workdir / "random_clips", write_clips)
        files = str(directory / "annotations.jsonl")
        data = dataclasses.replace(data, train=files, eval=files, media_root=str(directory))
    if data.train == "shapes":
        directory = _once(workdir / "shapes", _write_shapes)
        data = dataclasses.replace(data, train=str(directory / "train.jsonl"), eval=str(directory / "held_out.jsonl"))
    return dataclasses.replace(config, data=data)


def _write_shapes(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_seeds(directory / "train.jsonl", STAGES)
    write_seeds(directory / "held_out.jsonl", [(_HELD_OUT_CLIPS, [_clip()])], first=HELD_OUT)


def write_clips(directory: Path) -> Path:
    """A few GIFs of several sizes and lengths, with an answer and a worse one each; gives their annotations."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(_RANDOM_CLIPS):
        frames, height, width = 16 + 4 * i, 96 + 16 * (i % 3), 128 + 32 * (i % 2)
        scene = generate(np.random.default_rng(i), frames, aspect=width / height)
        write_clip(directory / f"{i}.gif", render(scene, height, width))
        answer = {"type": "text", "text": describe(scene)}
        worse = "A blue square crosses a red disc." if i % 2 else "Nothing happens."
        answer |= {"chosen": answer["text"], "rejected": worse}
        messages = [ask({"video_file": f"{i}.gif"}), {"role": "assistant", "content": [answer]}]
        lines.append(json.dumps({"messages": messages, "task": "video/caption", "idx": i}))
    annotations = directory / "annotations.jsonl"
    annotations.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return annotations


def _once(directory: Path, write: Callable[[Path], object]) -> Path:
    """Process 0 writes, and renames when all is there; the others wait."""
    if jax.process_index() == 0 and not directory.exists():
        with new_directory(directory, 0) as partial:
            write(partial)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(str(directory))
    return directory
