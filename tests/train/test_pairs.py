"""Preference pairs: which are kept, and that DPO takes them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import tarsier_jax
from eval.shapes.clips import HELD_OUT, draw_clips
from eval.shapes.describe import describe
from tarsier_jax.errors import InputError
from train.builtin import STAGES
from train.pairs import FIRST_SEED, main, parse, preferred
from train.tasks import prepare, split_preference
from train.untrained import TINY, write_untrained

EVENTS = ["The red circle moves to the left.", "The red circle jumps.", "The blue bar grows."]


def test_the_better_by_enough_is_preferred() -> None:
    whole, two, none = " ".join(EVENTS), " ".join(EVENTS[:2]), "The red circle grows."
    assert preferred(EVENTS, whole, none) and preferred(EVENTS, whole, two)  # dR 1 and 1/3, dP 1 and 0
    assert not preferred(EVENTS, whole, whole) and not preferred(EVENTS, two, whole)
    wordy = f"{whole} The blue bar jumps."  # more precision at the cost of recall, and the other way round
    assert not preferred(EVENTS, two, wordy) and not preferred(EVENTS, wordy, two)
    almost = " ".join([*EVENTS, *["The blue bar jumps."]])
    assert not preferred(EVENTS, whole, almost)  # dP is 1/4


def test_pairs_of_clean_and_disturbed_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that sees everything, and says only the first half of what is disturbed."""
    clips = list(draw_clips(FIRST_SEED, 4))
    asked: list[dict] = []

    def oracle(model: object, processor: object, samples: Sequence[dict], *_: object, **__: object) -> list[str]:
        asked.extend(samples)
        return [*(describe(clip.scene) for clip in clips), *("Nothing." for _ in clips)]

    monkeypatch.setattr(tarsier_jax, "generate", oracle)
    model = write_untrained(tmp_path / "model", TINY)
    out = tmp_path / "pairs"
    assert main(parse(["--model", str(model), "--output", str(out), "--clips", "4"])) == 0
    ways = [sample["messages"][0]["content"][0]["video"].get("disturb") for sample in asked]
    assert ways[:4] == [None] * 4 and all(way["kind"] for way in ways[4:])
    lines = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for clip, line in zip(clips, lines, strict=True):
        chosen, rejected = split_preference(line)
        assert chosen["messages"][1]["content"][0]["text"] == describe(clip.scene)
        assert prepare(rejected, np.random.default_rng(0))["messages"][1]["content"][0]["text"] == "Nothing."
        assert (out / line["messages"][0]["content"][0]["video"]["video_file"]).is_file()


def test_seeds_are_neither_trained_on_nor_held_out() -> None:
    assert sum(count for count, _ in STAGES) < FIRST_SEED < HELD_OUT


@pytest.mark.parametrize("flags", [["--clips", "0"], ["--seed", "-1"], ["--temperature", "0"]])
def test_bad_flags(tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(InputError, match="--clips has to be at least 1"):
        main(parse(["--model", "x", "--output", str(tmp_path), *flags]))
