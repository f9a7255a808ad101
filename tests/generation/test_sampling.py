"""Choosing the next token, against Hugging Face's logits processors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tarsier_jax.errors import InputError
from tarsier_jax.generation.sampling import Sampling, SamplingOptions, filter_sorted, penalise, sample_tokens

V = 50
LOGITS = np.random.default_rng(0).standard_normal((3, V)).astype(np.float32) * 3


def filtered(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    values, order = jax.lax.top_k(logits, V)
    rows = len(logits)
    filtered = filter_sorted(values, jnp.full(rows, top_k), jnp.full(rows, top_p, jnp.float32))
    return np.take_along_axis(np.asarray(filtered), np.argsort(order, axis=1), axis=1)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (12, 0.5), (1, 0.9), (0, 1e-6)])
def test_top_k_and_top_p(top_k: int, top_p: float) -> None:
    warpers = LogitsProcessorList()
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(torch.zeros(3, 1, dtype=torch.long), torch.from_numpy(LOGITS)).numpy()
    np.testing.assert_array_equal(filtered(LOGITS, top_k, top_p), expected)


def test_repetition_penalty() -> None:
    prompt = np.array([[1, 4, 4], [0, 2, 9], [7, 7, 7]])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.from_numpy(prompt), torch.from_numpy(LOGITS.copy()))
    seen_tokens = np.zeros((3, V), bool)
    np.put_along_axis(seen_tokens, prompt, True, axis=1)
    np.testing.assert_allclose(penalise(LOGITS, seen_tokens, jnp.full(3, 1.3)), expected.numpy(), rtol=1e-6)


def test_draws_follow_the_warped_distribution() -> None:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(8), TopPLogitsWarper(0.9)])
    expected = torch.softmax(warpers(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(LOGITS[:1])), -1)[0].numpy()
    n = 20_000
    sampling = Sampling.repeat(SamplingOptions(temperature=0.7, top_k=8, top_p=0.9), n)
    keys = jax.random.split(jax.random.key(0), n)
    tokens = sample_tokens(jnp.tile(LOGITS[:1], (n, 1)), sampling, jnp.zeros((n, V), bool), keys)
    frequencies = np.bincount(tokens, minlength=V) / n
    assert (frequencies[expected == 0] == 0).all()
    np.testing.assert_allclose(frequencies, expected, atol=4 * np.sqrt(0.25 / n))  # four standard deviations


def test_temperature_zero_is_greedy_in_a_batch_that_samples() -> None:
    sampling = dataclasses.replace(Sampling.repeat(SamplingOptions(), 3), temperature=jnp.array([5.0, 0.0, 5.0]))
    keys = jax.random.split(jax.random.key(0), 3)
    assert sample_tokens(LOGITS, sampling, jnp.zeros((3, V), bool), keys)[1] == LOGITS[1].argmax()


@pytest.mark.parametrize(
    ("option", "value"), [("temperature", -1), ("top_k", -1), ("top_p", 0), ("top_p", 1.1), ("repetition_penalty", 0)]
)
def test_options_out_of_range_are_named(option: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{option} is {value}; it must be"):
        SamplingOptions(**{option: value})
