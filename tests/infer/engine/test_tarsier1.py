"""The first Tarsier in the engine: golden answers, those of one by one, and nothing compiled after the start."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import tarsier_jax
from infer.engine import Completion, Engine, Frontend, fit_config
from tarsier_jax.api import answer
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.batch import Buckets, Example
from tarsier_jax.processing.processor import Processor
from tarsier_jax.programs import Compilations
from tests.processing.test_tarsier1 import rows_of, run
from tests.tarsier1 import GOLDENS, read_cases, write_checkpoint

TOKENS = 32
ModelAndProcessor = tuple[Tarsier, Processor]


@pytest.fixture(scope="module")
def tarsier1(tmp_path_factory: pytest.TempPathFactory) -> ModelAndProcessor:
    return load(tmp_path_factory.mktemp("tarsier1"), "t56-gqa")


@pytest.fixture(scope="module")
def engine(tarsier1: ModelAndProcessor) -> Engine:
    """It has fewer slots than the tests have prompts, and its rows contain several prompts."""
    return Engine(*tarsier1, fit_config(tarsier1[1], slots=4, new_tokens=TOKENS))


def load(directory: Path, name: str, **options: Any) -> ModelAndProcessor:
    """Loads a golden checkpoint. Batches of one example have one shape, so that few programs are compiled."""
    model, processor = tarsier_jax.load(write_checkpoint(directory, name), **options)
    patches, tokens = processor.buckets.patches, fit_config(processor, 1, 1).prompt_tokens
    return model, dataclasses.replace(processor, buckets=Buckets(patches, (8,), (tokens,)))


def golden_cases(name: str) -> dict[str, dict[str, Any]]:
    """Returns the cases of one prompt with a greedy answer, whose pictures are in the repository."""
    cases = {key: case for key, case in read_cases(name).items() if len(case.get("greedy_tokens", ())) == 1}
    return {key: case for key, case in cases.items() if _has_pictures(case)}


def _has_pictures(case: dict[str, Any]) -> bool:
    files = [file for row in rows_of(case) for file, _ in row.get("files") or [[row.get("file"), 0]]]
    names = [name for file in files if file for name in (file if isinstance(file, list) else [file])]
    return all((GOLDENS / "media" / name).exists() for name in names)


def examples_of(processor: Processor, name: str) -> dict[str, Example]:
    """Returns the prompts of `golden_cases`."""
    return {key: run(processor, read_cases(name), case, rows_of(case)[0]) for key, case in golden_cases(name).items()}


def check_answers(engine: Engine, name: str) -> None:
    """Compares the answers with the original's, whose margins are larger than the tolerance."""
    cases, examples = golden_cases(name), examples_of(engine.processor, name)
    limits = {key: options_of(case) for key, case in cases.items()}
    with Compilations() as compilations, Frontend(engine, prepare=lambda example: example) as frontend:
        submissions = {key: frontend.submit(examples[key], limits[key]) for key in cases}
        results = {key: submission.result() for key, submission in submissions.items()}
    assert compilations.count == 0
    for key, result in results.items():
        assert isinstance(result, Completion)
        (tokens,), (text,) = cases[key]["greedy_tokens"], cases[key]["greedy_text"]
        ends = [tokens.index(id_) for id_ in engine.processor.eos_token_ids if id_ in tokens]
        assert (result.tokens, result.text) == (tokens[: min(ends, default=len(tokens))], text.strip())
        assert result.finish_reason == ("eos" if ends else "length")


def options_of(case: dict[str, Any]) -> SamplingOptions:
    return SamplingOptions(case.get("max_new_tokens", TOKENS))


def test_answers_are_the_originals(engine: Engine) -> None:
    check_answers(engine, "t56-gqa")


def test_answers_of_one_by_one_are_the_originals_too(tarsier1: ModelAndProcessor) -> None:
    """So the engine's equal them."""
    for key, example in examples_of(tarsier1[1], "t56-gqa").items():
        case = golden_cases("t56-gqa")[key]
        (result,) = answer(*tarsier1, [example], options_of(case))
        assert result.text == case["greedy_text"][0].strip()


def test_answers_are_streamed(engine: Engine) -> None:
    """The answer does not contain a byte token before an invalid one, which would change the character of the first."""
    with Frontend(engine, prepare=lambda example: example) as frontend:
        example = examples_of(engine.processor, "t56-gqa")["image"]
        pieces = list(frontend.submit(example, SamplingOptions(TOKENS), stream=True).stream())
    assert "".join(pieces) == golden_cases("t56-gqa")["image"]["greedy_text"][0] and len(pieces) > 1


@pytest.mark.slow
def test_frames_of_601_tokens(tmp_path: Path) -> None:
    """Prompts of one and of five frames in rows of 5,120 tokens."""
    model, processor = load(tmp_path, "t336-mha")
    config = fit_config(processor, slots=2, new_tokens=TOKENS)
    assert config.prompt_tokens == 5120 and config.buckets[0].bins >= 8
    check_answers(Engine(model, processor, config), "t336-mha")


@pytest.mark.slow
def test_int8(tmp_path: Path) -> None:
    """The engine's answers are those of one by one."""
    model, processor = load(tmp_path, "t56-gqa", int8=True)
    examples, options = examples_of(processor, "t56-gqa"), SamplingOptions(TOKENS)
    engine = Engine(model, processor, fit_config(processor, slots=4, new_tokens=TOKENS))
    with Frontend(engine, prepare=lambda example: example) as frontend:
        results = dict(frontend.answer_all(enumerate(examples.values()), options))
    for i, example in enumerate(examples.values()):
        (alone,) = answer(model, processor, [example], options)
        result = results[i]
        assert isinstance(result, Completion) and result.tokens == alone.tokens
