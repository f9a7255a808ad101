"""Many callers share one engine; each receives its own answers, and none waits forever."""

import dataclasses
import queue
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import tarsier_jax
from infer.engine import Completion, Engine, EngineError, Frontend, RequestError, fit_config
from infer.engine.frontend import TextDeltas, stable_text
from tarsier_jax.api import answer
from tarsier_jax.errors import InputError
from tarsier_jax.generation.sampling import SamplingOptions
from tests.infer.conftest import TWO_LAYERS
from train.untrained import write_untrained

OPTIONS = SamplingOptions(24)
QUESTIONS = [{"messages": [{"role": "user", "content": f"What comes after {'one ' * n}?"}]} for n in range(1, 9)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Its answers end at their limits only: no token is -1."""
    model, processor = tarsier_jax.load(write_untrained(tmp_path_factory.mktemp("model") / "untrained", TWO_LAYERS))
    processor = dataclasses.replace(processor, eos_token_ids=(-1,))
    config = fit_config(processor, 4, OPTIONS.max_new_tokens)
    return Engine(model, processor, dataclasses.replace(config, buckets=config.buckets[:1]))


@pytest.fixture
def frontend(engine: Engine) -> Iterator[Frontend]:
    with Frontend(engine) as frontend:
        yield frontend


def expected_answers(engine: Engine, options: SamplingOptions = OPTIONS) -> list[tuple[str, list[int]]]:
    examples = [engine.processor(question) for question in QUESTIONS]
    answers = [answer(engine.model, engine.processor, [example], options)[0] for example in examples]
    return [(a.text, a.tokens) for a in answers]


class StuckEngine:
    """Has one slot, and fails or answers after `resume` is set."""

    processor: Any = SimpleNamespace(decode=str)
    config = SimpleNamespace(slots=1)

    def __init__(self, error: Exception | None = None):
        self.resume, self.error = threading.Event(), error

    def run(self, requests: Any) -> Iterator[Any]:
        assert self.resume.wait(60)
        if self.error:
            raise self.error
        for request in requests:
            is_error = isinstance(request, RequestError)
            yield request if is_error else Completion(request, "text", [], "eos", 0.0)


def prepare(sample: str) -> Any:
    return SimpleNamespace(name=sample)


def test_answers_are_those_of_one_by_one(engine: Engine, frontend: Frontend) -> None:
    """From several threads at once, each with samples of its own and the same numbers."""
    results: list[dict[int, Any]] = [{}, {}]

    def ask(part: int) -> None:
        results[part] = dict(frontend.answer_all(enumerate(QUESTIONS[part::2]), OPTIONS))

    threads = [threading.Thread(target=ask, args=(part,)) for part in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = expected_answers(engine)
    for part in range(2):
        assert [(results[part][i].text, results[part][i].tokens) for i in range(4)] == expected[part::2]


def test_sample_n_is_generated_with_seed_plus_n(engine: Engine, frontend: Frontend) -> None:
    options = dataclasses.replace(OPTIONS, temperature=1.0, seed=7)
    results = dict(frontend.answer_all([(i, QUESTIONS[0]) for i in (0, 5)], options))
    example = engine.processor(QUESTIONS[0])
    for number, result in results.items():
        (alone,) = answer(engine.model, engine.processor, [example], dataclasses.replace(options, seed=7 + number))
        assert isinstance(result, Completion) and result.tokens == alone.tokens
    assert results[0] != results[5]


def test_text_is_streamed(engine: Engine, frontend: Frontend) -> None:
    submissions = [frontend.submit(question, OPTIONS, stream=True) for question in QUESTIONS[:2]]
    for submission, (text, _) in zip(submissions, expected_answers(engine), strict=False):
        pieces = list(submission.stream())
        assert "".join(pieces) == text and len(pieces) > 1
    with pytest.raises(ValueError, match="stream=True"):
        next(frontend.submit(QUESTIONS[0], OPTIONS).stream())


def test_tokens_are_passed_on(engine: Engine, frontend: Frontend) -> None:
    """To a function of the caller. The deltas of their text are the text."""
    pieces: list[str] = []
    deltas = TextDeltas(engine.processor.decode, OPTIONS)
    submission = frontend.submit(QUESTIONS[0], OPTIONS, on_tokens=lambda tokens: pieces.append(deltas.add(tokens)))
    result = submission.result(60)
    assert isinstance(result, Completion)
    assert "".join(pieces) + deltas.end(result.text) == result.text and len(pieces) > 1


def test_a_stop_string_is_never_streamed(engine: Engine, frontend: Frontend) -> None:
    (text, tokens), *_ = expected_answers(engine)
    stop = engine.processor.decode(tokens[8:11])
    options = dataclasses.replace(OPTIONS, stop=(stop,))
    submission = frontend.submit(QUESTIONS[0], options, stream=True)
    assert "".join(submission.stream()) == text[: text.index(stop)].strip()
    result = submission.result()
    assert isinstance(result, Completion) and result.finish_reason == "stop"


def test_text_that_later_tokens_do_not_change() -> None:
    options = SamplingOptions(stop=("END", "NOW"))
    assert stable_text("a caf\ufffd", options) == "a caf"
    assert stable_text("a ball EN", options) == "a ball"
    assert stable_text("a ball ENTERS", options) == "a ball ENTERS"
    assert stable_text("a ball END and", options) == "a ball"
    assert stable_text("a ball E", SamplingOptions()) == "a ball E"


def test_cancelled(engine: Engine, frontend: Frontend) -> None:
    submission = frontend.submit(QUESTIONS[0], OPTIONS, stream=True)
    pieces = submission.stream()
    next(pieces)
    submission.cancel()
    result = submission.result(60)
    assert isinstance(result, Completion) and result.finish_reason == "cancelled"
    assert 0 < len(result.tokens) < OPTIONS.max_new_tokens
    others = dict(frontend.answer_all(enumerate(QUESTIONS), OPTIONS))
    assert [others[i].tokens for i in range(len(QUESTIONS))] == [tokens for _, tokens in expected_answers(engine)]


def test_a_future_is_not_cancelled(engine: Engine, frontend: Frontend) -> None:
    """asyncio cancels the futures that it waits for; the engine still sets the result, and answers others."""
    submission = frontend.submit(QUESTIONS[0], OPTIONS)
    assert not submission.future.cancel()
    assert isinstance(submission.result(60), Completion)
    assert isinstance(frontend.submit(QUESTIONS[1], OPTIONS).result(60), Completion)


def test_errors_are_values(engine: Engine, frontend: Frontend) -> None:
    broken = {"messages": [{"role": "user", "content": [{"type": "video", "video": {"video_file": "absent.mp4"}}]}]}
    results = dict(frontend.answer_all(enumerate([broken, QUESTIONS[0]]), OPTIONS))
    assert isinstance(results[0], RequestError) and "absent.mp4" in results[0].reason
    assert isinstance(results[1], Completion)
    too_long = frontend.submit(QUESTIONS[0], SamplingOptions(25), stream=True)
    with pytest.raises(InputError, match="the answer may have 25"):
        list(too_long.stream())


def test_the_number_of_waiting_samples() -> None:
    engine: Any = StuckEngine()
    with Frontend(engine, 1, prepare, waiting=1) as frontend:
        submissions = [frontend.submit("a", block=False) for _ in range(2)]
        with pytest.raises(queue.Full):
            frontend.submit("a", block=False)
        assert frontend.num_pending == frontend.capacity == 2
        engine.resume.set()
        assert all(isinstance(submission.result(60), Completion) for submission in submissions)
        assert frontend.num_pending == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_the_number_of_samples_in_progress_is_bounded(workers: int) -> None:
    engine: Any = StuckEngine()
    with Frontend(engine, workers, prepare) as frontend:
        submissions = [frontend.submit("a", block=False) for _ in range(3)]
        with pytest.raises(queue.Full):
            frontend.submit("a", block=False)
        drawn: list[int] = []
        results = frontend.answer_all(((drawn.append(i) or i, "a") for i in range(10)), OPTIONS)
        engine.resume.set()
        assert sorted(number for number, _ in results) == list(range(10)) == drawn
        assert all(isinstance(submission.result(60), Completion) for submission in submissions)


def test_a_failure_of_the_engine_is_raised_in_every_waiting_thread() -> None:
    """In those that wait for a result, stream, iterate, or wait for a place; and in every later call."""
    engine: Any = StuckEngine(RuntimeError("RESOURCE_EXHAUSTED"))
    frontend = Frontend(engine, 1, prepare)
    submissions = [frontend.submit(name, stream=True) for name in "ab"]
    calls = [
        submissions[0].result,
        lambda: list(submissions[1].stream()),
        lambda: list(frontend.answer_all(enumerate("cde"), OPTIONS)),
        lambda: [frontend.submit("f") for _ in range(4)],
    ]
    errors: list[BaseException] = []

    def call(function: Any) -> None:
        with pytest.raises(EngineError, match="RESOURCE_EXHAUSTED") as error:
            function()
        errors.append(error.value)

    threads = [threading.Thread(target=call, args=(function,)) for function in calls]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    engine.resume.set()
    for thread in threads:
        thread.join(60)
    call(lambda: frontend.submit("late"))
    assert len(errors) == 5 and all(isinstance(error.__cause__, RuntimeError) for error in errors)
    frontend.close()


def test_closed(engine: Engine) -> None:
    """All that was submitted before is answered."""
    frontend = Frontend(engine)
    submission = frontend.submit(QUESTIONS[0], OPTIONS)
    frontend.close()
    assert isinstance(submission.result(0), Completion)
    with pytest.raises(EngineError, match="closed"):
        frontend.submit(QUESTIONS[0], OPTIONS)


def test_an_error_of_the_caller_cancels_the_rest(engine: Engine) -> None:
    with pytest.raises(OSError, match="disk"), Frontend(engine) as frontend:
        submissions = [frontend.submit(QUESTIONS[0], OPTIONS) for _ in range(12)]
        raise OSError("the disk is full")
    assert all(submission.future.done() for submission in submissions)
