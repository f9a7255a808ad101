"""Requests in progress: admission, preparation of media, the engine, deadlines and metrics."""

import asyncio
import contextlib
import dataclasses
import logging
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from infer.engine import Completion, EngineError, Frontend, RequestError
from infer.engine.engine import Engine
from infer.serve.errors import NO_RETRY, ApiError, bad_request
from infer.serve.metrics import Metrics
from infer.serve.prompts import Prompt
from tarsier_jax.errors import InputError, MediaError, TarsierError
from tarsier_jax.processing.batch import Example

_logger = logging.getLogger("infer.serve")
_RETRY_AFTER_S = 2
PREPARED = object()  # the event of a request whose media are decoded and whose prompt fits


class Loader(Protocol):
    """Converts a sample to an example with options of the processor, as `infer.media.MediaLoader`."""

    def __call__(self, sample: Any, **options: Any) -> Example: ...


@dataclasses.dataclass
class Job:
    """A prompt that the front-end prepares.

    Attributes:
        prompt: The prompt.
        on_prepared: Called in the thread that prepares it, when the prompt fits.
        example: Set when the prompt is prepared.
        prepare_seconds: Time for the media and the prompt.
        code: Label of the reason for which its media were refused; None otherwise.
    """

    prompt: Prompt
    on_prepared: Callable[[], None]
    example: Example | None = None
    prepare_seconds: float = 0.0
    code: str | None = None


class Service:
    """One engine for all requests.

    Args:
        engine: Must not be used by others.
        loader: Prepares samples, in the threads of the front-end.
        name: Name of the model in the protocol.
        workers: Number of threads that prepare samples.
        waiting: Largest number of requests that wait for a slot.
        seconds: Deadline of a request.

    Attributes:
        metrics: The metrics.
        on_failure: Called once when the engine fails.
        is_draining: No further requests are admitted.
        error: The error of the engine, after it failed.
    """

    def __init__(self, engine: Engine, loader: Loader, name: str, *, workers: int, waiting: int, seconds: float):
        self.name, self.seconds = name, seconds
        self.created = int(time.time())
        self.decode = engine.processor.decode
        self.vision = engine.processor.config.vision
        self.frontend = Frontend(engine, workers, self._prepare, waiting)
        self.metrics = Metrics(name, self._num_running, self._num_waiting, engine.config.slots)
        self.on_failure: Callable[[], None] = lambda: None
        self.is_draining = False
        self.error: EngineError | None = None
        self._prompt_tokens = engine.config.prompt_tokens
        self._stats = engine.stats
        self._loader = loader
        self._num_arriving = 0  # requests whose bodies are read

    @contextlib.contextmanager
    def admission(self) -> Iterator[None]:
        """Counts a request whose body is read in the block, which bounds the memory of bodies.

        Raises:
            ApiError: the server is full, ends, or has failed.
        """
        if self.error is not None:
            raise self.engine_failure(self.error)
        if self.is_draining:
            raise ApiError(503, "The server is shutting down.", code="shutting_down")
        if self._num_arriving + self.frontend.num_pending >= self.frontend.capacity:
            raise self._full()
        self._num_arriving += 1
        try:
            yield
        finally:
            self._num_arriving -= 1

    def submit(self, prompt: Prompt, stream: bool) -> "Answer":
        """Starts a request. Raises ApiError."""
        try:
            return Answer(self, prompt, stream)
        except queue.Full:
            raise self._full() from None
        except EngineError as error:
            raise self.engine_failure(error) from None

    def engine_failure(self, error: EngineError) -> ApiError:
        """Records that the engine has failed, and returns the error of a request that it does not answer."""
        if self.error is None:
            self.error = error
            self.on_failure()
        return ApiError(503, "The engine has failed, and the server ends.", code="engine_failed", headers=NO_RETRY)

    def _full(self) -> ApiError:
        self.metrics.rejections("queue_full").inc()
        return ApiError(
            429,
            f"The server answers or queues {self.frontend.capacity} requests already. Send the request again later.",
            code="queue_full",
            headers={"Retry-After": str(_RETRY_AFTER_S)},
        )

    def _num_running(self) -> int:
        return max(self._stats.prompts - self._stats.answers, 0)

    def _num_waiting(self) -> int:
        return max(self.frontend.num_pending - self._num_running(), 0)

    def _prepare(self, job: Job) -> Example:
        start = time.perf_counter()
        try:
            example = self._loader(job.prompt.sample, **job.prompt.processor_options)
            self._check(example, job.prompt)
        except MediaError as error:
            job.code = error.reason
            self.metrics.refused_media(error.reason).inc()
            raise InputError(error.public_message) from None
        except TarsierError:
            raise
        except Exception:  # its text may contain addresses, so it is only in the log
            _logger.exception("a sample could not be prepared")
            raise InputError("The request cannot be prepared. Check its images, videos and texts.") from None
        job.prepare_seconds = time.perf_counter() - start
        job.example = example
        self._count_media(example)
        job.on_prepared()
        return example

    def _check(self, example: Example, prompt: Prompt) -> None:
        """Raises InputError for a prompt that is too long, or with fewer frames than requested."""
        for selection, limit in zip(example.selections, prompt.frame_limits, strict=True):
            if limit is not None and len(selection.indices) >= limit:
                raise InputError(
                    f"At the requested fps a video has {limit} frames or more, which is the limit. Lower fps, or set "
                    "num_frames, the largest number of frames."
                )
        if len(example.input_ids) > self._prompt_tokens:
            raise InputError(
                f"The prompt has {len(example.input_ids)} tokens; the server takes at most {self._prompt_tokens}. Use "
                "fewer frames (num_frames, fps), smaller ones (max_pixels) or less text, or start the server with a "
                "larger --prompt_tokens."
            )

    def _count_media(self, example: Example) -> None:
        metrics = self.metrics
        for selection in example.selections:
            metrics.frames().inc(len(selection.indices))
            metrics.frames_per_medium.observe(len(selection.indices))
            metrics.decode_time.observe(selection.decode_seconds)
            if selection.fetch_seconds:
                metrics.fetch_time.observe(selection.fetch_seconds)


