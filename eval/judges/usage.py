"""Requests, tokens and cost of judges: estimated before the run, counted after it."""

import dataclasses
import json
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from eval.judges.cache import Reply
from eval.judges.judge import Judge, Task
from eval.judges.prompts import Message
from eval.judges.tasks import AnswerComparison, EventEntailment

AnswerT = TypeVar("AnswerT")

# An English text has about four characters per token. Other languages have fewer.
CHARACTERS_PER_TOKEN = 4


class Prices(NamedTuple):
    """Dollars per million tokens of requests and of replies."""

    prompt: float
    completion: float


@dataclasses.dataclass
class Usage:
    """Counts of requests and tokens.

    Attributes:
        replies: Number of replies from the server.
        prompt_tokens: Tokens of the answered requests.
        completion_tokens: Tokens of the replies.
        uncounted: Number of replies whose tokens the server did not count; their tokens are estimates.
        failures: Number of requests that ended in an HTTP error or a timeout.
        cached: Number of replies from the cache.
        cached_prompt_tokens: Tokens of the requests of cached replies.
        cached_completion_tokens: Tokens of the cached replies.
    """

    replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    failures: int = 0
    cached: int = 0
    cached_prompt_tokens: int = 0
    cached_completion_tokens: int = 0

    def cost(self, prices: Prices) -> float:
        """Returns the dollars of the replies from the server."""
        return (self.prompt_tokens * prices.prompt + self.completion_tokens * prices.completion) / 1e6

    def record(self, prices: Prices | None) -> dict[str, Any]:
        """Returns the counts, and the cost if there are prices."""
        return dataclasses.asdict(self) | ({"cost": round(self.cost(prices), 6)} if prices else {})

    def summary(self, prices: Prices | None) -> str:
        """Returns the counts as one line."""
        cost = f", ${self.cost(prices):,.2f}" if prices else ""
        text = f"{self.replies:,} replies ({self.prompt_tokens:,} + {self.completion_tokens:,} tokens{cost})"
        text += f", {self.cached:,} cached replies" if self.cached else ""
        text += f", {self.failures:,} failed requests" if self.failures else ""
        text += f"; the tokens of {self.uncounted:,} replies are estimates" if self.uncounted else ""
        return text


class UsageCounter:
    """Counts the usage of several threads."""

    def __init__(self) -> None:
        self._usage = Usage()
        self._lock = threading.Lock()

    def add_reply(self, messages: list[Message], reply: Reply, cached: bool) -> None:
        """Counts a reply. Tokens that the server did not count are estimated."""
        prompt = count_tokens(messages) if reply.prompt_tokens is None else reply.prompt_tokens
        completion = -(-len(reply.text) // CHARACTERS_PER_TOKEN)
        completion = completion if reply.completion_tokens is None else reply.completion_tokens
        with self._lock:
            if cached:
                self._usage.cached += 1
                self._usage.cached_prompt_tokens += prompt
                self._usage.cached_completion_tokens += completion
                return
            self._usage.replies += 1
            self._usage.prompt_tokens += prompt
            self._usage.completion_tokens += completion
            self._usage.uncounted += reply.prompt_tokens is None or reply.completion_tokens is None

    def add_failure(self) -> None:
        with self._lock:
            self._usage.failures += 1

    def pop(self) -> Usage:
        """Returns the usage since the last call."""
        with self._lock:
            usage, self._usage = self._usage, Usage()
        return usage


def count_tokens(messages: list[Message]) -> int:
    """Returns an estimate of the tokens of a request."""
    return -(-sum(len(message["content"]) for message in messages) // CHARACTERS_PER_TOKEN)


@runtime_checkable
class MeteredJudge(Judge, Protocol):
    """A judge that stores its replies, and counts tokens.

    Attributes:
        prices: Prices of tokens; None if they are not known.
    """

    prices: Prices | None

    def pop_usage(self) -> Usage:
        """Returns the usage since the last call."""
        ...

    def messages(self, task: Task[Any]) -> list[Message]:
        """Returns the messages of a request."""
        ...

    def cached_answer(self, task: Task[AnswerT]) -> AnswerT:
        """Returns the answer from stored replies. Raises KeyError if a request is necessary."""
        ...


def estimate_usage(score: Callable[[Judge], object], judge: MeteredJudge) -> Usage:
    """Estimates the requests and tokens that a metric needs, without a request.

    Stored replies cost nothing. The other replies are guesses: events are the sentences of a caption, and a verdict has
    a reason of 60 characters. A token has four characters (`CHARACTERS_PER_TOKEN`), and no request is repeated.

    Args:
        score: Scores samples with a judge, such as `lambda judge: metric.score(predictions, judge)`.
        judge: The judge.
    """
    estimator = _Estimator(judge)
    score(estimator)
    usage = estimator.counter.pop()
    return dataclasses.replace(usage, uncounted=0)


class _Estimator:
    """A judge that answers from the cache, or guesses."""

    def __init__(self, judge: MeteredJudge) -> None:
        self.settings: Mapping[str, Any] = judge.settings
        self.concurrency = 1
        self.counter = UsageCounter()
        self._judge = judge

    def answer(self, task: Task[AnswerT]) -> AnswerT:
        try:
            return self._judge.cached_answer(task)
        except KeyError:
            reply = Reply(_guess(task))
            self.counter.add_reply(self._judge.messages(task), reply, cached=False)
            return task.read(reply.text)


def _guess(task: Task[Any]) -> str:
    if isinstance(task, AnswerComparison):
        return repr({"pred": "no", "score": 0})
    if isinstance(task, EventEntailment):
        events = task.events or (task.caption,)
        verdicts = [{"event": event, "relationship": "neutral", "reason": "." * 60} for event in events]
        return json.dumps({"events": verdicts})
    return repr({"events": re.findall(r"[^.!?]+", task.fields["caption"])})
