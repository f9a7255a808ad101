"""Answers of the engine are those of `tarsier_jax.generate`, whatever shares their rows and slots."""

import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import tarsier_jax
import tarsier_jax.api
from eval.shapes.annotations import GROUNDED_PROMPT, VIDEO_PROMPT, user_turn
from eval.shapes.clips import ShapeClip, draw_clips
from infer.engine import Completion, Engine, EngineConfig, Request, RequestError, fit_config
from tarsier_jax.api import answer
from tarsier_jax.errors import InputError
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.models.tarsier import Tarsier
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.processor import Processor
from tarsier_jax.programs import Compilations
from tests.infer.conftest import TWO_LAYERS
from train.untrained import write_untrained

SLOTS, TOKENS = 6, 24
OPTIONS = SamplingOptions(TOKENS)


def two_buckets(processor: Processor) -> EngineConfig:
    """Two buckets of six, because each one is compiled."""
    config = fit_config(processor, SLOTS, TOKENS)
    return dataclasses.replace(config, buckets=config.buckets[::5])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tarsier, Processor]:
    """Its answers end at their limits only: no token is -1."""
    model, processor = tarsier_jax.load(write_untrained(tmp_path_factory.mktemp("model") / "untrained", TWO_LAYERS))
    return model, _with_eos(processor, -1)


@pytest.fixture(scope="module")
def engine(loaded: tuple[Tarsier, Processor]) -> Engine:
    return Engine(*loaded, two_buckets(loaded[1]))


@pytest.fixture(scope="module")
def samples() -> list[dict]:
    """Of mixed sizes, lengths and prompts, and some without pictures."""
    clips: list[ShapeClip] = [*draw_clips(0, 8), *draw_clips(0, 6, other=True)]
    asked = [user_turn(clip.video, (VIDEO_PROMPT, GROUNDED_PROMPT)[i % 2]) for i, clip in enumerate(clips)]
    texts = [{"role": "user", "content": f"What comes after {'one ' * n}?"} for n in (1, 30)]
    return [{"messages": [message]} for message in (*asked[:5], texts[0], *asked[5:], texts[1])]


@pytest.fixture(scope="module")
def examples(loaded: tuple[Tarsier, Processor], samples: list[dict]) -> list[Example]:
    return [loaded[1](sample) for sample in samples]


def answers(engine: Engine, requests: Sequence[Request | RequestError]) -> dict[int, Completion]:
    got = {a.request.key: a for a in engine.run(requests) if isinstance(a, Completion)}
    assert len(got) == len(requests)
    return got


def test_pairs_of_frames_need_half_the_room(loaded: tuple[Tarsier, Processor]) -> None:
    """16 frames of 84 x 112 pixels are 12 tokens each, or 8 pairs of them; beside 256 of text, in whole 64s."""
    paired = loaded[1]
    doubled = dataclasses.replace(paired, image=dataclasses.replace(paired.image, double_frames=True))
    assert [fit_config(p, SLOTS, TOKENS).prompt_tokens for p in (paired, doubled)] == [384, 448]


def test_attention_that_prefers_lengths(
    loaded: tuple, samples: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With cuDNN's attention, here in XLA, rows of one prompt and bins of one frame run without segments."""
    fused = jax.nn.dot_product_attention

    def in_xla(*arrays: jax.Array, **options: Any) -> jax.Array:
        return fused(*arrays, **options | {"implementation": "xla"})

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_xla)
    monkeypatch.setattr(tarsier_jax.api, "default_implementation", lambda *_: "cudnn")
    model, processor = tarsier_jax.load(write_untrained(tmp_path / "untrained", TWO_LAYERS))
    config = fit_config(processor, SLOTS, 8)
    engine = Engine(model, _with_eos(processor, -1), dataclasses.replace(config, buckets=config.buckets[-1:]))
    several = [processor(sample) for sample in samples[:5]]
    for examples in (several, several[:1]):
        got = answers(engine, [Request(i, e, SamplingOptions(8)) for i, e in enumerate(examples)])
        for i, example in enumerate(examples):
            assert got[i].tokens == answer(*loaded, [example], SamplingOptions(8))[0].tokens


def test_whatever_shares_its_batch(engine: Engine, loaded: tuple, examples: list[Example]) -> None:
    """More prompts than slots, answers of unlike lengths, some of them sampled, in one run."""
    limits = [1 + 7 * i % TOKENS for i in range(len(examples))]
    kinds = {
        1: {"temperature": 0.9, "top_p": 0.9, "seed": 5},
        2: {"repetition_penalty": 1.4},
        3: {"top_k": 3, "temperature": 1},
    }
    options = [SamplingOptions(limit, **kinds.get(i % 4, {})) for i, limit in enumerate(limits)]
    requests = [Request(i, e, options[i]) for i, e in enumerate(examples)]
    with Compilations() as compilations:
        got = answers(engine, requests)
    assert compilations.count == 0
    for i, example in enumerate(examples):
        (expected,) = answer(*loaded, [example], options[i])
        assert (got[i].text, got[i].tokens) == (expected.text, expected.tokens)
        assert got[i].finish_reason == "length" and len(got[i].tokens) == limits[i]


def test_an_end_of_sequence_frees_the_slot(loaded: tuple[Tarsier, Processor], examples: list[Example]) -> None:
    model, processor = loaded
    free = answers(Engine(model, processor, two_buckets(processor)), _greedy(examples[:4]))
    eos = free[0].tokens[3]
    ending = Engine(model, _with_eos(processor, eos), two_buckets(processor))
    for i, result in answers(ending, _greedy(examples[:4])).items():
        whole = free[i].tokens
        end = whole.index(eos) if eos in whole else TOKENS
        assert (result.tokens, result.finish_reason) == (whole[:end], "eos" if end < TOKENS else "length")


