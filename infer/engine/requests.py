"""What goes into the engine and what comes out."""

import dataclasses
from collections.abc import Callable
from typing import Any

from tarsier_jax.generation.sampling import check_sampling
from tarsier_jax.processing.batch import Example


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt that is ready for the device, and how to answer it; the options are those of `tarsier_jax.generate`.

    key: what the answer is known by, and cancelled by.
    on_tokens: called with new tokens as they come, in the thread that runs the engine.

    Raises:
        InputError: an option is outside its range.
    """

    key: Any
    example: Example
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    on_tokens: Callable[[list[int]], None] | None = None

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p)


@dataclasses.dataclass(frozen=True)
class Completion:
    """tokens: without the end-of-sequence token.  finish_reason: "eos", "length" or "cancelled".
    seconds: from the prompt's prefill to the answer's end.
    """

    request: Request
    tokens: list[int]
    finish_reason: str
    seconds: float

    @property
    def key(self) -> Any:
        """The request's."""
        return self.request.key


@dataclasses.dataclass(frozen=True)
class RequestError:
    """A request that cannot be answered, and why."""

    key: Any
    reason: str
