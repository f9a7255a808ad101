"""Preference pairs: which are kept, and that DPO takes them."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

import tarsier_jax
from eval.shapes.clips import HELD_OUT, draw_clips
from eval.shapes.describe import describe
from infer.engine import Completion, Engine, fit_config
from tarsier_jax.errors import InputError
from tarsier_jax.files import locked
from tarsier_jax.processing.perturb import PERTURBATIONS
from train.data.samples import prepare, split_preference
from train.debug_data import TINY
from train.micro import preference_pairs
from train.micro.checkpoint import MICRO
from train.micro.curriculum import STAGES
from train.micro.preference_pairs import FIRST_SEED, preferred
from train.untrained import write_untrained

EVENTS = ["The red circle moves to the left.", "The red circle jumps.", "The blue bar grows."]


def test_the_better_by_enough_is_preferred() -> None:
    whole, two, none = " ".join(EVENTS), " ".join(EVENTS[:2]), "The red circle grows."
    assert preferred(EVENTS, whole, none) and preferred(EVENTS, whole, two)  # dR 1 and 1/3, dP 1 and 0
    assert not preferred(EVENTS, whole, whole) and not preferred(EVENTS, two, whole)
    wordy = f"{whole} The blue bar jumps."  # more precision at the cost of recall, and the other way round
    assert not preferred(EVENTS, two, wordy) and not preferred(EVENTS, wordy, two)
    almost = " ".join([*EVENTS, *["The blue bar jumps."]])
    assert not preferred(EVENTS, whole, almost)  # dP is 1/4


class Oracle:
    """A front-end that describes a clip correctly, and says "Nothing." of a perturbed one."""

    def __init__(self, *_: object):
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def answer_all(self, numbered_samples: Iterable[tuple[int, Any]], _: object) -> Iterator[tuple[int, Completion]]:
        for number, sample in sorted(numbered_samples, key=lambda pair: pair[0] % 2):  # answers of a clip are far apart
            perturbation = sample["messages"][0]["content"][0]["video"].get("disturb")
            assert (perturbation is not None and perturbation["kind"] in PERTURBATIONS) == number % 2
            (clip,) = draw_clips(number // 2, 1)
            request: Any = None
            yield number, Completion(request, "Nothing." if perturbation else describe(clip.scene), [], "eos", 0.0)


def test_pairs_of_clean_and_disturbed_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preference_pairs, "Engine", lambda *_: None)
    monkeypatch.setattr(preference_pairs, "Frontend", Oracle)
    model = write_untrained(tmp_path / "model", TINY)
    out = tmp_path / "pairs"
    assert (
        preference_pairs.main(preference_pairs.parse(["--model", str(model), "--output", str(out), "--clips", "4"]))
        == 0
    )
    lines = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        (clip,) = draw_clips(line["idx"], 1)
        chosen, rejected = split_preference(line)
        assert chosen["messages"][1]["content"][0]["text"] == describe(clip.scene)
        assert prepare(rejected, np.random.default_rng(0))["messages"][1]["content"][0]["text"] == "Nothing."
        assert (out / line["messages"][0]["content"][0]["video"]["video_file"]).is_file()


@pytest.mark.slow
def test_they_are_sampled(tmp_path: Path) -> None:
    """By the engine: another description of each clip, the same ones in every run."""
    model, processor = tarsier_jax.load(write_untrained(tmp_path / "model", MICRO))
    engine = Engine(model, processor, fit_config(processor, 4, 96))

    def told() -> list[tuple[int, str, str]]:
        return sorted(
            (number, clean, disturbed) for number, _, clean, disturbed in preference_pairs.described(engine, 0, 2, 1.0)
        )

    assert told() == told() and len({text for _, *both in told() for text in both}) == 4


def test_seeds_are_neither_trained_on_nor_held_out() -> None:
    assert sum(count for count, _ in STAGES) < FIRST_SEED < HELD_OUT


@pytest.mark.parametrize("flags", [["--clips", "0"], ["--seed", "-1"], ["--temperature", "0"]])
def test_bad_flags(tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(InputError, match="--clips must be at least 1"):
        preference_pairs.main(preference_pairs.parse(["--model", "x", "--output", str(tmp_path), *flags]))


def test_a_second_run_into_one_directory_is_refused(tmp_path: Path) -> None:
    """Before the model is loaded."""
    with locked(tmp_path, inside=True), pytest.raises(InputError, match=f"Another run is writing {tmp_path}"):
        preference_pairs.main(
            preference_pairs.parse(["--model", "/no/model", "--output", str(tmp_path), "--clips", "1"])
        )
