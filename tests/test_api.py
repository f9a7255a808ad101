"""`tarsier_jax.api.answer`: options, stop strings, finish reasons."""

import dataclasses

import pytest

import tarsier_jax
from tarsier_jax.api import Generation, answer
from tarsier_jax.errors import InputError
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.processor import Processor, media_sample
from tarsier_jax.weights import EMBEDDED, EMBEDDED_CLIP


@pytest.fixture(scope="module")
def loaded() -> tuple[Tarsier, Processor]:
    return tarsier_jax.load(EMBEDDED)


def test_stop_strings_and_finish_reasons(loaded: tuple[Tarsier, Processor]) -> None:
    model, processor = loaded
    sample = media_sample(str(EMBEDDED_CLIP), "Describe the video in detail.")
    examples, options = [processor(sample)], SamplingOptions(max_new_tokens=96)
    (whole,) = answer(model, processor, examples, options)
    assert whole.finish_reason == "eos" and [whole.text] == tarsier_jax.generate(model, processor, [sample], 96)
    first, second, *_ = words = whole.text.split()
    assert len(words) > 2
    for stop in ((second,), ("not in the answer", words[-1], second)):  # the first in the text, in any order
        (cut,) = answer(model, processor, examples, dataclasses.replace(options, stop=stop))
        assert cut == Generation(first, whole.tokens, "stop")
    (unaffected,) = answer(model, processor, examples, dataclasses.replace(options, stop=("not in the answer",)))
    assert unaffected == whole
    (short,) = answer(model, processor, examples, dataclasses.replace(options, max_new_tokens=3))
    assert (short.tokens, short.finish_reason) == (whole.tokens[:3], "length")


@pytest.mark.parametrize(
    ("option", "value"), [("max_new_tokens", 0), ("temperature", -1), ("seed", -1), ("stop", "word"), ("stop", ("",))]
)
def test_options_out_of_range_are_named(option: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{option} is .*; it must be"):
        SamplingOptions(**{option: value})  # pyright: ignore[reportArgumentType]
