"""The decode loop: ends, seeds, independent rows, streaming, no recompilation."""

from pathlib import Path

import jax
import numpy as np
import pytest

from tarsier_jax.errors import InputError
from tarsier_jax.generation import decode as decode_module
from tarsier_jax.generation.decode import GeneratedTokens, generate_batch
from tarsier_jax.generation.sampling import Sampling, SamplingOptions
from tarsier_jax.models.tarsier import Tarsier
from tests import reference

CASE = "unlike samples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Tarsier:
    directory: Path = tmp_path_factory.mktemp("model")
    reference.make_reference(directory, reference.TINY)
    return reference.load_ours(directory)


def answers(
    model: Tarsier, case: str = CASE, n: int = 24, eos_ids: tuple[int, ...] = (), **options
) -> list[GeneratedTokens]:
    _, batch = reference.make_case(case, model.config)
    on_tokens = options.pop("on_tokens", None)
    return generate_batch(model, batch, SamplingOptions(n, **options), eos_ids, on_tokens)


def test_length_and_several_ends_of_sequence(model: Tarsier) -> None:
    free = answers(model)
    assert [(len(a.tokens), a.finish_reason) for a in free] == [(24, "length")] * 3
    eos = (free[0].tokens[5], free[1].tokens[9])
    for answer, whole in zip(answers(model, eos_ids=eos), free, strict=True):
        ends = [i for i, token in enumerate(whole.tokens) if token in eos]
        expected = GeneratedTokens(whole.tokens[: ends[0]], "eos") if ends else whole
        assert answer == expected


def test_an_answer_may_end_at_its_first_token(model: Tarsier) -> None:
    first = answers(model)[1].tokens[0]
    assert answers(model, eos_ids=(first,))[1] == GeneratedTokens([], "eos")


def test_one_token(model: Tarsier) -> None:
    assert [a.tokens for a in answers(model, n=1)] == [a.tokens[:1] for a in answers(model)]


def test_a_row_does_not_depend_on_the_batch_around_it(model: Tarsier) -> None:
    examples, _ = reference.make_case(CASE, model.config)
    for options in ({}, {"temperature": 0.8, "top_p": 0.9}):
        together = answers(model, **options)
        alone = reference.make_batch(examples[:1], model.config, reference.BUCKETS)
        (answer,) = generate_batch(model, alone, SamplingOptions(24, **options), eos_ids=())
        assert answer == together[0]


def test_seeds(model: Tarsier) -> None:
    sampled = {"temperature": 1.0, "top_p": 0.95}
    assert answers(model, seed=1, **sampled) == answers(model, seed=1, **sampled)
    assert answers(model, seed=1, **sampled) != answers(model, seed=2, **sampled)
    assert answers(model, seed=1, temperature=1e-4) == answers(model)  # so cold that it is greedy


def test_repetition_penalty_as_the_reference_applies_it(tmp_path: Path) -> None:
    theirs = reference.make_reference(tmp_path, reference.TINY)
    ours = reference.load_ours(tmp_path)
    theirs.generation_config.repetition_penalty = 1.4
    expected = [reference.reference_answer(theirs, e, 24) for e in reference.make_case(CASE, ours.config)[0]]
    assert [a.tokens for a in answers(ours, repetition_penalty=1.4)] == expected
    assert expected != [a.tokens for a in answers(ours)]


def test_tokens_come_as_they_are_made(model: Tarsier) -> None:
    eos = (answers(model)[0].tokens[5],)
    steps: list[np.ndarray] = []
    streamed = answers(model, eos_ids=eos, on_tokens=steps.append)
    assert streamed == answers(model, eos_ids=eos)
    for row, answer in zip(np.stack(steps, axis=1), streamed, strict=True):
        assert [t for t in row if t >= 0 and t not in eos] == answer.tokens


def test_nothing_is_compiled_anew_for_other_prompts_and_options(model: Tarsier) -> None:
    answers(model, temperature=0.5, n=8)
    compiled = decode_module.prefill._cache_size(), decode_module.decode._cache_size()
    answers(model, temperature=0.9, top_p=0.5, top_k=7, seed=3, n=20)
    assert (decode_module.prefill._cache_size(), decode_module.decode._cache_size()) == compiled


def test_max_new_tokens_below_one(model: Tarsier) -> None:
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        answers(model, n=0)


def test_the_cache_is_donated(model: Tarsier) -> None:
    _, batch = reference.make_case("image", model.config)
    keys = jax.random.split(jax.random.key(0), 1)
    sampling, eos = Sampling.repeat(SamplingOptions(), 1), np.zeros(0, np.int32)
    state = decode_module.prefill(model, batch, sampling, eos, keys, np.int32(8), max_new=8)
    decode_module.decode(model, state, eos, np.int32(4), np.int32(1))
    assert all(array.is_deleted() for array in (*state.cache.k, *state.cache.v))


def test_a_span_of_the_cache(model: Tarsier) -> None:
    """The read length changes no token. Decoding stops where an answer needs more positions, and resumes with more."""
    _, batch = reference.make_case(CASE, model.config)
    rows, longest = batch.input_ids.shape[0], int(batch.lengths.max())
    keys = jax.random.split(jax.random.key(0), rows)
    sampling, eos = Sampling.repeat(SamplingOptions(), rows), np.zeros(0, np.int32)

    def start() -> decode_module.DecodeState:
        return decode_module.prefill(model, batch, sampling, eos, keys, np.int32(24), max_new=24)

    whole = decode_module.decode(model, start(), eos, np.int32(24), np.int32(rows))
    state = decode_module.decode(model, start(), eos, np.int32(24), np.int32(rows), read_length=longest + 8)
    assert int(state.num_generated.max()) == 9  # one from the prefill, and one per position that is read
    longer = decode_module.decode(model, state, eos, np.int32(24), np.int32(rows), read_length=longest + 23)
    np.testing.assert_array_equal(longer.tokens, whole.tokens)
    assert longer.done.all()
