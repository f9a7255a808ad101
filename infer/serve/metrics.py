"""Metrics in Prometheus' format. Names are vLLM's with the prefix `tarsier_`, and those of media, which vLLM lacks."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
_FRAMES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The metrics of a server. Each has the label `model_name`.

    Args:
        model: Name of the model.
        num_running: Returns the number of requests in slots.
        num_waiting: Returns the number of requests that are prepared or wait for a slot.
        slots: Number of slots.
    """

    def __init__(self, model: str, num_running: Callable[[], int], num_waiting: Callable[[], int], slots: int):
        disable_created_metrics()  # one more line for each metric
        self._registry = CollectorRegistry()
        self._model = model
        self._gauge("num_requests_running", "Requests in slots", num_running)
        self._gauge("num_requests_waiting", "Requests that are prepared or wait for a slot", num_waiting)
        self._gauge("kv_cache_usage_perc", "Share of the slots in use, from 0 to 1", lambda: num_running() / slots)
        self.responses = self._counter("http_responses", "Responses by HTTP status", "status")
        self.successes = self._counter("request_success", "Finished answers by reason", "finished_reason")
        self.rejections = self._counter("admission_rejections", "Requests that were not admitted", "reason")
        self.refused_media = self._counter("media_refused", "Images and videos that were refused", "reason")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.prefix_queries = self._counter("prefix_cache_queries", "Tokens of prompts, which may be in a slot")
        self.prefix_hits = self._counter("prefix_cache_hits", "Tokens of prompts that were in a slot before")
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens")
        self.frames = self._counter("media_frames", "Decoded frames and images")
        self.time_to_first_token = self._histogram("time_to_first_token_seconds", "Of streamed answers", _SECONDS)
        self.time_per_token = self._histogram(
            "request_time_per_output_token_seconds", "Time in a slot per generated token", (0.001, 0.005, *_SECONDS)
        )
        self.latency = self._histogram("e2e_request_latency_seconds", "From submission to the last token", _SECONDS)
        self.queue_time = self._histogram("request_queue_time_seconds", "From preparation to a slot", _SECONDS)
        self.inference_time = self._histogram("request_inference_time_seconds", "Time in a slot", _SECONDS)
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Tokens per prompt", _TOKENS)
        self.request_generation_tokens = self._histogram("request_generation_tokens", "Tokens per answer", _TOKENS)
        self.prepare_time = self._histogram("request_prepare_time_seconds", "Media and prompt of a request", _SECONDS)
        self.fetch_time = self._histogram("media_fetch_seconds", "Download of an image or video", _SECONDS)
        self.decode_time = self._histogram("media_decode_seconds", "Decoding of an image or video", _SECONDS)
        self.frames_per_medium = self._histogram("media_request_frames", "Frames per image or video", _FRAMES)

    def export(self) -> bytes:
        """Returns all metrics as text."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, text: str, function: Callable[[], float]) -> None:
        gauge = Gauge(f"tarsier_{name}", text, ["model_name"], registry=self._registry)
        gauge.labels(self._model).set_function(function)

    def _counter(self, name: str, text: str, label: str | None = None) -> Callable[..., Counter]:
        """Returns a function from the value of the label, if there is one, to the counter."""
        labels = ["model_name", *([label] if label else [])]
        counter = Counter(f"tarsier_{name}", text, labels, registry=self._registry)
        if not label:
            counter.labels(self._model)  # exported from the start
        return lambda *value: counter.labels(self._model, *value)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"tarsier_{name}", text, ["model_name"], buckets=buckets, registry=self._registry)
        return histogram.labels(self._model)
