"""Samples the next token: greedy, or with temperature, top-k and top-p, after a repetition penalty."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from tarsier_jax.errors import InputError
from tarsier_jax.typing import Array, HostOrDeviceArray


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Options of the generation of an answer.

    Attributes:
        max_new_tokens: Maximum number of tokens.
        temperature: Temperature of the softmax; 0 is greedy.
        top_k: Number of the most likely tokens to sample from; 0 keeps every token.
        top_p: Total probability of the most likely tokens to sample from; 1 keeps every token.
        repetition_penalty: Divisor of the logits of tokens in prompt and answer; 1 changes nothing.
        seed: Random seed.
        stop: Strings that end an answer; the text ends before the first of them.

    Raises:
        InputError: an option is outside its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        ranges = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "at least 0 (0 is greedy)"),
            ("top_k", 0 <= self.top_k < 2**31, f"from 0 (which keeps every token) to {2**31 - 1}"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (1 keeps every token)"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 is no penalty)"),
            ("seed", 0 <= self.seed < 2**31, f"from 0 to {2**31 - 1}"),
            (
                "stop",
                not isinstance(self.stop, str) and all(self.stop),
                "a list or tuple of strings that are not empty",
            ),
        )
        for name, good, rule in ranges:
            if not good:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be {rule}.")

    def truncate(self, text: str) -> tuple[str, bool]:
        """Returns the text up to the first stop string, and whether there is one."""
        ends = [text.find(string) for string in self.stop if string in text]
        return (text[: min(ends)].strip(), True) if ends else (text, False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling options of each row of a batch, as arrays: other values do not compile again.

    Attributes:
        temperature: Temperature of each row; 0 is greedy.
        top_k: As in `SamplingOptions`; 0 keeps every token.
        top_p: As in `SamplingOptions`; 1 keeps every token.
        repetition_penalty: As in `SamplingOptions`; 1 changes nothing.
    """

    temperature: Float[HostOrDeviceArray, " B"]
    top_k: Int[HostOrDeviceArray, " B"]
    top_p: Float[HostOrDeviceArray, " B"]
    repetition_penalty: Float[HostOrDeviceArray, " B"]

    @classmethod
    def repeat(cls, options: SamplingOptions, rows: int) -> "Sampling":
        """Returns the same options for every row."""
        return cls(
            temperature=np.full(rows, options.temperature, np.float32),
            top_k=np.full(rows, options.top_k, np.int32),
            top_p=np.full(rows, options.top_p, np.float32),
            repetition_penalty=np.full(rows, options.repetition_penalty, np.float32),
        )


def penalise(logits: Float[Array, "B V"], seen_tokens: Bool[Array, "B V"], penalty: Float[Array, " B"]) -> Array:
    """Makes tokens of the prompt or the answer less likely.

    Source: HF logits_process.RepetitionPenaltyLogitsProcessor; CTRL (arXiv 1909.05858), section 4.1.
    """
    penalty = penalty[:, None]
    return jnp.where(seen_tokens, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_sorted(logits: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]) -> Array:
    """Sets the logits outside top-k, then outside top-p (the smallest set with a probability of top_p), to -inf.

    `logits` are sorted, highest first. Source: HF logits_process.TopKLogitsWarper and TopPLogitsWarper.
    """
    V = logits.shape[-1]
    mask = jnp.arange(V) < jnp.where(top_k > 0, top_k, V)[:, None]
    probabilities = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    mask &= (before < top_p[:, None]) | (jnp.arange(V) == 0)
    return jnp.where(mask, logits, -jnp.inf)


def sample_tokens(
    logits: Float[Array, "B V"], sampling: Sampling, seen_tokens: Bool[Array, "B V"], keys: Array
) -> Int[Array, " B"]:
    """Samples one token per row. Each row has its own key: the result does not depend on other rows."""
    logits = penalise(logits, seen_tokens, sampling.repetition_penalty)
    greedy = jnp.argmax(logits, axis=-1)
    # Sorting a large vocabulary is slow and only necessary for sampled rows.
    samples = jax.lax.cond(jnp.any(sampling.temperature > 0), _draw, lambda *_: greedy, logits, sampling, keys)
    return jnp.where(sampling.temperature == 0, greedy, samples)


def _draw(logits: Float[Array, "B V"], sampling: Sampling, keys: Array) -> Int[Array, " B"]:
    logits, order = jax.lax.top_k(logits / jnp.maximum(sampling.temperature, 1e-6)[:, None], logits.shape[-1])
    logits = filter_sorted(logits, sampling.top_k, sampling.top_p)
    rank = jax.vmap(jax.random.categorical)(keys, logits)
    return jnp.take_along_axis(order, rank[:, None], axis=1)[:, 0]
