"""The whole model against the live Hugging Face model: logits, greedy answers, and bugs that must not go unseen."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tarsier_jax.models.decoder
import tarsier_jax.models.qwen2_vit
from tarsier_jax.generation.decode import generate_batch
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.models.tarsier import Tarsier, unstack
from tests import reference
from tests.reference import BUCKETS, CASES, SMALL, TINY, TRUE_WIDTHS

ATOL = 1e-4
EOS = [2]
SIZES = {"tiny": TINY, "true widths": TRUE_WIDTHS}
*SHORT_CASES, _ = CASES
LONG_CASES = list(CASES)[-1:]


@pytest.fixture(scope="module", params=["tiny", pytest.param("true widths", marks=pytest.mark.slow)])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tarsier]:
    directory = tmp_path_factory.mktemp("reference")
    theirs = reference.make_reference(directory, SIZES[request.param])
    return theirs, reference.load_ours(directory)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tarsier, Path]:
    directory = tmp_path_factory.mktemp("tiny")
    return reference.make_reference(directory, TINY), reference.load_ours(directory), directory


def check_logits(theirs: Any, ours: Tarsier, case: str) -> None:
    examples, batch = reference.make_case(case, ours.config)
    logits = np.asarray(jax.jit(lambda model, batch: model(batch))(ours, batch))
    for row, example in zip(logits, examples, strict=True):
        expected = reference.reference_logits(theirs, example)
        assert np.abs(expected).max() > 1  # a model of zeros would agree with anything
        np.testing.assert_allclose(row[: len(expected)], expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_logits(models: tuple[Any, Tarsier], case: str) -> None:
    check_logits(*models, case)


@pytest.mark.parametrize("cases", [SHORT_CASES, LONG_CASES], ids=["short", "long"])
def test_greedy_answers(models: tuple[Any, Tarsier], cases: list[str]) -> None:
    """Many rows per batch, and fewer tokens at true widths: each step of decoding reads all weights."""
    theirs, ours = models
    num_tokens = 64 if ours.config.text.hidden_size < 1000 else 24
    examples = [example for case in cases for example in reference.make_case(case, ours.config)[0]]
    batch = reference.make_batch(examples, ours.config, dataclasses.replace(BUCKETS, frames=(8, 32)))
    answers = generate_batch(ours, batch, SamplingOptions(max_new_tokens=num_tokens), eos_ids=[])
    for answer, tokens in zip(answers, reference.reference_answers(theirs, examples, num_tokens), strict=True):
        assert answer.tokens == tokens
        assert len(set(tokens)) > 8  # one token over and over would prove little


@pytest.mark.parametrize("case", CASES)
def test_prefill_and_decode_equal_the_full_forward_pass(tiny: tuple[Any, Tarsier, Path], case: str) -> None:
    _, ours, _ = tiny
    examples, _ = reference.make_case(case, ours.config)
    cut = 6  # the last tokens are decoded one by one
    short = [_first(example, len(example.input_ids) - cut) for example in examples]
    batch = reference.make_batch(short, ours.config, reference.BUCKETS)
    whole = jax.jit(lambda m, b: m(b))(ours, reference.make_batch(examples, ours.config, reference.BUCKETS))
    logits, cache = jax.jit(lambda m, b: m.prefill(b, cache_size=b.input_ids.shape[1] + cut))(ours, batch)
    step = jax.jit(lambda m, *x: m.step(*x))
    for i in range(cut):
        at = [len(example.input_ids) - cut + i for example in examples]
        expected = np.stack([whole[row, n - 1] for row, n in enumerate(at)])
        np.testing.assert_allclose(logits, expected, atol=ATOL, rtol=0)
        tokens = jnp.array([example.input_ids[n] for example, n in zip(examples, at, strict=True)])
        positions = jnp.array([example.position_ids[0, n] for example, n in zip(examples, at, strict=True)])
        logits, cache = step(ours, tokens, positions, cache)


def _first(example: reference.Example, n: int) -> reference.Example:
    return reference.Example(
        example.input_ids[:n], example.labels[:n], example.pixel_values, example.grid_thw, example.position_ids[:, :n]
    )


@pytest.mark.parametrize("case", CASES)
def test_unstacked_layers_give_the_same(tiny: tuple[Any, Tarsier, Path], case: str) -> None:
    theirs, _, directory = tiny
    check_logits(theirs, unstack(reference.load_ours(directory)), case)


def test_tied_embeddings(tmp_path: Path) -> None:
    theirs = reference.make_reference(tmp_path, TINY, tied=True)
    ours = reference.load_ours(tmp_path)
    assert ours.decoder.lm_head is None
    check_logits(theirs, ours, "two videos of different sizes")


def _swapped_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = tarsier_jax.models.decoder.mrope_tables
    monkeypatch.setattr(
        tarsier_jax.models.decoder, "mrope_tables", lambda p, h, t, s: tables(p[..., jnp.array([1, 0, 2])], h, t, s)
    )


def _frames_not_separated(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = tarsier_jax.models.qwen2_vit.attend

    def across(q: Any, k: Any, v: Any, **options: Any) -> Any:
        q, k, v = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
        return attend(q, k, v).reshape(options["kv_lengths"].shape[0], -1, *q.shape[2:])

    monkeypatch.setattr(tarsier_jax.models.qwen2_vit, "attend", across)


def _padding_attended(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = tarsier_jax.models.qwen2_vit.attend
    monkeypatch.setattr(tarsier_jax.models.qwen2_vit, "attend", lambda q, k, v, **_: attend(q, k, v))


def _groups_out_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = tarsier_jax.models.decoder.attend

    def interleaved(q: Any, k: Any, v: Any, **options: Any) -> Any:  # query n reads key-value head n % K
        q = q.reshape(*q.shape[:2], -1, k.shape[2], q.shape[3]).swapaxes(2, 3).reshape(q.shape)
        out = attend(q, k, v, **options)
        return out.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3]).swapaxes(2, 3).reshape(q.shape)

    monkeypatch.setattr(tarsier_jax.models.decoder, "attend", interleaved)


@pytest.mark.parametrize("bug", [_swapped_sections, _frames_not_separated, _padding_attended, _groups_out_of_order])
def test_a_planted_bug_is_seen(tiny: tuple[Any, Tarsier, Path], bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours, _ = tiny
    bug(monkeypatch)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_logits(theirs, ours, "two videos of different sizes")


@pytest.mark.slow
def test_bfloat16_is_as_close_as_the_references_own(tmp_path: Path) -> None:
    """Mean KL to the float32 reference, over all cases: ours at most 1.5 times that of the reference in bfloat16."""
    theirs = reference.make_reference(tmp_path, SMALL)
    ours = reference.load_ours(tmp_path, dtype="bfloat16", param_dtype="bfloat16")
    exact, half, mine = [], [], []
    for case in CASES:
        examples, batch = reference.make_case(case, ours.config)
        logits = np.asarray(jax.jit(lambda model, batch: model(batch))(ours, batch))
        mine += [row[: len(e.input_ids)] for row, e in zip(logits, examples, strict=True)]
        exact += [reference.reference_logits(theirs, e) for e in examples]
    theirs = theirs.bfloat16()
    reference.keep_rope_exact(theirs)
    for case in CASES:
        half += [reference.reference_logits(theirs, e) for e in reference.make_case(case, ours.config)[0]]
    expected, divergence = (np.mean(_kl(np.concatenate(exact), np.concatenate(x))) for x in (half, mine))
    assert 0 < divergence <= 1.5 * expected


def _kl(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    p, q = (jax.nn.log_softmax(x, axis=-1) for x in (p_logits, q_logits))
    return np.asarray(jnp.sum(jnp.exp(p) * (p - q), axis=-1))


@pytest.mark.parametrize("chunk", [64, 128, 500])
def test_a_cache_continued_in_chunks_equals_the_full_forward_pass(tiny: tuple[Any, Tarsier, Path], chunk: int) -> None:
    """A video of 16 frames, then 500 tokens of text in chunks; the second row has fewer of both."""
    _, ours, _ = tiny
    samples = [[5, (16, 6, 8), 509], [3, (4, 6, 8), 7 + 301]]
    suffixes = np.array([500, 301])
    examples = [reference.make_example(sample, ours.config, seed) for seed, sample in enumerate(samples)]
    starts = np.array([len(e.input_ids) for e in examples]) - suffixes
    prompts = [_first(example, n) for example, n in zip(examples, starts, strict=True)]
    batch = reference.make_batch(prompts, ours.config)
    whole = jax.jit(lambda m, b: m(b))(ours, reference.make_batch(examples, ours.config))
    size = batch.input_ids.shape[1] + 512
    _, cache = jax.jit(lambda m, b: m.prefill(b, cache_size=size))(ours, batch)
    extend = jax.jit(lambda m, ids, *x: m.extend(m.decoder.embed(ids), *x))
    for first in range(0, 500, chunk):
        num_new = np.clip(suffixes - first, 0, chunk)
        ids, positions = np.zeros((2, chunk), np.int32), np.zeros((2, chunk, 3), np.int32)
        for row, (example, start, n) in enumerate(zip(examples, starts + first, num_new, strict=True)):
            ids[row, :n] = example.input_ids[start : start + n]
            positions[row, :n] = example.position_ids[:, start : start + n].T
        logits, cache = extend(ours, ids, positions, cache, jnp.asarray(num_new))
        for row in np.flatnonzero(num_new):
            expected = whole[row, starts[row] + first + num_new[row] - 1]
            np.testing.assert_allclose(logits[row], expected, atol=ATOL, rtol=0)
    np.testing.assert_array_equal(cache.lengths, starts + suffixes)
