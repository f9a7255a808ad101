"""From logits to the next token: greedy, or sampled with temperature, top-k and top-p, after a repetition penalty."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tarsier_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How an answer is generated.

    Attributes:
        max_new_tokens: Limit of an answer, in tokens.
        temperature: 0 is greedy.
        top_k: Most likely tokens that are sampled from; 0 keeps every token.
        top_p: Probability of the most likely tokens that are sampled from; 1 keeps every token.
        repetition_penalty: 1 is no penalty.
        seed: Of the random draws.
        stop: The text of an answer ends before the first of these strings.

    Raises:
        InputError: an option is outside its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p, self.repetition_penalty, self.seed)
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if isinstance(self.stop, str) or not all(self.stop):
            raise InputError(f"stop is {self.stop!r}; it must be a tuple of strings that are not empty.")

    def for_rows(self, rows: int) -> "Sampling":
        """Returns these options for every row of a batch."""
        return make_sampling(rows, self.temperature, self.top_k, self.top_p, self.repetition_penalty)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How each row of a batch is sampled; arrays, so that other values compile nothing anew.

    A row with temperature 0 is greedy. top_k 0 and top_p 1 filter nothing; repetition_penalty 1 changes nothing.
    `penalised` is static: without it no row has a penalty, and nobody remembers what was seen.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    penalised: bool = dataclasses.field(metadata={"static": True})


def make_sampling(
    rows: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0
) -> Sampling:
    """The same options for every row.

    Raises:
        InputError: an option is outside its range.
    """
    check_sampling(temperature, top_k, top_p, repetition_penalty)
    return Sampling(
        temperature=jnp.full(rows, temperature, jnp.float32),
        top_k=jnp.full(rows, top_k, jnp.int32),
        top_p=jnp.full(rows, top_p, jnp.float32),
        repetition_penalty=jnp.full(rows, repetition_penalty, jnp.float32),
        penalised=repetition_penalty != 1,
    )


def check_sampling(
    temperature: float, top_k: int, top_p: float, repetition_penalty: float = 1.0, seed: int = 0
) -> None:
    """Raises InputError for an option that is outside its range."""
    ranges = (
        ("temperature", temperature, temperature >= 0, "at least 0 (0 is greedy)"),
        ("top_k", top_k, top_k >= 0, "at least 0 (0 keeps every token)"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (1 keeps every token)"),
        ("repetition_penalty", repetition_penalty, repetition_penalty > 0, "above 0 (1 is no penalty)"),
        ("seed", seed, 0 <= seed < 2**31, f"from 0 to {2**31 - 1}"),
    )
    for name, value, good, rule in ranges:
        if not good:
            raise InputError(f"{name} is {value}; it must be {rule}.")


def penalise(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, " B"]) -> Array:
    """Makes tokens already in the prompt or the answer less likely.

    Source: HF logits_process.RepetitionPenaltyLogitsProcessor; CTRL (arXiv 1909.05858), section 4.1.
    """
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_sorted(logits: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]) -> Array:
    """Puts -inf where a token falls to top-k, then top-p (the smallest set whose probability reaches top_p).

    `logits` are sorted, highest first. Source: HF logits_process.TopKLogitsWarper and TopPLogitsWarper.
    """
    V = logits.shape[-1]
    kept = jnp.arange(V) < jnp.where(top_k > 0, top_k, V)[:, None]
    probabilities = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept &= (before < top_p[:, None]) | (jnp.arange(V) == 0)
    return jnp.where(kept, logits, -jnp.inf)


def sample_tokens(
    logits: Float[Array, "B V"], sampling: Sampling, seen: Bool[Array, "B V"], keys: Array
) -> Int[Array, " B"]:
    """One token a row; each row has a key of its own, so that its draw does not depend on its neighbours."""
    if sampling.penalised:
        logits = penalise(logits, seen, sampling.repetition_penalty)
    greedy = jnp.argmax(logits, axis=-1)
    # Sorting a large vocabulary takes long: only where a row is sampled.
    drawn = jax.lax.cond(jnp.any(sampling.temperature > 0), _draw, lambda *_: greedy, logits, sampling, keys)
    return jnp.where(sampling.temperature == 0, greedy, drawn)


def _draw(logits: Float[Array, "B V"], sampling: Sampling, keys: Array) -> Int[Array, " B"]:
    logits, order = jax.lax.top_k(logits / jnp.maximum(sampling.temperature, 1e-6)[:, None], logits.shape[-1])
    logits = filter_sorted(logits, sampling.top_k, sampling.top_p)
    rank = jax.vmap(jax.random.categorical)(keys, logits)
    return jnp.take_along_axis(order, rank[:, None], axis=1)[:, 0]
