"""A language model as judge, behind any endpoint with OpenAI's chat completions."""

import contextlib
import dataclasses
import email.utils
import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import openai

from eval.judges.cache import Reply, ReplyCache, Store
from eval.judges.judge import JudgeError, Task
from eval.judges.prompts import Message, Prompts
from eval.judges.tasks import TASKS
from eval.judges.usage import Prices, Usage, UsageCounter
from tarsier_jax.errors import InputError

AnswerT = TypeVar("AnswerT")

DEFAULT_MODEL = "gpt-3.5-turbo-0125"  # the original's
_MAX_FAULTS = 10  # requests until a server that is busy, broken or silent counts as failed
_MAX_WAIT_S = 60.0
_MAX_RETRY_AFTER_S = 600.0
_CHECK_S = 10.0  # limit of the request that checks the server
_MAX_MESSAGE = 300  # characters of a server's message in an error


@dataclasses.dataclass(frozen=True)
class EndpointOptions:
    """An endpoint and its use.

    Attributes:
        url: Base URL, such as "http://localhost:8000/v1"; with `api_version`, the endpoint of an Azure resource.
        model: Name of the model, or of the deployment. If None, the only model that the server lists, or else
            DEFAULT_MODEL.
        api_version: Version of Azure's API; None for other servers.
        temperature: Temperature; None for the server's default, as in the original.
        retries: How often a task is sent again after a reply that cannot be read; None for the original's numbers
            (`Task.attempts`).
        concurrency: Number of requests at once.
        timeout: Seconds until a request counts as failed.
        first_wait: Seconds before a failed request is sent again. The wait doubles each time.
        prices: Prices per million tokens, if the cost is to be computed.
    """

    url: str
    model: str | None = None
    api_version: str | None = None
    temperature: float | None = None
    retries: int | None = None
    concurrency: int = 64
    timeout: float = 60.0
    first_wait: float = 1.0
    prices: Prices | None = None

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise InputError(f"--judge {self.url!r} must be a URL, such as http://localhost:8000/v1.")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise InputError(f"--judge_temperature {self.temperature} must be from 0 to 2.")
        if self.retries is not None and self.retries < 0:
            raise InputError(f"--judge_retries {self.retries} must be at least 0.")
        if self.concurrency < 1 or not self.timeout > 0:
            raise InputError(
                f"--judge_concurrency {self.concurrency} must be at least 1, --judge_timeout {self.timeout} above 0."
            )
        if self.prices and not min(self.prices) >= 0:
            raise InputError(f"--judge_prices {self.prices[0]} {self.prices[1]} must be at least 0.")

    @property
    def public_url(self) -> str:
        """The URL without a user name, a password and a query, which may contain a key."""
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))

    @property
    def key_variable(self) -> str:
        """The environment variable of the key."""
        return "AZURE_OPENAI_API_KEY" if self.api_version else "OPENAI_API_KEY"


class _FailedRequest(Exception):
    """The server refuses a request."""


