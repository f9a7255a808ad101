"""The scores of `eval.micro`, given by an oracle, and by a model that knows nothing."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from eval import micro
from eval.shapes.clips import HELD_OUT
from eval.shapes.describe import describe
from eval.shapes.questions import questions
from tarsier_jax.errors import InputError
from train.micro.checkpoint import MICRO
from train.micro.curriculum import STAGES
from train.untrained import write_untrained


class Oracle:
    """Answers in place of a model: it knows in which order the clips come."""

    def __init__(self, answers: Sequence[str]):
        self.answers = list(answers)

    def __call__(self, engine: object, samples: Iterable[dict], max_new_tokens: int, name: str) -> list[str]:
        return [self.answers.pop(0) for _ in samples]


@pytest.fixture
def clips() -> list[micro.ShapeClip]:
    return list(micro.draw_clips(5, 25))


def scorer(monkeypatch: pytest.MonkeyPatch, answers: Sequence[str]) -> micro.Scorer:
    monkeypatch.setattr(micro, "answer_samples", Oracle(answers))
    return micro.Scorer(None)  # type: ignore[arg-type]


def test_full_marks(monkeypatch: pytest.MonkeyPatch, clips: list[micro.ShapeClip]) -> None:
    oracle = scorer(monkeypatch, [describe(clip.scene) for clip in clips])
    assert oracle.describe("all", clips) == {"recall": 1, "precision": 1, "f1": 1}


def test_backwards_is_another_story(monkeypatch: pytest.MonkeyPatch, clips: list[micro.ShapeClip]) -> None:
    turned = [micro.backwards(clip) for clip in clips]
    np.testing.assert_array_equal(turned[0].video["frames"][0], clips[0].video["frames"][-1])
    assert scorer(monkeypatch, [describe(c.scene) for c in turned]).describe("", turned)["f1"] == 1
    assert scorer(monkeypatch, [describe(c.scene) for c in clips]).describe("", turned)["f1"] < 0.5


def test_questions(monkeypatch: pytest.MonkeyPatch, clips: list[micro.ShapeClip]) -> None:
    letters = []
    for i, clip in enumerate(clips):
        rng = np.random.default_rng(9 + i)
        asked = questions(clip.scene, rng)
        letters.append(asked[rng.integers(len(asked))].answer)
    counted = scorer(monkeypatch, letters).choose(clips, 9)
    assert sum(n for n, _ in counted.values()) == 25 and all(n == right for n, right in counted.values())
    wrong = scorer(monkeypatch, ["ABCD"[("ABCD".index(letter) + 1) % 4] for letter in letters]).choose(clips, 9)
    assert all(right == 0 for _, right in wrong.values())


def test_what_is_shown(clips: list[micro.ShapeClip], tmp_path: Path) -> None:
    clip = clips[0]
    frames = clip.video["frames"]
    assert micro.one_frame(clip).video["frames"].shape == (1, *frames.shape[1:])
    mixed = micro.shuffled(clip).video["frames"]
    assert mixed.shape == frames.shape and not np.array_equal(mixed, frames)
    assert sorted(f.tobytes() for f in mixed) == sorted(f.tobytes() for f in frames)
    path = Path(micro.as_file(clip, tmp_path / "0.mp4").video["video_file"])
    assert path.stat().st_size > 1000
    sizes = {c.video["frames"].shape[1:3] for c in micro.draw_clips(5, 25, other=True)}
    assert not sizes & {c.video["frames"].shape[1:3] for c in clips}


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows nothing scores nothing in descriptions."""
    model = write_untrained(tmp_path / "model", MICRO)
    flags = ["--model", str(model), "--clips", "2", "--json", str(tmp_path / "scores.json")]
    assert micro.main(micro.parse(flags)) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == len(scores) >= 8
    assert {value for name, value in scores.items() if name.startswith("F1")} == {0.0}
    assert "held-out clips: 2" in err


@pytest.mark.parametrize("flags", [["--clips", "0"], ["--seed", "-1"]])
def test_bad_flags(flags: list[str]) -> None:
    with pytest.raises(InputError, match="has to be at least 1"):
        micro.main(micro.parse(["--model", "x", *flags]))


def test_training_never_sees_these_seeds() -> None:
    assert micro.parse(["--model", "x"]).seed == HELD_OUT > sum(count for count, _ in STAGES)
