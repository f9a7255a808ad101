"""Losses of packed batches. Each returns (sum, weight, metrics); the trainer sums them and divides once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.batch import Batch
from tarsier_jax.sharding import BATCH, current_mesh, fit_spec

CHUNK = 512  # tokens per device whose logits exist at the same time

# The sum of a loss, its divisor, and the sums of other metrics with the same divisor.
Loss = tuple[Float[Array, ""], Float[Array, ""], dict[str, Float[Array, ""]]]


def shifted_labels(batch: Batch) -> Int[Array, "B S"]:
    """Returns the target of each position: the label of the next token of the same sample, or -100."""
    assert batch.segment_ids is not None
    same = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    targets = jnp.where(same, batch.labels[:, 1:], -100)
    return jnp.pad(targets, ((0, 0), (0, 1)), constant_values=-100)


def token_log_probs(
    head: Float[Array, "V D"], x: Float[Array, "B S D"], targets: Int[Array, "B S"], chunk: int = CHUNK
) -> Float[Array, "B S"]:
    """Returns log p(target) at each position, float32; 0 where the target is -100.

    Args:
        head: `Decoder.head()`.
        x: Final hidden states.
        targets: From `shifted_labels`.
        chunk: Tokens per device whose logits exist at the same time; the backward pass recomputes them.
    """
    mesh = current_mesh()
    if mesh is None:
        whole: Any = _target_logits(head, x, targets, 0, chunk)  # pyright does not know the type of a custom_vjp
        target_logits, normalizers = whole
        return jnp.where(targets >= 0, target_logits - normalizers, 0.0)

    def on_device(head: Array, x: Array, targets: Array) -> Array:
        # Gathered here, the head crosses the network once, and its gradient once, instead of in every chunk.
        head = jax.lax.all_gather(head, "fsdp", axis=1, tiled=True)
        first = jax.lax.axis_index("tensor") * head.shape[0]
        own: Any = _target_logits(head, x, targets, first, chunk)
        target_logits, normalizers = own
        log_probs = jax.lax.psum(target_logits, "tensor") - _logsumexp_over(normalizers, "tensor")
        return jnp.where(targets >= 0, log_probs, 0.0)

    rows = fit_spec(targets.shape, (BATCH, None), mesh)
    specs = (P("tensor", "fsdp"), rows, rows)
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(head, x, targets)


def _logsumexp_over(x: Array, axis: str) -> Array:
    """Returns log(sum(exp(x))) over the devices of a mesh axis."""
    largest = jax.lax.pmax(jax.lax.stop_gradient(x), axis)
    return jnp.log(jax.lax.psum(jnp.exp(x - largest), axis)) + largest


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _target_logits(head: Array, x: Array, targets: Array, first: Array | int, chunk: int) -> tuple[Array, Array]:
    """Returns the logit of each target and the logsumexp of all logits, float32 (B, S); 0 at some other positions.

    Only chunks of positions with a target are computed, in both passes.

    Args:
        head: Rows of the output matrix: all, or those of one device.
        x: Hidden states.
        targets: See `token_log_probs`; the logit of the row of another device is 0.
        first: Index of the first row.
        chunk: See `token_log_probs`.
    """
    positions, steps = _positions_of_targets(targets, chunk)

    def one(i: Array, out: tuple[Array, Array]) -> tuple[Array, Array]:
        index = positions[i]
        target_logits, normalizers = _logits_of_chunk(head, _take(x, index), _take(targets, index) - first)
        return _put(out[0], index, target_logits), _put(out[1], index, normalizers)

    zeros = jnp.zeros(targets.shape, jnp.float32)
    return jax.lax.fori_loop(0, steps, one, (zeros, zeros))


def _target_logits_forward(head: Array, x: Array, targets: Array, first: Array | int, chunk: int) -> tuple[Any, Any]:
    return _target_logits(head, x, targets, first, chunk), (head, x, targets, first)


def _target_logits_backward(chunk: int, residuals: Any, cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    head, x, targets, first = residuals
    positions, steps = _positions_of_targets(targets, chunk)

    def one(i: Array, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
        index = positions[i]
        of_chunk = functools.partial(_logits_of_chunk, targets=_take(targets, index) - first)
        _, pullback = jax.vjp(of_chunk, head, _take(x, index))
        of_head, of_x = pullback(tuple(_take(c, index) for c in cotangents))
        return gradients[0] + of_head, _put(gradients[1], index, of_x)

    return *jax.lax.fori_loop(0, steps, one, (jnp.zeros_like(head), jnp.zeros_like(x))), None, None


_target_logits.defvjp(_target_logits_forward, _target_logits_backward)


def _logits_of_chunk(head: Array, x: Array, targets: Array) -> tuple[Array, Array]:
    logits = jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)
    # A comparison, since the targets of other devices are not among the rows.
    at_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.sum(jnp.where(at_target, logits, 0.0), axis=-1), jax.nn.logsumexp(logits, axis=-1)


def _positions_of_targets(targets: Array, chunk: int) -> tuple[Array, Array]:
    """Returns positions (n, B, chunk), those of targets first and S for none, and the chunks that contain targets."""
    B, S = targets.shape
    chunk = min(max(chunk // B, 1), S)  # of each row
    order = jnp.argsort(targets < 0, axis=1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, -S % chunk)), constant_values=S)
    largest = jnp.max(jnp.sum(targets >= 0, axis=1))
    return order.reshape(B, -1, chunk).swapaxes(0, 1), -(-largest // chunk)


def _take(x: Array, index: Array) -> Array:
    """Returns x[b, index[b]] of each row b; 0 for positions that do not exist."""
    return jax.vmap(lambda x, index: x.at[index].get(mode="fill", fill_value=0))(x, index)


def _put(x: Array, index: Array, values: Array) -> Array:
    """Sets x[b, index[b]] of each row b, except at positions that do not exist."""
    return jax.vmap(lambda x, index, values: x.at[index].set(values, mode="drop"))(x, index, values)


def sft_loss(model: Tarsier, batch: Batch, extra: dict[str, Any]) -> Loss:
    """Returns the cross-entropy of the assistant's tokens; the weight is their number."""
    del extra
    targets = shifted_labels(batch)
    log_probs = token_log_probs(model.decoder.head(), model.hidden(batch), targets)
    return -jnp.sum(log_probs), jnp.sum(targets >= 0, dtype=jnp.float32), {}


