"""Answers the samples of benchmarks with an engine.

Predictions are stored row by row in the original's format, so an interrupted run resumes. Each row also has
`visuals`, the frames that the model received, or `error`, the reason why the sample has no answer.
"""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.benchmarks import Benchmark
from eval.benchmarks.annotations import messages_of, videos_of, with_videos
from eval.predictions import ERROR, AnnotatedSample, Prediction, prediction_at, read_rows
from infer.bulk.inputs import with_answer
from infer.bulk.journal import Journal
from infer.bulk.outputs import LineWriter
from infer.engine import Completion, Engine, Frontend, RequestError, fit_config
from tarsier_jax.api import model_mesh
from tarsier_jax.files import atomic_write
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.jsonl import to_json
from tarsier_jax.processing.processor import Processor

SLOTS = 32
_USUAL_TEXT = 256  # tokens of text that an engine permits beside the frames
_BYTES_PER_TOKEN = 2  # of text, at least

# Returns the video that a model receives in place of one, of which it received frames with these indices.
View = Callable[[Mapping[str, Any], Sequence[int]], Mapping[str, Any] | None]


class Engines:
    """Builds engines of one model when they are first used. Only the last one stays in memory.

    Args:
        load: Returns the model and the processor. It is called when the first engine is built.
        slots: Number of answers in progress at once.
    """

    def __init__(self, load: Callable[[], tuple[Tarsier, Processor]], slots: int = SLOTS):
        self._load, self._slots = functools.cache(load), slots
        self._engine: Engine | None = None
        self._shape: tuple[int, int, int, bool] | None = None

    def fit(self, benchmark: Benchmark, rows: Sequence[AnnotatedSample]) -> Engine:
        """Returns an engine for the frames, the prompts and the answers of a benchmark.

        It reuses prefixes if a video has several rows, which then are encoded once.
        """
        predictions = [Prediction.of(row) for row in rows]
        longest = max(len(prediction.prompt.encode()) for prediction in predictions)
        extra_text = max(0, longest // _BYTES_PER_TOKEN - _USUAL_TEXT)
        videos = {prediction.vid for prediction in predictions}
        shape = (benchmark.n_frames, benchmark.max_new_tokens, extra_text, len(videos) < len(rows))
        if self._engine is None or self._shape != shape:
            self._engine = None  # its memory must be free before the next engine is built
            self._engine, self._shape = self._build(*shape), shape
        return self._engine

    def _build(self, n_frames: int, max_new_tokens: int, extra_text: int, reuse_prefixes: bool) -> Engine:
        model, processor = self._load()
        processor, mesh = processor.replace(n_frames=n_frames), model_mesh(model)
        config = fit_config(processor, self._slots, max_new_tokens, mesh)
        if extra_text:
            prompt_tokens = min(config.prompt_tokens + extra_text, processor.options.max_seq_len)
            config = fit_config(processor, self._slots, max_new_tokens, mesh, prompt_tokens)
        return Engine(model, processor, dataclasses.replace(config, reuse_prefixes=reuse_prefixes))


def answer_rows(
    engines: Engines, benchmark: Benchmark, rows: Sequence[AnnotatedSample], path: Path, view: View | None = None
) -> list[AnnotatedSample]:
    """Answers the rows that have no answer in the file `path`, and appends them; returns all rows with answers.

    A sample that cannot be answered has the answer "<error>", and the reason as `error`. The next call tries it again.

    Args:
        engines: Engines of the model.
        benchmark: The benchmark of the rows.
        rows: Rows with the paths of their videos.
        path: File of the predictions.
        view: Changes the videos. The rows must have the `visuals` of an answer.

    Raises:
        InputError: `path` is not a file of predictions.
        EngineError: the engine failed.
    """
    stored = read_answers(path)
    missing = [row for row in rows if _key(row) not in stored]
    if missing:
        lines = _answer_missing(engines.fit(benchmark, missing), benchmark, missing, path, view)
        with contextlib.closing(LineWriter(path)) as writer, contextlib.closing(lines):
            for line in tqdm(lines, desc=path.stem, total=len(missing), unit="sample"):
                writer.write(line)
                stored[_key(line)] = line
    return [stored[_key(row)] for row in rows]


def read_answers(path: Path) -> dict[str, AnnotatedSample]:
    """Returns the answered rows of an earlier run by key, and removes all others from the file.

    The others are samples that could not be answered, and a last line that a killed run left incomplete.

    Raises:
        InputError: a line is not a prediction.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if complete != content:
        _replace(path, complete)
    num_rows, answered = 0, {}
    for place, row in read_rows(path):
        prediction = prediction_at(place, row)
        num_rows += 1
        if not prediction.is_missing:
            answered[prediction.key] = row
    if len(answered) < num_rows:
        _replace(path, "".join(f"{to_json(row)}\n" for row in answered.values()).encode())
    return answered


def _answer_missing(
    engine: Engine, benchmark: Benchmark, rows: Sequence[AnnotatedSample], path: Path, view: View | None
) -> Generator[dict[str, Any]]:
    """Yields the lines of the predictions in the order in which answers end."""
    with tempfile.TemporaryDirectory() as media, Journal(path) as journal:
        prepare = functools.partial(_prepare, engine.processor, benchmark, Path(media), view, journal)
        journal.try_suspects(((_key(row), row) for row in rows), prepare)
        with Frontend(engine, prepare=prepare) as frontend:
            results = frontend.answer_all(enumerate(rows), SamplingOptions(benchmark.max_new_tokens))
            for i, result in results:
                yield _line(rows[i], result, engine.processor)


def _replace(path: Path, content: bytes) -> None:
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def _key(row: AnnotatedSample) -> str:
    return Prediction.of(row).key


def _prepare(
    processor: Processor, benchmark: Benchmark, media: Path, view: View | None, journal: Journal, row: AnnotatedSample
) -> Example:
    messages = messages_of(benchmark, row, processor.keeps_complete_prompts)
    with journal.note(_key(row)):
        videos: list[Mapping[str, Any] | None] = list(videos_of(messages))
        if callable(benchmark.video):
            videos = [benchmark.video(row, media)] * len(videos)
        if view is not None:
            pairs = zip(videos, row["visuals"], strict=True)
            videos = [view(video or {}, visual["frame_indices"]) for video, visual in pairs]
        return processor({"messages": with_videos(messages, videos)})


def _line(row: AnnotatedSample, result: Completion | RequestError, processor: Processor) -> dict[str, Any]:
    if isinstance(result, RequestError):
        return {**with_answer(row, ERROR), "error": result.reason}
    return {**with_answer(row, result.text), "visuals": _visuals(result.request.example, processor)}


def _visuals(example: Example, processor: Processor) -> list[dict[str, Any]]:
    """Returns the frames of each video as the model received them: indices, times in seconds, and size in pixels."""
    size = processor.config.vision.patch_size
    return [
        {
            "frame_indices": list(selection.indices),
            "times": None if selection.times is None else [round(time, 3) for time in selection.times],
            "width": int(width) * size,
            "height": int(height) * size,
        }
        for selection, (_, height, width) in zip(example.selections, example.grid_thw, strict=True)
    ]
