"""Losses do not depend on how samples are packed, split into parts or cut into chunks."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tarsier_jax.processing.batch import Example
from tests import reference
from tests.train.packs import make_examples, make_run, step_batch
from train.losses import sft_loss, shifted_labels, token_log_probs
from train.optimizer import OptimizerConfig
from train.state import StateSpec, StepBatch, TrainState, build_model, make_train_step

ATOL = 1e-5


@pytest.fixture
def run(tmp_path: Path) -> tuple[StateSpec, TrainState]:
    reference.make_reference(tmp_path, reference.TINY)
    return make_run(tmp_path, OptimizerConfig(peak_lr=1e-3, warmup_steps=0))


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1)
def loss_and_gradients(graph: nnx.GraphDef, params: dict[str, Any], step: StepBatch) -> jax.Array:
    """Of the mean over answer tokens."""
    batch = jax.tree.map(lambda x: x[0], step.batch)
    total, weight, _ = sft_loss(build_model(graph, params, "float32"), batch, {})
    return total / weight


def three_rows(examples: Sequence[Example]) -> list[Sequence[Example]]:
    return [examples[:3], examples[3:6], examples[6:]]


def test_packed_equals_unpacked(run: tuple[StateSpec, TrainState]) -> None:
    spec, state = run
    examples = make_examples(spec.config)
    one_a_row: list[Sequence[Example]] = [[example] for example in examples]
    loss, gradients = loss_and_gradients(spec.graph, state.params, step_batch(one_a_row, spec.config, spec.mesh))
    for rows in (three_rows(examples), [examples[2::-1], examples[7:5:-1], examples[5:2:-1]]):
        packed_loss, packed = loss_and_gradients(spec.graph, state.params, step_batch(rows, spec.config, spec.mesh))
        np.testing.assert_allclose(packed_loss, loss, atol=ATOL, rtol=0)
        for path, gradient in gradients.items():
            np.testing.assert_allclose(packed[path], gradient, atol=ATOL, rtol=0, err_msg=path)


def test_planted_bugs_are_seen(run: tuple[StateSpec, TrainState]) -> None:
    """Attention across samples, positions that count on through a row, frames that attend to their neighbours."""
    spec, state = run
    good = step_batch(three_rows(make_examples(spec.config)), spec.config, spec.mesh)
    batch = good.batch
    counting = jnp.arange(batch.input_ids.shape[-1], dtype=jnp.int32)
    bugs = {
        "segments": {"segment_ids": jnp.minimum(batch.segment_ids, 1)},
        "positions": {"position_ids": jnp.broadcast_to(counting[:, None], batch.position_ids.shape)},
        "frames": {"frame_hw": batch.frame_hw.at[..., 0, :].multiply(2)},
    }
    loss, _ = loss_and_gradients(spec.graph, state.params, good)
    for name, wrong in bugs.items():
        bad = dataclasses.replace(good, batch=dataclasses.replace(batch, **wrong))
        assert abs(loss_and_gradients(spec.graph, state.params, bad)[0] - loss) > 100 * ATOL, name


@pytest.mark.slow
def test_parts_equal_the_whole(run: tuple[StateSpec, TrainState]) -> None:
    """Answers differ in length, so a mean of means would differ."""
    spec, state = run
    examples = make_examples(spec.config)
    rows = [examples[:2], examples[2:3], examples[3:6], examples[6:]]
    after = {}
    for parts in (1, 4):
        copy = jax.tree.map(jnp.copy, state)
        new, metrics = make_train_step(spec, sft_loss)(copy, step_batch(rows, spec.config, spec.mesh, parts))
        after[parts] = (metrics["loss"], metrics["grad_norm"], new.opt_state[1].mu)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL, rtol=0), after[1], after[4])


def test_chunks_equal_the_whole(run: tuple[StateSpec, TrainState]) -> None:
    spec, state = run
    model = build_model(spec.graph, state.params, "float32")
    batch = jax.tree.map(lambda x: x[0], step_batch([make_examples(spec.config)[:3]], spec.config, spec.mesh).batch)
    x, targets = jax.jit(lambda model, batch: model.hidden(batch))(model, batch), shifted_labels(batch)
    log_probs = jax.nn.log_softmax(model.decoder.logits(x))
    picked = jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    for chunk in (7, 32, 1000):
        got = token_log_probs(model.decoder.head(), x, targets, chunk)
        np.testing.assert_allclose(got, jnp.where(targets >= 0, picked, 0), atol=ATOL, rtol=0)


def test_the_logits_of_a_row_never_exist_at_once(run: tuple[StateSpec, TrainState]) -> None:
    spec, state = run
    model = build_model(spec.graph, state.params, "float32")
    B, S, V, chunk = 2, 4096, spec.config.text.vocab_size, 64
    x, targets = jnp.zeros((B, S, spec.config.text.hidden_size)), jnp.zeros((B, S), jnp.int32)
    loss = jax.value_and_grad(lambda x: jnp.sum(token_log_probs(model.decoder.head(), x, targets, chunk)))
    largest = max(array.size for array in _arrays(jax.make_jaxpr(loss)(x).jaxpr) if V in array.shape)
    assert largest == chunk * V


def _arrays(jaxpr: Any) -> Iterator[Any]:
    """Every value that a program and the programs within it compute."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars if hasattr(v.aval, "shape"))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _arrays(inner)


def test_no_sample_predicts_the_next_ones_first_token(run: tuple[StateSpec, TrainState]) -> None:
    spec, _ = run
    first, second = make_examples(spec.config)[2:4]
    second = dataclasses.replace(second, labels=second.input_ids)  # trained on from its first token
    batch = jax.tree.map(lambda x: x[0], step_batch([[first, second]], spec.config, spec.mesh).batch)
    n = len(first.input_ids)
    targets = np.asarray(shifted_labels(batch))[0]
    assert targets[n - 1] == -100 and targets[n - 2] == first.input_ids[-1]
    np.testing.assert_array_equal(targets[n : n + len(second.input_ids) - 1], second.input_ids[1:])
