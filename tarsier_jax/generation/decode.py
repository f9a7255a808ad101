"""Prefill and decoding: two compiled programs, and the state between them."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from tarsier_jax.generation.sampling import Sampling, SamplingOptions, sample_tokens
from tarsier_jax.models.cache import KVCache
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.batch import Batch
from tarsier_jax.typing import Array, HostOrDeviceArray

_BLOCK = 128  # the capacity for answers is a multiple of this: few values of max_new_tokens compile again


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of B answers during decoding, donated to each call of `decode`.

    Attributes:
        tokens: The answers; -1 after their end.
        num_generated: Number of tokens of each answer.
        max_new_tokens: Limit of each answer.
        last_token: The last token of each row.
        last_position: The M-RoPE position of the last token, equal on all axes.
        done: Whether the answer has ended, or the row is empty. Such a row does not change.
        seen_tokens: Tokens of prompt and answer, for the repetition penalty.
        keys: One random key per row.
        sampling: Sampling options of each row.
        cache: Keys and values.
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
    """The tokens of one answer.

    Attributes:
        tokens: The tokens, without the end-of-sequence token.
        finish_reason: "eos" or "length".
    """

    tokens: list[int]
    finish_reason: str


@functools.partial(jax.jit, static_argnames="max_new")
def prefill(
    model: Tarsier,
    batch: Batch,
    sampling: Sampling,
    eos_ids: Int[Array, " eos"],
    keys: Array,
    max_new_tokens: Int[Array, ""],
    max_new: int,
) -> DecodeState:
    """Runs the prompts and samples the first token of each answer.

    Args:
        model: The model.
        batch: The prompts.
        sampling: Sampling options of each row.
        eos_ids: Tokens that end an answer.
        keys: One random key per row.
        max_new_tokens: Limit of the answers.
        max_new: Capacity for the answers, at least `max_new_tokens`.
    """
    B, S = batch.input_ids.shape
    logits, cache = model.prefill(batch, cache_size=S + max_new)
    valid = jnp.arange(S) < batch.lengths[:, None]
    seen_tokens = jnp.zeros(logits.shape, bool).at[jnp.arange(B)[:, None], batch.input_ids].max(valid)
    state = DecodeState(
        tokens=jnp.full((B, max_new), -1, jnp.int32),
        num_generated=jnp.zeros(B, jnp.int32),
        max_new_tokens=jnp.full(B, max_new_tokens, jnp.int32),
        last_token=jnp.zeros(B, jnp.int32),
        # Text resumes at the largest id on any axis plus one; `_emit` adds the one.
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
    eos_ids: Int[Array, " eos"],
    steps: Int[Array, ""],
    stop_after: Int[Array, ""],
    read_length: int | None = None,
) -> DecodeState:
    """Decodes until `steps` tokens per row are generated, `stop_after` answers have ended in this call, or all have.

    Args:
        model: The model.
        state: The state, which is donated.
        eos_ids: Tokens that end an answer.
        steps: Maximum number of tokens per row.
        stop_after: Number of ended answers after which the call returns.
        read_length: Number of cache positions that attention reads; None reads all. The call also returns before an
            answer needs more positions.
    """
    active_at_start, capacity = jnp.sum(~state.done), read_length or state.cache.size
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
    """Samples one token per row from `logits` and appends it."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.num_generated)
    token = sample_tokens(logits, state.sampling, state.seen_tokens, keys).astype(jnp.int32)
    rows, num_generated = jnp.arange(token.shape[0]), state.num_generated + ~state.done
    place = jnp.where(state.done, state.tokens.shape[1], state.num_generated)  # out of bounds for rows that are done
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
        model: The model.
        batch: The prompts.
        options: The same for every row.
        eos_ids: Tokens that end an answer.
        on_tokens: Called after every step with each row's new token (-1 for rows that are done). Without it the
            entire answer is one device call.
    """
    rows = batch.input_ids.shape[0]
    eos, keys = np.asarray(sorted(eos_ids), np.int32), _row_keys(options.seed, rows)
    limit = options.max_new_tokens
    capacity = -(-limit // _BLOCK) * _BLOCK
    state = prefill(model, batch, Sampling.repeat(options, rows), eos, keys, np.int32(limit), max_new=capacity)
    if on_tokens is None:
        state = decode(model, state, eos, np.int32(limit), np.int32(rows))
    else:
        state = _decode_streaming(model, state, eos, limit, on_tokens)
    return [trim_at_eos(row, set(eos_ids)) for row in np.asarray(state.tokens)]


@functools.partial(jax.jit, static_argnames="rows")
def _row_keys(seed: Int[Array, ""], rows: int) -> Array:
    """Returns the random key of each row."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))


def _decode_streaming(
    model: Tarsier,
    state: DecodeState,
    eos: HostOrDeviceArray,
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
    """Returns the answer in a row of `DecodeState.tokens`."""
    tokens = row[row >= 0].tolist()
    if tokens and tokens[-1] in eos_ids:
        return GeneratedTokens(tokens[:-1], "eos")
    return GeneratedTokens(tokens, "length")