def pair_log_probs(model: Tarsier, batch: Batch, pairs: int) -> Float[Array, "B pairs 2"]:
    """Returns log p(answer) of the chosen and the rejected answer of each pair; 0 for absent pairs.

    The samples of a row are chosen, rejected, chosen, rejected, and so on.
    """
    log_probs = token_log_probs(model.decoder.head(), model.hidden(batch), shifted_labels(batch))
    segments = jnp.arange(1, 2 * pairs + 1)
    own = batch.segment_ids[..., None] == segments  # [B, S, 2 * pairs]
    return jnp.einsum("bs,bsp->bp", log_probs, own.astype(jnp.float32)).reshape(-1, pairs, 2)


def dpo_loss(model: Tarsier, batch: Batch, extra: dict[str, Any], beta: float, pairs: int) -> Loss:
    """Returns the loss of direct preference optimisation; the weight is the number of pairs.

    -log sigmoid(beta * ((chosen - reference chosen) - (rejected - reference rejected))), in log-probabilities of whole
    answers. Source: equation 7 of arXiv 2305.18290.

    Args:
        extra: "reference", float32 (B, pairs, 2), the reference model's `pair_log_probs`; or "reference_model".
        beta: Factor of the margin.
        pairs: Largest number of pairs per row.
    """
    reference = extra.get("reference")
    if reference is None:
        reference = jax.lax.stop_gradient(pair_log_probs(extra["reference_model"], batch, pairs))
    present = jnp.max(batch.segment_ids, axis=1)[:, None] >= 2 * jnp.arange(1, pairs + 1)  # [B, pairs]
    policy = pair_log_probs(model, batch, pairs)
    rewards = beta * (policy - reference)  # [B, pairs, 2]
    margin = rewards[..., 0] - rewards[..., 1]
    metrics = {
        "reward_chosen": rewards[..., 0],
        "reward_rejected": rewards[..., 1],
        "margin": margin,
        "accuracy": (margin > 0).astype(jnp.float32),
        "log_prob_chosen": policy[..., 0],
        "log_prob_rejected": policy[..., 1],
    }

    def total(values: Array) -> Array:
        return jnp.sum(jnp.where(present, values, 0.0))

    weight = jnp.sum(present, dtype=jnp.float32)
    return total(-jax.nn.log_sigmoid(margin)), weight, {name: total(values) for name, values in metrics.items()}
