"""Engines that answer in place of a model, and small benchmarks of moving shapes."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

from eval.benchmarks import Benchmark
from eval.benchmarks.shapes import SHAPES, SHAPES_QA, description_samples, question_samples
from infer.engine import Completion, Engine, Request, RequestError

FIRST_SEED = 5


class SampleProcessor:
    """Returns a sample in place of its prompt."""

    def __call__(self, sample: Any) -> Any:
        return sample

    def decode(self, tokens: list[int]) -> str:
        return ""


class Oracle(Engine):
    """An engine that answers a sample with `answer(sample)`; `samples` are those that it has answered."""

    def __init__(self, answer: Callable[[Any], str]):
        self._answer = answer
        self.samples: list[Any] = []
        self.processor: Any = SampleProcessor()
        self.config: Any = SimpleNamespace(slots=4)

    def run(self, requests: Iterable[Request | RequestError]) -> Iterator[Completion | RequestError]:
        for request in requests:
            if isinstance(request, RequestError):
                yield request
                continue
            self.samples.append(request.example)
            yield Completion(request, self._answer(request.example), [], "eos", 0.0)


def reference_of(sample: Any) -> str:
    return sample["messages"][1]["content"][0]["reference"]


def shapes(clips: int) -> Benchmark:
    return dataclasses.replace(SHAPES, annotations=functools.partial(description_samples, FIRST_SEED, clips))


def shapes_qa(clips: int) -> Benchmark:
    return dataclasses.replace(SHAPES_QA, annotations=functools.partial(question_samples, FIRST_SEED, clips))
