"""One engine for many callers: threads prepare samples, and each caller receives its own answers."""

import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from infer.engine.engine import Engine
from infer.engine.requests import Completion, Request, RequestError
from tarsier_jax.errors import InputError, TarsierError, reason_of
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.processing.batch import Example

_INCOMPLETE = "\ufffd"  # decoded from an incomplete character, whose last bytes are in the next token
_WAITING = 2  # samples that are prepared or wait, as a multiple of the slots

_Result = Completion | RequestError


class EngineError(TarsierError):
    """The engine failed. Every request in progress and every later one raises this error."""


class Submission:
    """A sample that was submitted, and its answer.

    Attributes:
        future: Resolves to the result. `asyncio.wrap_future(submission.future)` awaits it.
    """

    def __init__(
        self,
        sample: Any,
        options: SamplingOptions,
        decode: Callable[[list[int]], str],
        stream: bool,
        on_tokens: Callable[[list[int]], None] | None = None,
    ):
        self.future: Future[_Result] = Future()
        self.future.set_running_or_notify_cancel()  # a cancelled future could not take the engine's result
        self._sample, self._options, self._decode = sample, options, decode
        self._cancelled = threading.Event()
        self._tokens: queue.SimpleQueue[list[int] | None] | None = queue.SimpleQueue() if stream else None
        self._on_tokens = self._tokens.put if self._tokens else on_tokens

    def result(self, timeout: float | None = None) -> _Result:
        """Waits for the result.

        Raises:
            EngineError: the engine failed or was closed.
            TimeoutError: `timeout` seconds passed without a result.
        """
        return self.future.result(timeout)

    def stream(self) -> Iterator[str]:
        """Yields the text in pieces while it is generated. Only for a submission with `stream=True`, and only once.

        Raises:
            InputError: the sample cannot be used.
            EngineError: the engine failed or was closed.
        """
        if self._tokens is None:
            raise ValueError("submit(..., stream=True) is needed to stream an answer.")
        self.future.add_done_callback(lambda _: self._tokens.put(None) if self._tokens else None)
        deltas = TextDeltas(self._decode, self._options)
        while (new_tokens := self._tokens.get()) is not None:
            if text := deltas.add(new_tokens):
                yield text
        result = self.result()
        if isinstance(result, RequestError):
            raise InputError(result.reason)
        if text := deltas.end(result.text):
            yield text

    def cancel(self) -> None:
        """Ends the answer early. Its result contains the tokens generated until then."""
        self._cancelled.set()


class TextDeltas:
    """The text of an answer in pieces, from its tokens. Together the pieces are the text of the result."""

    def __init__(self, decode: Callable[[list[int]], str], options: SamplingOptions):
        self._decode, self._options = decode, options
        self._tokens: list[int] = []
        self._num_sent = 0

    def add(self, tokens: list[int]) -> str:
        """Returns the new text after further tokens, which may be empty; see `stable_text`."""
        self._tokens += tokens
        return self.end(stable_text(self._decode(self._tokens), self._options))

    def end(self, text: str) -> str:
        """Returns the rest of the whole text."""
        rest = text[self._num_sent :]
        self._num_sent += len(rest)
        return rest


