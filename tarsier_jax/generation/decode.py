"""Prefill and decoding: two compiled programs, and the state that passes between them."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from tarsier_jax.generation.sampling import Sampling, SamplingOptions, sample_tokens
from tarsier_jax.models.cache import KVCache
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.batch import Batch

_BLOCK = 128  # answers get room in whole blocks, so that other values of max_new_tokens seldom compile anything


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that changes from token to token, of B answers; donated to each call of `decode`.

    Attributes:
        tokens: The answers; -1 where no token is written yet.
        num_generated: Number of tokens of each answer.
        max_new_tokens: Limit of each answer, in tokens.
        last_token: Newest token of each row.
        last_position: M-RoPE position of the newest token.
        done: The answer has ended, or the row is empty; such a row does not change.
        seen_tokens: Tokens of prompt and answer, for the repetition penalty.
        keys: One random key per row.
        sampling: Options of each row.
        cache: Keys and values of prompt and answer.
    """

    tokens: Int[Array, "B max_new"]
    num_generated: Int[Array, " B"]
    max_new_tokens: Int[Array, " B"]
    last_token: Int[Array, " B"]
    last_position: Int[Array, " B"]
    done: Bool[Array, " B"]
    seen_tokens: Bool[Array, "B V"]
    keys: Array
    sampling: Sampling
    cache: KVCache


@dataclasses.dataclass(frozen=True)
class GeneratedTokens:
    """The tokens of one answer, without the end-of-sequence token, and why it ended ("eos" or "length")."""

    tokens: list[int]
    finish_reason: str


@functools.partial(jax.jit, static_argnames="max_new")
def prefill(
    model: Tarsier,
    batch: Batch,
    sampling: Sampling,
    eos_ids: Int[Array, " E"],
    keys: Array,
    max_new_tokens: Int[Array, ""],
    max_new: int,
) -> DecodeState:
    """Runs the prompts and takes the first token of each answer, of at most `max_new_tokens`; `max_new` is their
    capacity."""
    B, S = batch.input_ids.shape
    logits, cache = model.prefill(batch, cache_size=S + max_new)
    valid = jnp.arange(S) < batch.lengths[:, None]
    seen_tokens = jnp.zeros(logits.shape, bool).at[jnp.arange(B)[:, None], batch.input_ids].max(valid)
    state = DecodeState(
        tokens=jnp.full((B, max_new), -1, jnp.int32),
        num_generated=jnp.zeros(B, jnp.int32),
        max_new_tokens=jnp.full(B, max_new_tokens, jnp.int32),
        last_token=jnp.zeros(B, jnp.int32),
        # Text goes on one after the largest id on any axis; `_emit` steps onto it.
        last_position=jnp.max(jnp.where(valid[..., None], batch.position_ids, -1), axis=(1, 2)),
        done=jnp.zeros(B, bool),
        seen_tokens=seen_tokens,
        keys=keys,
        sampling=sampling,
        cache=cache,
    )
    return _emit(state, logits, eos_ids)


@functools.partial(jax.jit, donate_argnames="state", static_argnames="read_length")
def decode(
    model: Tarsier,
    state: DecodeState,
    eos_ids: Int[Array, " E"],
    steps: Int[Array, ""],
    stop_after: Int[Array, ""],
    read_length: int | None = None,
) -> DecodeState:
    """Goes on for `steps` tokens a row, or until `stop_after` answers have ended since, or all.

    read_length: of the cache's slots that are read, if not all; it also ends where an answer would need more.
    """
    active_at_start, capacity = jnp.sum(~state.done), read_length or state.cache.k.shape[2]
    state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, read_length=read_length))

    def unfinished(carry: tuple[Array, DecodeState]) -> Bool[Array, ""]:
        step, state = carry
        running = jnp.sum(~state.done)
        max_length = jnp.max(jnp.where(state.done, 0, state.cache.lengths))
        return (step < steps) & (running > 0) & (active_at_start - running < stop_after) & (max_length < capacity)

    def body(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        step, state = carry
        logits, cache = model.step(state.last_token, state.last_position, state.cache)
        cache = dataclasses.replace(cache, lengths=jnp.where(state.done, state.cache.lengths, cache.lengths))
        return step + 1, _emit(dataclasses.replace(state, cache=cache), logits, eos_ids)

    _, state = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, read_length=None))


def _emit(state: DecodeState, logits: Array, eos_ids: Array) -> DecodeState:
    """Takes one token a row from `logits` and writes it down."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.num_generated)
    token = sample_tokens(logits, state.sampling, state.seen_tokens, keys).astype(jnp.int32)
    rows, num_generated = jnp.arange(token.shape[0]), state.num_generated + ~state.done
    place = jnp.where(state.done, state.tokens.shape[1], state.num_generated)  # out of reach for rows that are done
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[rows, place].set(token, mode="drop"),
        num_generated=num_generated,
        last_token=token,
        last_position=state.last_position + 1,
        done=state.done | jnp.isin(token, eos_ids) | (num_generated >= state.max_new_tokens),
        seen_tokens=state.seen_tokens.at[rows, token].set(True),
    )


def generate_batch(
    model: Tarsier,
    batch: Batch,
    options: SamplingOptions,
    eos_ids: Iterable[int],
    on_tokens: Callable[[Int[np.ndarray, " B"]], None] | None = None,
) -> list[GeneratedTokens]:
    """Answers every row of a batch. Stop strings are the caller's: `tarsier_jax.api.answer` cuts the text.

    Args:
        on_tokens: called after every step with each row's new token (-1 for rows that are done). Without it the
            whole answer is one device call.
    """
    rows = batch.input_ids.shape[0]
    eos = jnp.asarray(sorted(eos_ids), jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(options.seed), jnp.arange(rows))
    limit = options.max_new_tokens
    capacity = -(-limit // _BLOCK) * _BLOCK
    state = prefill(model, batch, Sampling.repeat(options, rows), eos, keys, jnp.int32(limit), max_new=capacity)
    if on_tokens is None:
        state = decode(model, state, eos, jnp.int32(limit), jnp.int32(rows))
    else:
        state = _decode_streaming(model, state, eos, limit, on_tokens)
    return [trim_at_eos(row, set(eos_ids)) for row in np.asarray(state.tokens)]


def _decode_streaming(
    model: Tarsier,
    state: DecodeState,
    eos: Array,
    max_new_tokens: int,
    on_tokens: Callable[[Int[np.ndarray, " B"]], None],
) -> DecodeState:
    for step in range(1, max_new_tokens + 1):
        on_tokens(np.asarray(state.tokens[:, step - 1]))
        if bool(np.asarray(state.done).all()):
            break
        state = decode(model, state, eos, jnp.int32(1), state.done.shape[0])
    return state


def trim_at_eos(row: Int[np.ndarray, " max_new"], eos_ids: Collection[int]) -> GeneratedTokens:
    """The answer in a row of `DecodeState.tokens`."""
    tokens = row[row >= 0].tolist()
    if tokens and tokens[-1] in eos_ids:
        return GeneratedTokens(tokens[:-1], "eos")
    return GeneratedTokens(tokens, "length")