class Answer:
    """A request in progress. `close` it, which frees its slot.

    Attributes:
        prompt: The prompt.
        job: Its preparation.
    """

    def __init__(self, service: Service, prompt: Prompt, stream: bool):
        self.prompt = prompt
        self.job = Job(prompt, lambda: self._put(PREPARED))
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._start = time.perf_counter()
        self._deadline = self._loop.time() + service.seconds
        self._submission = service.frontend.submit(
            self.job, prompt.sampling, block=False, on_tokens=self._put if stream else None
        )
        self._submission.future.add_done_callback(lambda _: self._put(None))
        self._timer = self._loop.call_at(self._deadline, self._submission.cancel)  # also when nobody waits

    async def next_event(self, seconds: float | None = None) -> Any:
        """Waits for PREPARED, new tokens, or None at the end.

        Args:
            seconds: Limit of the wait; None for the deadline only.

        Raises:
            TimeoutError: nothing happened for `seconds`.
            ApiError: the deadline of the request passed.
        """
        left = self._deadline - self._loop.time()
        wait = left if seconds is None else min(seconds, left)
        try:
            return await asyncio.wait_for(self._events.get(), max(wait, 0))
        except TimeoutError:
            if left <= wait:
                raise self._late() from None
            raise

    async def prepared(self) -> None:
        """Waits until the media are decoded and the prompt fits. Raises ApiError."""
        if await self.next_event() is None:
            self.completion()  # raises its error

    async def result(self) -> Completion:
        """Waits for the result. Raises ApiError."""
        while await self.next_event() is not None:
            pass
        return self.completion()

    def completion(self) -> Completion:
        """Returns the result after its end. Raises ApiError."""
        try:
            result = self._submission.result(0)
        except EngineError as error:
            raise self._service.engine_failure(error) from None
        if isinstance(result, RequestError):
            raise bad_request(result.reason, "messages", self.job.code)
        if result.finish_reason == "cancelled":
            raise self._late()
        self._count(result)
        return result

    def count_first_token(self) -> None:
        """Records the time until the first token of a stream."""
        self._service.metrics.time_to_first_token.observe(time.perf_counter() - self._start)

    def close(self) -> None:
        """Ends the answer, if it has not ended."""
        self._timer.cancel()
        self._submission.cancel()

    def _put(self, event: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _late(self) -> ApiError:
        message = f"The request was not answered within {self._service.seconds:g} seconds, the limit of the server."
        return ApiError(504, message, code="timeout", headers=NO_RETRY)

    def _count(self, result: Completion) -> None:
        metrics, seconds = self._service.metrics, time.perf_counter() - self._start
        num_prompt, num_new = len(result.request.example.input_ids), len(result.tokens)
        metrics.successes("length" if result.finish_reason == "length" else "stop").inc()
        metrics.prompt_tokens().inc(num_prompt)
        metrics.prefix_queries().inc(num_prompt)
        metrics.prefix_hits().inc(result.reused_tokens)
        metrics.generation_tokens().inc(num_new)
        metrics.request_prompt_tokens.observe(num_prompt)
        metrics.request_generation_tokens.observe(num_new)
        metrics.latency.observe(seconds)
        metrics.prepare_time.observe(self.job.prepare_seconds)
        metrics.inference_time.observe(result.seconds)
        metrics.queue_time.observe(max(seconds - result.seconds - self.job.prepare_seconds, 0.0))
        metrics.time_per_token.observe(result.seconds / max(num_new, 1))
