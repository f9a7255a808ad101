"""The curriculum of moving shapes: how many clips of which kind, from easy to hard."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.shapes.clips import HELD_OUT

_HELD_OUT_CLIPS = 32
# Number of clips of a stage, and the keys of its lines besides the seed (see `train.micro.samples`), in turn.
Stage = tuple[int, Sequence[Mapping[str, Any]]]


def _clip(events: int | None = None, shapes: int | None = None, verb: str | None = None) -> dict[str, Any]:
    """Keys of a line: the numbers of events and shapes and the verb of one event, each drawn where it is None."""
    line = {"events": events, "shapes": shapes, "verb": verb}
    return {name: value for name, value in line.items() if value is not None}


# Stills come back in the last stage, or the model forgets the positions of shapes.
_STILL = {"still": True}
_HARD = [_clip(1, verb=verb) for verb in ("turn", "recolour", "collide")]
STAGES: tuple[Stage, ...] = (
    (16_000, (_STILL, _clip(1, 2), _STILL, _clip(1, 3))),
    (24_000, (_clip(1), _clip(1, 2), _clip(1, 3), _clip(2), _clip(2), _STILL)),
    (20_000, (_clip(1, 3), _clip(2), _clip(3), _clip(2, 3), _clip(), _STILL)),
    (16_000, (*[_clip()] * 6, _clip(1, 3), _STILL)),
    # Turns and changes of colour are rare and hard to see. The model practises them after the rest.
    (14_000, (*[_clip(1, verb="turn")] * 3, _clip(1, 3))),
    (8_000, (*[_clip(1, verb="recolour")] * 2, _clip(1, verb="turn"), _clip(1, 3))),
    (200_000, (*[_clip()] * 6, *_HARD, _clip(1, 3), _STILL)),
)


def write_shapes(directory: Path) -> None:
    """Writes train.jsonl, the seeds of all stages, and held_out.jsonl."""
    directory.mkdir(parents=True, exist_ok=True)
    write_seeds(directory / "train.jsonl", STAGES)
    write_seeds(directory / "held_out.jsonl", [(_HELD_OUT_CLIPS, [_clip()])], first=HELD_OUT)


def write_seeds(path: Path, stages: Sequence[Stage], first: int = 0) -> Path:
    """Writes the lines of a curriculum, with the seeds `first`, `first` + 1, ..."""
    seeds = itertools.count(first)
    with path.open("w", encoding="utf-8") as file:
        for count, lines in stages:
            for seed, line in zip(itertools.islice(seeds, count), itertools.cycle(lines)):
                file.write(json.dumps({"task": "moving_shapes", "seed": seed, "idx": seed, **line}) + "\n")
    return path