class Endpoint:
    """Sends requests to the model of an endpoint, again after faults of the server.

    Args:
        options: The endpoint.
        counter: Counts failed requests.

    Attributes:
        model: Name of the model.
        parameters: Settings of every request.

    Raises:
        InputError: the model is not given, and the server cannot be reached, or refuses the key. The first request
            raises it otherwise.
    """

    def __init__(self, options: EndpointOptions, counter: UsageCounter) -> None:
        self._options = options
        self._counter = counter
        self._client = _client(options)
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(options.concurrency)  # of requests in flight
        self._models: list[str] | None = None
        self._error: InputError | None = None
        self.model = options.model or self._find_model()
        self.parameters: dict[str, Any] = {} if options.temperature is None else {"temperature": options.temperature}

    def _find_model(self) -> str:
        models = self._known_models()
        return models[0] if len(models) == 1 else DEFAULT_MODEL

    def _known_models(self) -> list[str]:
        """Returns the models of the server, which are listed once. Stored replies need no server."""
        with self._lock:
            if self._error is not None:  # other threads need not wait for the server, too
                raise self._error
            if self._models is None:
                try:
                    self._models = self._list_models()
                except InputError as error:
                    self._error = error
                    raise
            return self._models

    def _list_models(self) -> list[str]:
        """Lists the models of the server, which also checks the URL and the key; empty if the server lists none."""
        url = self._options.public_url
        try:
            page = self._client.with_options(timeout=min(self._options.timeout, _CHECK_S)).models.list()
        except openai.APIConnectionError as error:
            raise InputError(
                f"The judge {url} cannot be reached ({error.__cause__ or error}). Start the server, or correct --judge."
            ) from None
        except openai.AuthenticationError as error:
            if "scope" in str(error):  # a key for completions only
                return []
            raise InputError(self._remedy(error)) from None
        except (openai.OpenAIError, ValueError):
            return []
        return [model.id for model in getattr(page, "data", None) or []]

    def request(self, messages: list[Message], store: Store) -> Reply:
        """Returns the reply to a request, and stores it.

        Raises:
            _FailedRequest: the server refuses this request.
            JudgeError: the server is busy, broken or silent for too long.
            InputError: the server refuses all requests.
        """
        self._known_models()
        problem, pause = "", 0.0
        for fault in range(_MAX_FAULTS):
            if pause:
                time.sleep(pause)
            try:
                with self._slots:
                    reply = self._send(messages)
                    store(reply)  # before the next request, so few replies are lost when the process is killed
                    return reply
            except (openai.OpenAIError, ValueError) as error:  # ValueError: the body is not JSON
                self._counter.add_failure()
                self._raise_if_permanent(error)
                problem = str(error)[:_MAX_MESSAGE]
                pause = min(self._options.first_wait * 2**fault, _MAX_WAIT_S) * random.uniform(0.5, 1)
                pause = max(pause, _retry_after(error))
        self._list_models()  # raises InputError if the server has stopped
        raise JudgeError(
            f"The judge {self._options.public_url} failed {_MAX_FAULTS} times in a row (the last time: {problem}). "
            "Check the server, try a lower --judge_concurrency or a higher --judge_timeout, and score again: replies "
            "are stored."
        )

    def _send(self, messages: list[Message]) -> Reply:
        # The package's types of messages are unions of dictionaries, one per role.
        items: Any = messages
        completion = self._client.chat.completions.create(model=self.model, messages=items, **self.parameters)
        try:
            text = completion.choices[0].message.content or ""
        except (AttributeError, IndexError, TypeError):
            raise ValueError(f"the reply is not a chat completion: {str(completion)[:200]}") from None
        usage = completion.usage
        return Reply(text, getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None))

    def _raise_if_permanent(self, error: Exception) -> None:
        """Raises InputError or _FailedRequest if the server does not accept the same request later."""
        if not isinstance(error, openai.APIStatusError):
            return
        if remedy := self._remedy(error):
            raise InputError(remedy) from None
        if error.status_code not in (408, 409, 429) and error.status_code < 500:
            raise _FailedRequest(f"status {error.status_code}: {error.message[:_MAX_MESSAGE]}") from None

    def _remedy(self, error: openai.APIStatusError) -> str:
        """Returns the text of an error that all requests cause; empty for other errors."""
        url, variable = self._options.public_url, self._options.key_variable
        message = error.message[:_MAX_MESSAGE]
        if error.status_code in (401, 403):
            return (
                f"The judge {url} refuses access ({error.status_code}: {message}). Set {variable} to a key that "
                "is valid for this server and for --judge_model."
            )
        if error.status_code in (404, 405):
            models = f" The server lists: {', '.join(self._models[:20])}." if self._models else ""
            return (
                f"The judge {url} lacks the model {self.model!r}, or chat completions ({message}). Correct "
                f"--judge_model, or --judge, whose path often ends in /v1.{models}"
            )
        if error.code == "insufficient_quota":
            return f"The account of the key in {variable} lacks credit ({message}). Replies so far are stored."
        return ""


def _client(options: EndpointOptions) -> openai.OpenAI:
    key = os.environ.get(options.key_variable, "").strip()
    if not key.isascii():
        raise InputError(f"{options.key_variable} has characters that no key has. Set it to a valid key.")
    settings: dict[str, Any] = {"timeout": options.timeout, "max_retries": 0}
    if urlsplit(options.url).scheme == "http":
        # A reused connection adds 40 ms per request if the server writes the headers and the body of a reply
        # separately (Nagle's algorithm and delayed acknowledgements). Without TLS, a new connection costs little.
        settings["default_headers"] = {"Connection": "close"}
    if not options.api_version:  # a server on one's own machine needs no key, but the package does
        return openai.OpenAI(base_url=options.url, api_key=key or "none", **settings)
    try:
        # Without a key, the package reads AZURE_OPENAI_AD_TOKEN.
        return openai.AzureOpenAI(
            azure_endpoint=options.url, api_version=options.api_version, api_key=key or None, **settings
        )
    except openai.OpenAIError:
        raise InputError(f"The judge {options.public_url} needs a key. Set {options.key_variable}.") from None


