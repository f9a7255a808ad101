"""All answers at once, in the order of the questions."""

from collections.abc import Iterable, Mapping
from typing import Any

from tqdm import tqdm

from infer.engine.engine import Engine
from infer.engine.frontend import Frontend
from infer.engine.requests import RequestError
from tarsier_jax.errors import InputError
from tarsier_jax.generation.sampling import SamplingOptions


def answer_samples(
    engine: Engine,
    samples: Iterable[Mapping[str, Any]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    name: str | None = None,
) -> list[str]:
    """Returns the engine's answers to samples in the annotation format; sample i is generated with `seed` + i.

    Args:
        name: Title of a progress bar; None shows no bar.

    Raises:
        InputError: a sample cannot be used.
    """
    options = SamplingOptions(max_new_tokens, temperature, seed=seed)
    texts: dict[int, str] = {}
    with Frontend(engine) as frontend:
        results = frontend.answer_all(enumerate(samples), options)
        for number, result in tqdm(results, desc=name, unit="clip", disable=name is None):
            if isinstance(result, RequestError):
                raise InputError(result.reason)
            texts[number] = result.text
    return [texts[i] for i in range(len(texts))]
