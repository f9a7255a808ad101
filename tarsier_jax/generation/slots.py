"""Slots: answers that start and end at different times share one cache of fixed size.

Prompts are packed into rows, as in training, and each layer copies their keys and values into free slots. A row does
not contain the last token of a prompt: `decode` runs it first in the slot. Prefill computes no logits.

After an answer its slot remains filled. `extend_slots` continues the content of a slot, there or in another slot, for a
prompt that begins with it.

Rows and slots form G groups, one per data-parallel part of the mesh. A prompt stays in its group.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int, UInt

from tarsier_jax.generation.decode import DecodeState, decode
from tarsier_jax.generation.sampling import Sampling, SamplingOptions
from tarsier_jax.models.attention import prefers_lengths
from tarsier_jax.models.cache import KVCache, fold_heads
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.batch import Batch
from tarsier_jax.sharding import BATCH, HEADS, constrain, current_mesh, fit_spec
from tarsier_jax.typing import Array, HostOrDeviceArray

_COPIED = 2048  # positions of a prompt that are copied at once
CACHE_AXES = (None, BATCH, None, HEADS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotAssignment:
    """The places of prompts in packed rows, and their slots; int32 (G, prompts) unless another type is listed.

    Attributes:
        count: Number of prompts per group, (G,). Later entries of the other arrays are not read.
        row: Row in the group.
        start: First position in the row.
        slot: Slot in the group.
        length: Number of tokens without the last one.
        last_token: The last token.
        last_position: Its M-RoPE position.
        max_new_tokens: Limit of the answer.
        seed: Random seed of the answer, uint32.
        top_k: As in `Sampling`.
        temperature: As in `Sampling`, float32.
        top_p: As in `Sampling`, float32.
    """

    count: Int[HostOrDeviceArray, " G"]
    row: Int[HostOrDeviceArray, "G N"]
    start: Int[HostOrDeviceArray, "G N"]
    slot: Int[HostOrDeviceArray, "G N"]
    length: Int[HostOrDeviceArray, "G N"]
    last_token: Int[HostOrDeviceArray, "G N"]
    last_position: Int[HostOrDeviceArray, "G N"]
    max_new_tokens: Int[HostOrDeviceArray, "G N"]
    seed: UInt[HostOrDeviceArray, "G N"]
    top_k: Int[HostOrDeviceArray, "G N"]
    temperature: Float[HostOrDeviceArray, "G N"]
    top_p: Float[HostOrDeviceArray, "G N"]
    repetition_penalty: Float[HostOrDeviceArray, "G N"]

    @classmethod
    def none(cls, groups: int, prompts: int) -> "SlotAssignment":
        """Returns arrays of zeros for up to `prompts` prompts per group."""
        floats = dict.fromkeys(("temperature", "top_p", "repetition_penalty"), np.float32)
        dtypes = {"seed": np.uint32, **floats}
        names = [field.name for field in dataclasses.fields(cls)[1:]]
        arrays = {name: np.zeros((groups, prompts), dtypes.get(name, np.int32)) for name in names}
        return cls(np.zeros(groups, np.int32), **arrays)


def empty_slots(model: Tarsier, slots: int, size: int, max_new: int, mesh: Mesh | None = None) -> DecodeState:
    """Returns a model's empty slots with a capacity of `size` tokens each, up to `max_new` of them new."""

    def make() -> DecodeState:
        integers = {
            name: jnp.zeros(slots, jnp.int32)
            for name in ("num_generated", "max_new_tokens", "last_token", "last_position")
        }
        return DecodeState(
            tokens=jnp.full((slots, max_new), -1, jnp.int32),
            done=jnp.ones(slots, bool),
            seen_tokens=jnp.zeros((slots, model.config.text.vocab_size), bool),
            keys=jax.vmap(jax.random.key)(jnp.zeros(slots, jnp.uint32)),
            sampling=Sampling.repeat(SamplingOptions(), slots),
            cache=model.decoder.empty_cache(slots, size),
            **integers,
        )

    return jax.jit(make, out_shardings=None if mesh is None else slot_shardings(jax.eval_shape(make), mesh))()


