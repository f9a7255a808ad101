"""The requests of the engine, and their results."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.processing.batch import Example


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt that is ready for the device, and the options of its answer.

    Attributes:
        key: Identifies the answer; the engine only passes it on.
        example: The prompt.
        options: How the answer is generated.
        on_tokens: Called with new tokens while they are generated, in the thread that runs the engine.
        cancelled: Set to end the answer early, from any thread. The tokens generated until then are its completion.
        content: The `content_ids` of the prompt, set by an engine that reuses prefixes.
    """

    key: Any
    example: Example
    options: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    on_tokens: Callable[[list[int]], None] | None = None
    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)
    content: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        request: The request that it answers.
        text: The decoded tokens, without special tokens and surrounding white space, up to the first stop string.
        tokens: All generated tokens, without the end-of-sequence token; those of a stop string are included.
        finish_reason: "eos", "length", "stop" (at a stop string) or "cancelled".
        seconds: Time from the prefill of the prompt to the end of the answer.
        reused_tokens: Number of tokens of the prompt that were in a slot before.
    """

    request: Request
    text: str
    tokens: list[int]
    finish_reason: str
    seconds: float
    reused_tokens: int = 0

    @property
    def key(self) -> Any:
        """Key of the request."""
        return self.request.key


@dataclasses.dataclass(frozen=True)
class RequestError:
    """The result of a request that cannot be answered. It is a value: other requests are not affected.

    Attributes:
        key: Key of the request.
        reason: Message that names the input and the remedy.
    """

    key: Any
    reason: str
