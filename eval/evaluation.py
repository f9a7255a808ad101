"""Answers the samples of benchmarks with the engine, and scores the answers."""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from eval.benchmarks import Benchmark
from eval.metrics import Scores
from eval.predictions import AnnotatedSample, Prediction, key_of, read_predictions
from infer.bulk.inputs import with_prediction
from infer.bulk.outputs import LineWriter
from infer.engine import Engine, Frontend, RequestError, fit_config
from tarsier_jax.errors import InputError
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.processor import Processor

_SLOTS = 32


def evaluate(
    model: Tarsier, processor: Processor, benchmarks: Sequence[Benchmark], output: Path, limit: int | None = None
) -> Iterator[tuple[Benchmark, Scores]]:
    """Yields each benchmark with its scores.

    Args:
        output: Directory with the predictions, one file per benchmark. Samples that have an answer there are skipped.
        limit: Only samples of the first `limit` videos per benchmark.

    Raises:
        InputError: a sample cannot be answered, or a file of predictions cannot be read.
    """
    engine = Engine(model, processor, fit_config(processor, _SLOTS, max(each.max_new_tokens for each in benchmarks)))
    for benchmark in benchmarks:
        predictions = predict(engine, benchmark, output / f"{benchmark.name}.jsonl", limit)
        yield benchmark, benchmark.metric(predictions, benchmark.judge)


def predict(engine: Engine, benchmark: Benchmark, path: Path, limit: int | None = None) -> list[Prediction]:
    """Answers the samples that have no line in the file `path` and appends their lines; returns all predictions.

    Raises:
        InputError: a sample cannot be answered. The other answers are stored first.
    """
    samples = first_videos(benchmark.annotations(), limit)
    lines = read_predictions(path)
    missing = [sample for sample in samples if key_of(sample) not in lines]
    errors = []
    with tempfile.TemporaryDirectory() as media, contextlib.closing(LineWriter(path)) as writer:
        results = _answers(engine, benchmark, missing, Path(media))
        for i, answer in tqdm(results, desc=benchmark.name, total=len(missing), unit="sample"):
            if isinstance(answer, RequestError):
                errors.append(answer.reason)
                continue
            line = with_prediction(missing[i], answer)
            writer.write(line)
            lines[key_of(line)] = line
    if errors:
        raise InputError(
            f"{benchmark.name}: {len(errors)} of {len(samples)} samples have no answer. The first reason: {errors[0]} "
            f"The other answers are stored in {path}. Correct the samples and run again."
        )
    return [Prediction.of(lines[key_of(sample)]) for sample in samples]


def first_videos(samples: Iterable[AnnotatedSample], limit: int | None) -> list[AnnotatedSample]:
    """Returns the samples of the first `limit` videos; all samples if `limit` is None."""
    samples = list(samples)
    videos = set(list(dict.fromkeys(sample["vid"] for sample in samples))[:limit])
    return [sample for sample in samples if sample["vid"] in videos]


def _answers(
    engine: Engine, benchmark: Benchmark, samples: Sequence[AnnotatedSample], media: Path
) -> Iterator[tuple[int, str | RequestError]]:
    """Yields the position of a sample and its answer, or the reason why it has none, in the order of completion."""

    def prepare(sample: AnnotatedSample) -> Example:
        return engine.processor(_with_video(sample, benchmark.video_source(sample, media)))

    with Frontend(engine, prepare=prepare) as frontend:
        for number, result in frontend.answer_all(enumerate(samples), SamplingOptions(benchmark.max_new_tokens)):
            yield number, result if isinstance(result, RequestError) else result.text


def _with_video(sample: AnnotatedSample, source: object) -> AnnotatedSample:
    user, *rest = sample["messages"]
    content = [{**item, "video": source} if item["type"] == "video" else item for item in user["content"]]
    return {**sample, "messages": [{**user, "content": content}, *rest]}