def test_tokens_as_they_come(engine: Engine, examples: list[Example]) -> None:
    heard: dict[int, list[int]] = {0: [], 1: []}
    calls = []

    def hear(key: int, tokens: list[int]) -> None:
        calls.append(key)
        heard[key] += tokens

    requests = [Request(i, examples[i], OPTIONS, on_tokens=lambda t, i=i: hear(i, t)) for i in heard]
    got = answers(engine, [*requests, Request(2, examples[2], OPTIONS)])
    assert {i: got[i].tokens for i in heard} == heard and len(calls) >= 6


def test_cancelled_ones_end_with_what_they_have(engine: Engine, examples: list[Example]) -> None:
    """One under way, from the call that brings its first tokens, and one that still waits."""

    def cancel(_: list[int]) -> None:
        for request in (first, last):
            request.cancelled.set()

    others = [Request(i, examples[i % 4], OPTIONS) for i in range(3 * SLOTS)]
    last = Request("waiting", examples[1], OPTIONS)
    first = Request("running", examples[0], OPTIONS, on_tokens=cancel)
    requests = [first, *others, last]
    got = answers(engine, requests)
    assert got["running"].finish_reason == got["waiting"].finish_reason == "cancelled"
    assert 0 < len(got["running"].tokens) < TOKENS and got["waiting"].tokens == []
    assert all(len(got[i].tokens) == TOKENS for i in range(3 * SLOTS))
    assert answers(engine, [Request("running", examples[0], OPTIONS)])["running"].finish_reason == "length"


def test_a_stop_string_ends_the_answer(engine: Engine, examples: list[Example]) -> None:
    """The text is cut before it, and the slot is free soon: not all tokens up to the limit are generated."""
    (whole,) = engine.run([Request(0, examples[0], OPTIONS)])
    assert isinstance(whole, Completion)
    stop = engine.processor.decode(whole.tokens[3:5])
    stop_options = dataclasses.replace(OPTIONS, stop=("never", stop))
    (result,) = engine.run([Request(0, examples[0], stop_options)])
    assert isinstance(result, Completion) and result.finish_reason == "stop"
    assert result.text == whole.text[: whole.text.index(stop)].strip()
    assert result.tokens == whole.tokens[: len(result.tokens)]


def test_requests_may_come_slowly(engine: Engine, examples: list[Example]) -> None:
    """Answers do not wait for requests that are still to come."""
    answered = threading.Event()

    def slowly() -> Iterator[Request]:
        yield Request(0, examples[0], OPTIONS)
        assert answered.wait(60)
        yield Request(1, examples[1], OPTIONS)

    for result in engine.run(slowly()):
        assert isinstance(result, Completion)
        answered.set()
    assert answered.is_set()


def test_refusals(engine: Engine, examples: list[Example]) -> None:
    """Those that come in are passed on; prompts and answers that are too long are refused, and the rest goes on."""
    long = np.concatenate([examples[0].input_ids] * 4)
    positions = np.concatenate([examples[0].position_ids] * 4, axis=1)
    large = Example(long, long, examples[0].pixel_values, examples[0].grid_thw, positions)
    items = [
        RequestError("a", "broken"),
        Request("b", large, SamplingOptions(4)),
        Request("c", examples[0], SamplingOptions(TOKENS + 1)),
    ]
    got = list(engine.run([*items, Request("d", examples[0], SamplingOptions(4))]))
    reasons = {r.key: r.reason for r in got if isinstance(r, RequestError)}
    assert reasons["a"] == "broken" and set(reasons) == {"a", "b", "c"}
    assert "the engine takes at most" in reasons["b"] and f"may have {TOKENS + 1}" in reasons["c"]
    assert [a.request.key for a in got if isinstance(a, Completion)] == ["d"]


def test_an_error_of_the_source_is_raised(engine: Engine, examples: list[Example]) -> None:
    def broken() -> Iterator[Request]:
        yield Request(0, examples[0], SamplingOptions(4))
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(engine.run(broken()))
    assert len(answers(engine, _greedy(examples[:2]))) == 2  # and nothing is left of what was under way


def test_the_report(loaded: tuple[Tarsier, Processor], examples: list[Example]) -> None:
    engine = Engine(*loaded, two_buckets(loaded[1]))
    start = time.perf_counter()
    answers(engine, _greedy(examples))
    report, seconds = engine.stats, time.perf_counter() - start
    assert report.prompts == report.answers == len(examples) and report.new_tokens == TOKENS * len(examples)
    assert report.valid_tokens == sum(len(e.input_ids) - 1 for e in examples) < report.tokens
    assert report.valid_patches == sum(len(e.pixel_values) for e in examples) < report.patches
    assert 0 < report.busy < seconds + 0.1


def test_sizes_that_do_not_fit(loaded: tuple[Tarsier, Processor], examples: list[Example]) -> None:
    with pytest.raises(InputError, match="5 slots cannot be split into 2 groups"):
        fit_config(loaded[1], 5, TOKENS, AbstractMesh((2, 1, 1), ("data", "fsdp", "tensor")))


def _greedy(examples: list[Example]) -> list[Request]:
    return [Request(i, example, OPTIONS) for i, example in enumerate(examples)]


def _with_eos(processor: Processor, token: int) -> Processor:
    return dataclasses.replace(processor, eos_token_ids=(token,))
