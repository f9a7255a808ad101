"""Prefill and decoding: two compiled programs, and the state that passes between them."""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from tarsier_jax.errors import InputError
from tarsier_jax.generation.sampling import Sampling, next_tokens
from tarsier_jax.models.cache import KVCache
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.batch import Batch

_BLOCK = 128  # answers get room in whole blocks, so that other values of max_new_tokens seldom compile anything


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that changes from token to token; donated to each call of `decode`.

    step: how many tokens every row has got (rows that are done get -1).
    tokens: the answers, -1 where nothing was written.  last: each row's newest token.
    position: the M-RoPE position of `last`.  done: the row has met an end-of-sequence token.
    seen: tokens of prompt and answer, for the repetition penalty; no columns when there is none.
    keys: one random key a row.
    """

    step: Int[Array, ""]
    tokens: Int[Array, "B max_new"]
    last: Int[Array, " B"]
    position: Int[Array, " B"]
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"]
    keys: Array
    cache: KVCache


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer: its tokens, the end-of-sequence token left off, and why it ended ("eos" or "length")."""

    tokens: list[int]
    finish_reason: str


@functools.partial(jax.jit, static_argnames="max_new")
def prefill(
    model: Tarsier, batch: Batch, sampling: Sampling, eos_ids: Int[Array, " E"], keys: Array, max_new: int
) -> DecodeState:
    """Runs the prompts and takes the first token of each answer; `max_new` is the room for answers."""
    B, S = batch.input_ids.shape
    logits, cache = model.prefill(batch, cache_size=S + max_new)
    valid = jnp.arange(S) < batch.lengths[:, None]
    seen = jnp.zeros((B, logits.shape[-1] if sampling.penalised else 0), bool)
    if sampling.penalised:
        seen = seen.at[jnp.arange(B)[:, None], batch.input_ids].max(valid)
    state = DecodeState(
        step=jnp.int32(0),
        tokens=jnp.full((B, max_new), -1, jnp.int32),
        last=jnp.zeros(B, jnp.int32),
        # Text goes on one after the largest id on any axis; `_emit` steps onto it.
        position=jnp.max(jnp.where(valid, batch.position_ids, -1), axis=(0, 2)),
        done=jnp.zeros(B, bool),
        seen=seen,
        keys=keys,
        cache=cache,
    )
    return _emit(state, logits, sampling, eos_ids)


@functools.partial(jax.jit, donate_argnames="state")
def decode(
    model: Tarsier, state: DecodeState, sampling: Sampling, eos_ids: Int[Array, " E"], limit: Int[Array, ""]
) -> DecodeState:
    """Goes on until every answer has `limit` tokens or has ended."""

    def unfinished(state: DecodeState) -> Bool[Array, ""]:
        return (state.step < limit) & ~jnp.all(state.done)

    def body(state: DecodeState) -> DecodeState:
        logits, cache = model.step(state.last, state.position, state.cache)
        return _emit(dataclasses.replace(state, cache=cache), logits, sampling, eos_ids)

    return jax.lax.while_loop(unfinished, body, state)


def _emit(state: DecodeState, logits: Array, sampling: Sampling, eos_ids: Array) -> DecodeState:
    """Takes one token a row from `logits` and writes it down."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
    token = next_tokens(logits, sampling, state.seen, keys).astype(jnp.int32)
    rows = jnp.arange(token.shape[0])
    return dataclasses.replace(
        state,
        step=state.step + 1,
        tokens=state.tokens.at[:, state.step].set(jnp.where(state.done, -1, token)),
        last=token,
        position=state.position + 1,
        done=state.done | jnp.isin(token, eos_ids),
        seen=state.seen.at[rows, token].set(True) if sampling.penalised else state.seen,
    )


def generate_batch(
    model: Tarsier,
    batch: Batch,
    *,
    sampling: Sampling,
    eos_ids: Iterable[int],
    max_new_tokens: int,
    seed: int = 0,
    on_tokens: Callable[[Int[np.ndarray, " B"]], None] | None = None,
) -> list[Generation]:
    """Answers every row of a batch.

    Args:
        on_tokens: called after every step with each row's new token (-1 for rows that are done). Without it the
            whole answer is one device call.

    Raises:
        InputError: max_new_tokens is below 1.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    rows = batch.input_ids.shape[0]
    eos = jnp.asarray(sorted(eos_ids), jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))
    room = -(-max_new_tokens // _BLOCK) * _BLOCK
    state = prefill(model, batch, sampling, eos, keys, max_new=room)
    if on_tokens is None:
        state = decode(model, state, sampling, eos, jnp.int32(max_new_tokens))
    else:
        state = _decode_aloud(model, state, sampling, eos, max_new_tokens, on_tokens)
    tokens, step = np.asarray(state.tokens), int(state.step)
    return [_finish(row[:step].tolist(), set(eos_ids)) for row in tokens]


def _decode_aloud(
    model: Tarsier,
    state: DecodeState,
    sampling: Sampling,
    eos: Array,
    max_new_tokens: int,
    on_tokens: Callable[[Int[np.ndarray, " B"]], None],
) -> DecodeState:
    for step in range(1, max_new_tokens + 1):
        on_tokens(np.asarray(state.tokens[:, step - 1]))
        if step == max_new_tokens or bool(np.asarray(state.done).all()):
            break
        state = decode(model, state, sampling, eos, jnp.int32(step + 1))
    return state


def _finish(tokens: list[int], eos_ids: set[int]) -> Generation:
    tokens = [t for t in tokens if t >= 0]
    if tokens and tokens[-1] in eos_ids:
        return Generation(tokens[:-1], "eos")
    return Generation(tokens, "length")