def _retry_after(error: Exception) -> float:
    """Returns the seconds that the server asks to wait; 0 without the header Retry-After."""
    if not isinstance(error, openai.APIStatusError):
        return 0.0
    value = error.response.headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return min(max(float(value), 0.0), _MAX_RETRY_AFTER_S)
    with contextlib.suppress(TypeError, ValueError):
        until = email.utils.parsedate_to_datetime(value).timestamp()
        return min(max(until - time.time(), 0.0), _MAX_RETRY_AFTER_S)
    return 0.0


class EndpointJudge:
    """A judge that sends tasks to a language model and stores its replies.

    Args:
        options: The endpoint.
        prompts: Prompts of the tasks.
        cache: Store of replies.

    Attributes:
        settings: URL, model, temperature, requests per task, hash of the prompts, and version of the openai package.
        concurrency: Number of tasks at once. Some of them wait before a request is sent again, so there are twice as
            many as requests in flight.
        prices: Prices of tokens, if they are known.

    Raises:
        InputError: the server cannot be reached, or refuses the key.
    """

    def __init__(self, options: EndpointOptions, prompts: Prompts, cache: ReplyCache) -> None:
        self.options = options
        self.concurrency = 2 * options.concurrency
        self.prices = options.prices
        self._counter = UsageCounter()
        self._endpoint = Endpoint(options, self._counter)
        self._prompts = prompts
        self._cache = cache
        self._fatal = ""  # the text of an error that ends the run
        self.settings: Mapping[str, Any] = {
            "judge": options.public_url,
            "model": self._endpoint.model,
            "temperature": "default" if options.temperature is None else options.temperature,
            "requests per task": {task.prompt: self._attempts(task) for task in TASKS},
            "prompts": prompts.hash,
            "openai": openai.__version__,
        } | ({"api version": options.api_version} if options.api_version else {})

    def answer(self, task: Task[AnswerT]) -> AnswerT:
        """Answers a task; see `Judge`. The number of requests is bounded (`EndpointOptions.retries`)."""
        try:
            if self._fatal:
                raise InputError(self._fatal)
            return self._first_readable(task, self._request)
        except InputError as error:
            self._fatal = str(error)  # threads that wait for a turn need not repeat the request
            raise

    def cached_answer(self, task: Task[AnswerT]) -> AnswerT:
        """Returns the answer from stored replies. Raises KeyError if a request is necessary."""
        return self._first_readable(task, self._stored)

    def messages(self, task: Task[Any]) -> list[Message]:
        """Returns the messages of a request."""
        return self._prompts.messages(task)

    def pop_usage(self) -> Usage:
        """Returns the usage since the last call."""
        return self._counter.pop()

    def _attempts(self, task: Task[Any] | type[Task[Any]]) -> int:
        return task.attempts if self.options.retries is None else self.options.retries + 1

    def _first_readable(self, task: Task[AnswerT], reply_of: Callable[[list[Message], int], Reply]) -> AnswerT:
        messages = self.messages(task)
        problem = ""
        for attempt in range(self._attempts(task)):
            try:
                reply = reply_of(messages, attempt)
                problem = f"{reply.text[:200]!r}: "
                return task.read(reply.text)
            except ValueError as error:
                problem += str(error)
            except _FailedRequest as error:
                problem = str(error)
        raise JudgeError(
            f"The judge {self._endpoint.model} returned no usable reply to {self._attempts(task)} requests ({problem})."
        )

    def _request(self, messages: list[Message], attempt: int) -> Reply:
        key = self._key(messages, attempt)
        reply, is_new = self._cache.get_or_request(key, lambda store: self._endpoint.request(messages, store))
        self._counter.add_reply(messages, reply, cached=not is_new)
        return reply

    def _stored(self, messages: list[Message], attempt: int) -> Reply:
        key = self._key(messages, attempt)
        reply = self._cache.get(key)
        if reply is None:
            raise KeyError(key)
        return reply

    def _key(self, messages: list[Message], attempt: int) -> str:
        """Returns a hash of everything that a reply depends on."""
        options, endpoint = self.options, self._endpoint
        parts = [options.public_url, endpoint.model, options.api_version, endpoint.parameters, messages, attempt]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