class Frontend:
    """Answers samples from any number of threads with one engine. `close` it, or use it in a `with` statement.

    The number of samples in progress is limited, which bounds the memory that prepared frames take; then `submit`
    blocks.

    Args:
        engine: Must not be used by others.
        workers: Number of threads that prepare samples; 0 prepares them in the thread that submits.
        prepare: Returns the example of a sample; `engine.processor` by default. An exception that it raises becomes
            the RequestError of this sample.
        waiting: Largest number of samples that are prepared or wait for a slot; twice the slots by default.

    Attributes:
        capacity: Largest number of samples in progress: those in slots and the waiting ones.
    """

    def __init__(
        self,
        engine: Engine,
        workers: int = 2,
        prepare: Callable[[Any], Example] | None = None,
        waiting: int | None = None,
    ):
        self.engine = engine
        self._prepare = prepare or engine.processor
        slots = engine.config.slots
        self.capacity = slots + (_WAITING * slots if waiting is None else waiting)
        self._capacity = threading.Semaphore(self.capacity)
        self._mutex = threading.Lock()
        self._numbers = itertools.count()
        self._pending: dict[int, Submission] = {}
        self._error: EngineError | None = None
        self._samples: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._requests: queue.SimpleQueue[Request | RequestError | None] = queue.SimpleQueue()
        self._workers = [threading.Thread(target=self._prepare_all, daemon=True) for _ in range(workers)]
        self._runner = threading.Thread(target=self._run, daemon=True)
        for thread in (*self._workers, self._runner):
            thread.start()

    @property
    def num_pending(self) -> int:
        """Number of samples in progress."""
        return len(self._pending)

    def submit(
        self,
        sample: Any,
        options: SamplingOptions | None = None,
        *,
        stream: bool = False,
        block: bool = True,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> Submission:
        """Submits one sample.

        Args:
            sample: In the annotation format (see docs/design.md), or an argument of `prepare`.
            options: How the answer is generated.
            stream: Whether `Submission.stream` will be called.
            block: Wait while too many samples are in progress.
            on_tokens: Called with new tokens while they are generated, in the thread that runs the engine; not with
                `stream`.

        Raises:
            queue.Full: too many samples are in progress, and `block` is false.
            EngineError: the engine failed or was closed.
        """
        if not self._capacity.acquire(blocking=block):
            raise queue.Full("Too many requests are in progress.")
        decode = self.engine.processor.decode
        submission = Submission(sample, options or SamplingOptions(), decode, stream, on_tokens)
        with self._mutex:
            number = next(self._numbers)
            if self._error is None:
                self._pending[number] = submission
        if self._error is not None:
            self._capacity.release()
            raise self._error
        if self._workers:
            self._samples.put(number)
        else:
            self._requests.put(self._prepare_one(number))
        return submission

    def answer_all(
        self, numbered_samples: Iterable[tuple[int, Any]], options: SamplingOptions
    ) -> Iterator[tuple[int, _Result]]:
        """Yields the number and the result of every sample, in the order in which answers end.

        Samples are drawn while answers are generated. If the caller stops iterating, the rest is cancelled.

        Args:
            numbered_samples: Pairs of a number and a sample, such as `enumerate(samples)`.
            options: Sample number n is generated with seed `options.seed + n`.

        Raises:
            EngineError: the engine failed or was closed.
        """
        results: queue.SimpleQueue[tuple[int, Future[_Result]]] = queue.SimpleQueue()
        pending: dict[int, Submission] = {}

        def next_result() -> tuple[int, _Result]:
            number, future = results.get()
            del pending[number]
            return number, future.result()

        try:
            for number, sample in numbered_samples:
                seeded = dataclasses.replace(options, seed=(options.seed + number) % 2**31)
                while (submission := self._try_submit(sample, seeded, block=not pending)) is None:
                    yield next_result()
                pending[number] = submission
                submission.future.add_done_callback(lambda future, number=number: results.put((number, future)))
            while pending:
                yield next_result()
        finally:
            for submission in pending.values():
                submission.cancel()

    def close(self) -> None:
        """Waits for all answers, then ends the threads. Later submissions raise EngineError."""
        for _ in self._workers:
            self._samples.put(None)
        for worker in self._workers:
            worker.join()
        self._requests.put(None)
        self._runner.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the front-end; after an exception it cancels all requests, and waits for no worker."""
        if error is None:
            self.close()
            return
        with self._mutex:
            pending = list(self._pending.values())
        for submission in pending:
            submission.cancel()
        self._requests.put(None)
        self._runner.join()

    def _try_submit(self, sample: Any, options: SamplingOptions, block: bool) -> Submission | None:
        try:
            return self.submit(sample, options, block=block)
        except queue.Full:
            return None

    def _prepare_all(self) -> None:
        while (number := self._samples.get()) is not None:
            self._requests.put(self._prepare_one(number))

    def _prepare_one(self, number: int) -> Request | RequestError:
        submission = self._pending.get(number)
        if submission is None or submission._cancelled.is_set():
            return RequestError(number, "The request was cancelled.")
        try:
            example = self._prepare(submission._sample)
        except Exception as error:  # one bad sample must not end the others
            return RequestError(number, reason_of(error))
        return Request(number, example, submission._options, submission._on_tokens, submission._cancelled)

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            for result in self.engine.run(iter(self._requests.get, None)):
                with self._mutex:
                    submission = self._pending.pop(result.key)
                self._capacity.release()
                submission.future.set_result(result)
        except BaseException as e:  # raised in every thread that waits
            error = e
        self._end(error)

    def _end(self, cause: BaseException | None) -> None:
        """Raises an EngineError in every thread that waits for an answer or submits."""
        message = "The engine was closed." if cause is None else f"The engine failed: {type(cause).__name__}: {cause}"
        engine_error = EngineError(message)
        engine_error.__cause__ = cause
        with self._mutex:
            self._error, pending = engine_error, list(self._pending.values())
            self._pending.clear()
        for submission in pending:
            self._capacity.release()
            submission.future.set_exception(engine_error)


def stable_text(text: str, options: SamplingOptions) -> str:
    """Returns the part of an unfinished answer's text that later tokens do not change.

    An incomplete character and the beginning of a stop string at the end are left out.
    """
    text, is_stopped = options.truncate(text.rstrip(_INCOMPLETE))
    if is_stopped:
        return text
    for length in range(max(map(len, options.stop), default=0) - 1, 0, -1):
        if any(stop.startswith(text[-length:]) for stop in options.stop):
            return text[:-length].rstrip()
    return text
