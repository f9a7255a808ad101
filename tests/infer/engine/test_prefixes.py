"""Prompts that begin with the content of a free slot continue there, with the answers of complete prompts."""

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest

from eval.shapes.clips import draw_clips
from infer.engine import Completion, Engine, Request
from infer.engine.engine import _pieces
from infer.engine.prefetch import Prefetcher
from infer.engine.prefixes import StoredPrefixes, content_ids, reusable_length
from infer.engine.scheduler import Scheduler
from tarsier_jax.api import answer
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.programs import Compilations
from tests.infer.conftest import ENGINE_SLOTS, ENGINE_TOKENS

GREEDY = SamplingOptions(ENGINE_TOKENS)
SAMPLED = SamplingOptions(ENGINE_TOKENS, temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.3, seed=11)
CLIPS = list(draw_clips(0, 3))

Messages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def engine(reusing_engine: Engine) -> Engine:
    return reusing_engine


def ask(messages: Messages, question: str, video: Any = None) -> Messages:
    """Returns the messages with one more question."""
    media = [] if video is None else [{"type": "video", "video": video}]
    return [*messages, {"role": "user", "content": [*media, {"type": "text", "text": question}]}]


def reply(messages: Messages, text: str) -> Messages:
    return [*messages, {"role": "assistant", "content": text}]


def run(engine: Engine, *conversations: Messages, options: SamplingOptions = GREEDY) -> list[Completion]:
    """Answers conversations in one run, and compares the answers with those of complete prompts."""
    examples = [engine.processor({"messages": messages}) for messages in conversations]
    results = {r.key: r for r in engine.run([Request(i, e, options) for i, e in enumerate(examples)])}
    for i, example in enumerate(examples):
        (expected,) = answer(engine.model, engine.processor, [example], options)
        result = results[i]
        assert isinstance(result, Completion) and (result.text, result.tokens) == (expected.text, expected.tokens)
    return [result for _, result in sorted(results.items()) if isinstance(result, Completion)]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_later_turns_continue(engine: Engine, options: SamplingOptions) -> None:
    messages = ask([], f"Describe it with seed {options.seed}.", CLIPS[0].video)
    (first,) = run(engine, messages, options=options)
    patches, reused = engine.stats.patches, engine.stats.reused_tokens
    length = len(first.request.example.input_ids)
    for question in ("What moves?", "Which shape is larger?", "And the colors?"):
        messages = ask(reply(messages, first.text), question)
        with Compilations() as compilations:
            (result,) = run(engine, messages, options=options)
        assert result.reused_tokens >= length
        length = len(result.request.example.input_ids)
        first = result
    assert engine.stats.patches == patches  # no frame was encoded again
    assert engine.stats.reused_tokens > reused and compilations.count == 0


def test_conversations_are_interleaved(engine: Engine) -> None:
    a, b = (ask([], "Describe both.", clip.video) for clip in CLIPS[:2])
    for turn in range(3):
        results = run(engine, a, b)
        assert turn == 0 or all(result.reused_tokens > 0 for result in results)
        a, b = (ask(reply(m, r.text), f"What about {turn}?") for m, r in zip((a, b), results, strict=True))


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_questions_about_a_video_encode_it_once(engine: Engine, options: SamplingOptions) -> None:
    """They begin while the answer to the first one is in progress, and there are more questions than slots."""
    videos = [clip.video for clip in draw_clips(options.seed + 7, 2)]
    questions = [f"Question {i}?" for i in range(2 * ENGINE_SLOTS)]
    patches = engine.stats.valid_patches
    with Compilations() as compilations:
        results = run(engine, *(ask([], q, video) for q in questions for video in videos), options=options)
    encoded = sum(len(result.request.example.pixel_values) for result in results[:2])
    assert engine.stats.valid_patches == patches + encoded and compilations.count == 0
    assert [result.reused_tokens > 0 for result in results] == [False] * 2 + [True] * (len(results) - 2)


def test_questions_about_a_video_are_not_in_one_prefill_batch(engine: Engine) -> None:
    config = dataclasses.replace(engine.config, buckets=(dataclasses.replace(engine.config.buckets[0], samples=4),))
    scheduler = Scheduler(config, engine.processor)
    questions = [("Who?", CLIPS[0]), ("Where?", CLIPS[0]), ("Who?", CLIPS[1]), ("Why?", CLIPS[0])]
    examples = [engine.processor({"messages": ask([], text, clip.video)}) for text, clip in questions]
    contents = [content_ids(example, engine.model.config) for example in examples]
    requests = [Request(i, e, GREEDY, content=c) for i, (e, c) in enumerate(zip(examples, contents, strict=True))]
    source = Prefetcher(requests, 4)
    while not source.ended:
        scheduler.draw(source, block=True)
    batches = [scheduler.take(True, lambda request: request.key == 3) for _ in range(3)]
    keys = [[request.key for request, _ in batch.prompts[0]] for batch in batches if batch]
    assert keys == [[0, 2], [1]]  # 3 continues a slot