def slot_shardings(state: DecodeState, mesh: Mesh) -> DecodeState:
    """Returns the shardings of the state: the cache is split by groups and heads, the other arrays are replicated."""

    cache, replicated = state.cache, NamedSharding(mesh, P())
    split = NamedSharding(mesh, _cache_spec(cache, mesh))
    cache = dataclasses.replace(cache, k=(split,) * len(cache.k), v=(split,) * len(cache.v), lengths=replicated)
    return dataclasses.replace(jax.tree.map(lambda _: replicated, state), cache=cache)


def _cache_spec(cache: KVCache, mesh: Mesh | AbstractMesh) -> P:
    """Returns the spec of the keys and values: whole heads are split."""
    return fit_spec((*cache.k[0].shape[:3], cache.num_kv_heads), CACHE_AXES, mesh)


@functools.partial(jax.jit, static_argnames=("step", "num_features"))
def encode_frames(
    model: Tarsier,
    patches: Float[Array, "G F P C"],
    frame_hw: Int[Array, "G F M 2"],
    steps: Int[Array, ""],
    step: int,
    num_features: int,
) -> Float[Array, "G num_features D"]:
    """Returns the features of each group's frames, padded to `num_features`: all buckets of frames share one prefill.

    Args:
        model: The model.
        patches: The patches of all bins.
        frame_hw: Height and width of the frames in patches.
        steps: Number of calls of the vision tower, enough for the bins in use.
        step: Bins per group and call; it divides F.
        num_features: Number of features per group.
    """
    merged = model.config.vision.num_tokens(step * patches.shape[2])
    features = jnp.zeros((patches.shape[0], num_features, model.config.text.hidden_size), model.config.dtype)

    def one(i: Int[Array, ""], features: Array) -> Array:
        bins = (lax.dynamic_slice_in_dim(x, i * step, step, axis=1) for x in (patches, frame_hw))
        # Otherwise XLA splits the slices as the vision tower does, and gathers all patches before it slices them.
        bins = (constrain(x, BATCH, *(None,) * (x.ndim - 1)) for x in bins)
        new = _encode_bins(model, *bins).astype(features.dtype)
        return lax.dynamic_update_slice_in_dim(features, new, i * merged, axis=1)

    return lax.fori_loop(0, steps, one, constrain(features, BATCH, None, None))


