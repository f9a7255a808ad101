"""The interface of judges."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeVar

from tarsier_jax.errors import TarsierError

AnswerT_co = TypeVar("AnswerT_co", covariant=True)


class JudgeError(TarsierError):
    """The judge returned no usable answer to one task after the permitted number of requests."""


class Task(Protocol[AnswerT_co]):
    """A question to a judge; see `eval.judges.tasks`.

    Attributes:
        prompt: Name of the prompt; see `eval.judges.prompts`.
        placeholders: Placeholders of the prompt.
        attempts: Number of requests, the first included, that the original makes until a reply can be read.
    """

    prompt: ClassVar[str]
    placeholders: ClassVar[tuple[str, ...]]
    attempts: ClassVar[int]

    @property
    def fields(self) -> Mapping[str, str]:
        """Text per placeholder."""
        ...

    def read(self, reply: str) -> AnswerT_co:
        """Reads the reply of a language model. Raises ValueError if the original does not accept it."""
        ...


class Judge(Protocol):
    """Answers tasks. `answer` may be called from `concurrency` threads at once.

    Attributes:
        settings: Everything that its answers depend on, such as the model and the hash of the prompts.
        concurrency: Number of tasks that it answers at once.
    """

    settings: Mapping[str, Any]
    concurrency: int

    def answer(self, task: Task[AnswerT_co]) -> AnswerT_co:
        """Answers a task.

        Raises:
            JudgeError: there is no usable answer to this task.
            InputError: no task can be answered, such as with a wrong key.
        """
        ...