def test_another_video_is_not_continued(engine: Engine) -> None:
    question = "A question about a video that changes."
    (first,) = run(engine, ask([], question, CLIPS[0].video))
    changed = {"frames": CLIPS[0].video["frames"].copy()}
    changed["frames"][-1, -1, -1, -1] ^= 255
    (second,) = run(engine, ask(reply(ask([], question, changed), first.text), "And now?"))
    assert second.reused_tokens == 0
    (third,) = run(engine, ask(reply(ask([], question, changed), first.text), "And then?"))
    assert third.reused_tokens > 0


def test_an_edited_history_shares_its_beginning(engine: Engine) -> None:
    start = ask([], "Look at this clip closely.", CLIPS[2].video)
    (first,) = run(engine, start)
    (second,) = run(engine, ask(reply(start, "An answer that was never generated."), "Why?"))
    assert 0 < second.reused_tokens <= len(first.request.example.input_ids)
    (again,) = run(engine, start)
    assert again.reused_tokens == len(first.request.example.input_ids) - 1


def test_a_long_question_runs_in_pieces(engine: Engine) -> None:
    start = ask([], "Count with me. " + "one two " * 12)
    (first,) = run(engine, start)
    (second,) = run(engine, ask(reply(start, first.text), "three four " * 25))
    assert second.reused_tokens == 0  # less than half of the prompt
    (third,) = run(engine, ask(reply(start, first.text), "three four " * 25 + "five"))
    assert third.reused_tokens > 64


def test_a_cancelled_answer_can_be_continued(engine: Engine) -> None:
    start = ask([], "Tell a story about it.", CLIPS[1].video)
    cancelled = threading.Event()
    request = Request(0, engine.processor({"messages": start}), GREEDY, lambda _: cancelled.set(), cancelled)
    (partial,) = engine.run([request])
    assert isinstance(partial, Completion) and partial.finish_reason == "cancelled"
    (result,) = run(engine, ask(reply(start, partial.text), "Go on."))
    assert result.reused_tokens >= len(request.example.input_ids)


def test_the_least_recently_used_slot_is_taken(engine: Engine) -> None:
    conversations = [ask([], f"Conversation {i}.", CLIPS[i % 3].video) for i in range(ENGINE_SLOTS + 1)]
    for messages in conversations:
        run(engine, messages)
    (oldest,) = run(engine, ask(reply(conversations[1], "Yes."), "Sure?"))
    assert oldest.reused_tokens > 0
    (lost,) = run(engine, conversations[0])
    assert lost.reused_tokens == 0 or lost.reused_tokens < len(lost.request.example.input_ids) - 1


def test_pieces() -> None:
    assert _pieces(10, 10, (4, 16)) == [(10, 4)]
    assert _pieces(10, 13, (4, 16)) == [(10, 4)]
    assert _pieces(0, 37, (4, 16)) == [(0, 16), (16, 16), (32, 16)]


def test_stored_prefixes() -> None:
    prefixes, prompt = StoredPrefixes(3, 200), np.arange(100)
    assert prefixes.find(prompt) is None
    prefixes.store(1, prompt[:70])
    assert prefixes.find(prompt) == (1, 70)
    prefixes.store(2, np.append(prompt[:80], -5))
    assert prefixes.find(prompt) == (2, 80)
    prefixes.store(0, prompt)
    assert prefixes.find(prompt) == (0, 99)  # without its last token
    for slot in (0, 2):
        prefixes.remove(slot)
    prefixes.store(1, prompt[:63])
    assert prefixes.find(prompt) is None
    prefixes.store(1, prompt)
    prefixes.clear()
    assert prefixes.find(prompt) is None


def test_content_ids_identify_visuals(engine: Engine) -> None:
    config = engine.model.config
    example = engine.processor({"messages": ask(ask([], "One.", CLIPS[0].video), "Two.", CLIPS[1].video)})
    ids = content_ids(example, config)
    visual = np.isin(example.input_ids, (config.image_token_id, config.video_token_id))
    assert (ids[~visual] == example.input_ids[~visual]).all() and (ids[visual] < 0).all()
    assert len(set(ids[visual].tolist())) == 2 and reusable_length(ids) == np.flatnonzero(visual)[-1] + 1
    assert (content_ids(example, config) == ids).all()