def _encode_bins(
    model: Tarsier, patches: Float[Array, "G F P C"], frame_hw: Int[Array, "G F M 2"]
) -> Float[Array, "G features D"]:
    """Calls `model.encode_frames`, without segments if no bin contains several frames."""
    if frame_hw.shape[2] == 1 or not prefers_lengths(model.config.attention):
        return model.encode_frames(patches, frame_hw)
    is_shared = jnp.any(frame_hw[:, :, 1:] > 0)
    return lax.cond(
        is_shared,
        model.encode_frames,
        lambda patches, hw: model.encode_frames(patches, hw[:, :, :1]),
        patches,
        frame_hw,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedPrompts(KVCache):
    """The cache of the slots, which the layers fill from rows of packed prompts.

    The keys and values of a layer pass to the slots before the next layer runs: those of all layers of a row would be
    the largest temporaries of prefill.

    Attributes:
        prompts: The places of the prompts in the rows, and their slots.
    """

    prompts: SlotAssignment = dataclasses.field(kw_only=True)

    def fill(self, layer: int | Int[Array, ""], k: Float[Array, "R T K H"], v: Float[Array, "R T K H"]) -> KVCache:
        """Copies the prompts of one layer from their rows to their slots.

        Positions after a prompt are overwritten or never read.
        """
        slots, index = self._array_of(layer)
        block = min(_COPIED, self.size)
        rows = tuple((jnp.pad(fold_heads(x, slots.k[0].dtype), ((0, 0), (0, block), (0, 0)))[None],) for x in (k, v))
        prompts = self.prompts
        where = jnp.full_like(prompts.count, index), prompts.count, prompts.row, prompts.start, prompts.slot
        copy = functools.partial(_copy_prompts, block=block)
        (k,), (v,) = _in_groups(copy, (*where, prompts.length), slots, rows)
        return self._replace(layer, k, v)


@functools.partial(jax.jit, donate_argnames="state")
def prefill_into_slots(
    model: Tarsier, state: DecodeState, rows: Batch, features: Float[Array, "G features D"], prompts: SlotAssignment
) -> DecodeState:
    """Runs packed prompts and starts their answers in their slots.

    Rows of one prompt each need no `segment_ids`, as their attention is causal.
    """
    cache = _run_rows(model, rows, features, state.cache, prompts)
    return _start_answers(state, cache, prompts, _prompt_tokens(rows, prompts, state.seen_tokens.shape[1]))


@functools.partial(jax.jit, donate_argnames="state", static_argnames="read_length")
def decode_slots(
    model: Tarsier,
    state: DecodeState,
    cancelled: Bool[Array, " B"],
    eos_ids: Int[Array, " eos"],
    steps: Int[Array, ""],
    stop_after: Int[Array, ""],
    read_length: int | None = None,
) -> tuple[DecodeState, tuple[Array, Array]]:
    """Ends cancelled answers and calls `decode`. Returns the state, and `done` and `tokens` for the host."""
    state = decode(
        model, dataclasses.replace(state, done=state.done | cancelled), eos_ids, steps, stop_after, read_length
    )
    return state, (state.done, state.tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Continuation:
    """Tokens of one prompt per group that follow those in its slot.

    Attributes:
        input_ids: The tokens, padded.
        position_ids: Their M-RoPE ids.
        source: Slot in the group whose tokens precede them.
        start: Number of these tokens; later ones in the slot of the prompt are overwritten.
        num_new: Number of tokens without padding.
        prompt: The entire prompt, padded.
        prompt_length: Number of tokens of the prompt.
    """

    input_ids: Int[HostOrDeviceArray, "G T"]
    position_ids: Int[HostOrDeviceArray, "G T 3"]
    source: Int[HostOrDeviceArray, " G"]
    start: Int[HostOrDeviceArray, " G"]
    num_new: Int[HostOrDeviceArray, " G"]
    prompt: Int[HostOrDeviceArray, "G P"]
    prompt_length: Int[HostOrDeviceArray, " G"]

    @classmethod
    def none(cls, groups: int, tokens: int, prompt_tokens: int) -> "Continuation":
        """Returns arrays of zeros for `tokens` tokens of prompts of up to `prompt_tokens`."""
        shapes = (tokens,), (tokens, 3), (), (), (), (prompt_tokens,), ()
        return cls(*(np.zeros((groups, *shape), np.int32) for shape in shapes))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExtendedSlots(KVCache):
    """The cache of the slots, of which the layers extend one slot per group.

    A layer passes a slot's keys and values to the slot of the prompt before the next layer runs: those of all layers of
    a slot would be the largest temporaries.

    Attributes:
        lengths: Number of tokens that precede the new ones, per group.
        source: Slot in each group that contains these tokens.
        prompts: The slot of the prompt in each group, if it has one.
    """

    lengths: Int[Array, " G"]
    source: Int[Array, " G"] = dataclasses.field(kw_only=True)
    prompts: SlotAssignment = dataclasses.field(kw_only=True)

    def append(
        self, layer: int | Int[Array, ""], k: Float[Array, "G T K H"], v: Float[Array, "G T K H"]
    ) -> tuple[KVCache, Float[Array, "G S K H"], Float[Array, "G S K H"]]:
        """Writes the tokens that precede, and T further tokens, to the slots of the prompts.

        Returns:
            The cache, and all keys and all values of the prompts in the layer.
        """
        prompts = self.prompts
        slots, index = self._array_of(layer)
        index = jnp.full_like(self.source, index)
        taken_k, taken_v = _in_groups(_take_slot, (index, self.source), slots)
        rows, k, v = KVCache(taken_k, taken_v, self.lengths, self.num_kv_heads).append(0, k, v)
        where = index, prompts.slot[:, 0], prompts.count
        (new_k,), (new_v,) = _in_groups(_put_slot, where, slots, (rows.k, rows.v))
        return self._replace(layer, new_k, new_v), k, v


@functools.partial(jax.jit, donate_argnames="state")
def extend_slots(model: Tarsier, state: DecodeState, new: Continuation, prompts: SlotAssignment) -> DecodeState:
    """Runs further tokens of at most one prompt per group into its slot, and starts its answer there.

    The slot receives the content of the source, which remains there. An answer may be in progress in the source.

    If a prompt needs several calls, the others must precede the next call of `decode_slots`.
    """
    x = model.decoder.embed(new.input_ids).astype(model.config.dtype)
    slots = state.cache
    extended = ExtendedSlots(slots.k, slots.v, new.start, slots.num_kv_heads, source=new.source, prompts=prompts)
    _, extended = model.extend(x, new.position_ids, extended, new.num_new)
    cache = dataclasses.replace(slots, k=extended.k, v=extended.v)
    G, V = new.prompt.shape[0], state.seen_tokens.shape[1]
    valid = jnp.arange(new.prompt.shape[1]) < new.prompt_length[:, None]
    seen_tokens = jnp.zeros((G, V), bool).at[jnp.arange(G)[:, None], new.prompt].max(valid)
    return _start_answers(state, cache, prompts, seen_tokens[:, None])


def _start_answers(
    state: DecodeState, cache: KVCache, prompts: SlotAssignment, seen_tokens: Bool[Array, "G N V"]
) -> DecodeState:
    """Returns the state with a new cache, in which the answers to prompts start in their slots.

    Args:
        state: The state.
        cache: The cache with the prompts, without their lengths.
        prompts: The prompts.
        seen_tokens: The tokens of each prompt.
    """
    G, N = prompts.slot.shape
    B = state.done.shape[0]
    slots = prompts.slot + (B // G) * jnp.arange(G)[:, None]
    slots = jnp.where(jnp.arange(N) < prompts.count[:, None], slots, B).reshape(-1)  # B is out of bounds

    def put(old: Array, new: Array | int | bool) -> Array:
        values = new.reshape(slots.size, *old.shape[1:]) if isinstance(new, jax.Array) else new
        return old.at[slots].set(values, mode="drop")

    # The key of the first row in `generate_batch`: an answer equals that of a batch with one row.
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))(prompts.seed.reshape(-1))
    options = {name: put(getattr(state.sampling, name), getattr(prompts, name)) for name in _OPTIONS}
    return dataclasses.replace(
        state,
        tokens=put(state.tokens, -1),
        num_generated=put(state.num_generated, 0),
        max_new_tokens=put(state.max_new_tokens, prompts.max_new_tokens),
        last_token=put(state.last_token, prompts.last_token),
        last_position=put(state.last_position, prompts.last_position),
        done=put(state.done, False),
        seen_tokens=put(state.seen_tokens, seen_tokens),
        keys=put(state.keys, keys),
        sampling=dataclasses.replace(state.sampling, **options),
        cache=dataclasses.replace(cache, lengths=put(cache.lengths, prompts.length)),
    )


def _run_rows(
    model: Tarsier, rows: Batch, features: Float[Array, "G features D"], slots: KVCache, prompts: SlotAssignment
) -> KVCache:
    """Returns the slots with the keys and values of packed prompts, without their lengths."""
    x = model.merge_vision_embeddings(rows, features)
    cache = PackedPrompts(slots.k, slots.v, slots.lengths, slots.num_kv_heads, prompts=prompts)
    filled = model.decoder.fill_cache(x, rows.position_ids, cache, rows.segment_ids)[1]
    return dataclasses.replace(slots, k=filled.k, v=filled.v)


_OPTIONS = ("temperature", "top_k", "top_p", "repetition_penalty")


def _prompt_tokens(rows: Batch, prompts: SlotAssignment, vocab_size: int) -> Bool[Array, "G N V"]:
    """Returns which tokens each prompt contains, its last one included."""
    R, T = rows.input_ids.shape
    G, N = prompts.slot.shape
    row = prompts.row + (R // G) * jnp.arange(G)[:, None]  # (G, N) of all rows
    start, end = prompts.start[..., None], (prompts.start + prompts.length)[..., None]
    inside = (jnp.arange(T) >= start) & (jnp.arange(T) < end)  # (G, N, T)
    group, n = jnp.arange(G)[:, None], jnp.arange(N)
    seen_tokens = jnp.zeros((G, N, vocab_size), bool).at[group, n, prompts.last_token].set(True)
    return seen_tokens.at[group[..., None], n[:, None], rows.input_ids[row]].max(inside)


def _in_groups(function: Callable[..., Any], where: tuple[Array, ...], slots: KVCache, *others: Any) -> Any:
    """Returns keys and values that `function` computes for each group, on the devices of the group.

    Args:
        function: Returns keys and values from those of the slots, those of `others`, and `where`.
        where: Arrays whose first dimension is the group.
        slots: The slots.
        others: Keys and values with the same groups.
    """
    mesh, pairs = current_mesh(), [(slots.k, slots.v), *others]
    if mesh is not None:
        spec = _cache_spec(slots, mesh)
        specs = (*(spec for _ in pairs), *(P(BATCH) for _ in where))
        function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return function(*pairs, *where)


def _copy_prompts(
    slots: tuple[tuple[Float[Array, "layers B S KH"]], ...],
    rows: tuple[tuple[Float[Array, "1 R T KH"]], ...],
    layer: Int[Array, " 1"],
    count: Int[Array, " 1"],
    row: Int[Array, "1 prompts"],
    start: Int[Array, "1 prompts"],
    slot: Int[Array, "1 prompts"],
    length: Int[Array, "1 prompts"],
    block: int,
) -> Any:
    """Copies prompts of one layer, `block` positions at a time."""
    size = slots[0][0].shape[2]

    def copy_prompt(i: Int[Array, ""], slots: Any) -> Any:
        def copy_block(j: Int[Array, ""], slots: Any) -> Any:
            offset = jnp.minimum(j * block, size - block)  # the last block may overlap the one before it

            def put(array: Array, new: Array) -> Array:
                piece = lax.dynamic_slice(new, (0, row[0, i], start[0, i] + offset, 0), (1, 1, block, new.shape[3]))
                return lax.dynamic_update_slice(array, piece, (layer[0], slot[0, i], offset, 0))

            return jax.tree.map(put, slots, rows)

        return lax.fori_loop(0, -(-length[0, i] // block), copy_block, slots)

    return lax.fori_loop(0, count[0], copy_prompt, slots)


def _take_slot(slots: Any, layer: Int[Array, " 1"], slot: Int[Array, " 1"]) -> Any:
    """Returns the keys and values of one layer of one slot."""

    def take(array: Float[Array, "layers B S KH"]) -> Float[Array, "1 1 S KH"]:
        return lax.dynamic_slice(array, (layer[0], slot[0], 0, 0), (1, 1, *array.shape[2:]))

    return jax.tree.map(take, slots)


def _put_slot(slots: Any, rows: Any, layer: Int[Array, " 1"], slot: Int[Array, " 1"], count: Int[Array, " 1"]) -> Any:
    """Replaces the keys and values of one layer of one slot, unless `count` is 0."""

    def put(array: Array, new: Array, old: Array) -> Array:
        return lax.dynamic_update_slice(array, jnp.where(count[0] > 0, new, old), (layer[0], slot[0], 0, 0))

    return jax.tree.map(put, slots, rows, _take_slot(slots, layer, slot))
