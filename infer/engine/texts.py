"""All answers at once, in the order of the questions."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tqdm import tqdm

from infer.engine.engine import Engine
from infer.engine.requests import Request, RequestError
from tarsier_jax.errors import InputError


def answer_samples(
    engine: Engine,
    samples: Iterable[Mapping[str, Any]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    name: str | None = None,
) -> list[str]:
    """The engine's answers to samples in the annotation format; sample i is sampled with `seed` + i.

    Args:
        name: what to call it in a progress bar; None shows none.

    Raises:
        InputError: a sample cannot be used.
    """

    def requests() -> Iterator[Request]:
        for i, sample in enumerate(samples):
            yield Request(i, engine.processor(sample), max_new_tokens, temperature, seed=seed + i)

    texts: dict[int, str] = {}
    for answer in tqdm(engine.run(requests()), desc=name, unit="clip", disable=name is None):
        if isinstance(answer, RequestError):
            raise InputError(answer.reason)
        texts[answer.key] = engine.text(answer)
    return [texts[i] for i in range(len(texts))]
