"""The embedded model: small, learned, and the same model to Hugging Face."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import tarsier_jax
from convert.backends import load_reference
from eval.answers import Engines
from eval.benchmarks import Benchmark
from eval.benchmarks.shapes import SHAPES_QA, question_samples
from eval.evaluation import BenchmarkInput, evaluate
from eval.predictions import AnnotatedSample
from eval.shapes.annotations import user_turn
from eval.shapes.clips import HELD_OUT, ShapeClip, draw_clips
from eval.shapes.describe import event_sentences
from eval.shapes.judge import corpus_scores
from infer.engine import Completion, Engine, Frontend, fit_config
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.video import open_clip
from tarsier_jax.weights import EMBEDDED, EMBEDDED_CLIP, convert_to_hf, resolve
from tarsier_jax.weights.streaming import convert_hf

pytestmark = pytest.mark.slow

CLIPS, SLOTS, TOKENS = 50, 16, 96


class OneEngine(Engines):
    """The same engine for every benchmark."""

    def __init__(self, engine: Engine):
        self._one = engine

    def fit(self, benchmark: Benchmark, rows: Sequence[AnnotatedSample]) -> Engine:
        return self._one


@pytest.fixture(scope="module")
def clips() -> list[ShapeClip]:
    return list(draw_clips(HELD_OUT + 10**6, CLIPS))


def question(clip: ShapeClip) -> dict[str, Any]:
    return {"messages": [user_turn(clip.video)]}


@pytest.fixture(scope="module")
def engine() -> Engine:
    model, processor = tarsier_jax.load(EMBEDDED)
    return Engine(model, processor, fit_config(processor, SLOTS, TOKENS))


@pytest.fixture(scope="module")
def captions(engine: Engine, clips: list[ShapeClip]) -> list[str]:
    """Ours, by the engine."""
    with Frontend(engine) as frontend:
        results = dict(frontend.answer_all(enumerate(map(question, clips)), SamplingOptions(TOKENS)))
    return [result.text for _, result in sorted(results.items()) if isinstance(result, Completion)]


def reference_captions(directory: Path, clips: list[ShapeClip]) -> list[str]:
    """Those of transformers, one by one."""
    model, processor = tarsier_jax.load(directory)
    theirs = load_reference(directory, model.config, processor.eos_token_ids)
    examples: list[Example] = [processor(question(clip)) for clip in clips]
    return [processor.decode(theirs.answer(example, TOKENS)) for example in examples]


def test_it_describes_clips_it_has_not_seen(clips: list[ShapeClip], captions: list[str]) -> None:
    assert corpus_scores(captions, [event_sentences(clip.scene) for clip in clips])["f1"] > 0.7


def test_it_answers_questions_better_than_by_guessing(engine: Engine, tmp_path: Path) -> None:
    """One option of four is right; the model card states 0.46 of 300."""
    samples = functools.partial(question_samples, HELD_OUT + 10**6, 100)
    source = BenchmarkInput.load(dataclasses.replace(SHAPES_QA, annotations=samples))
    assert evaluate(OneEngine(engine), source, tmp_path).figures["Accuracy"] > 35


def test_transformers_says_the_same(clips: list[ShapeClip], captions: list[str]) -> None:
    assert reference_captions(resolve(EMBEDDED), clips) == captions


def test_so_it_does_after_a_round_trip(tmp_path: Path, clips: list[ShapeClip], captions: list[str]) -> None:
    convert_hf(resolve(EMBEDDED), tmp_path / "orbax")
    convert_to_hf(tmp_path / "orbax", tmp_path / "hf")
    assert reference_captions(tmp_path / "hf", clips) == captions


def test_it_is_small() -> None:
    files = [*resolve(EMBEDDED).rglob("*"), EMBEDDED_CLIP]
    assert sum(file.stat().st_size for file in files) < 8 * 2**20
    assert open_clip(EMBEDDED_CLIP).length >= 16
