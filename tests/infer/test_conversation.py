"""A conversation keeps its turns, reads its files once, and continues after errors; with a model of this process, its
answers are those of complete prompts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infer.conversation import Conversation, LocalModel
from infer.engine import Engine
from infer.media import MediaLoader
from tarsier_jax.api import answer
from tarsier_jax.errors import InputError
from tarsier_jax.generation.sampling import SamplingOptions
from tests.infer.conftest import ENGINE_TOKENS, write_gif
from tests.infer.fake_model import SELECTION, WORDS, FakeModel

ANSWER = " ".join(WORDS)


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def conversation(model: FakeModel) -> Conversation:
    return Conversation(model)


def texts(conversation: Conversation) -> list[str]:
    return [item["text"] for message in conversation.messages for item in message["content"] if item["type"] == "text"]


def test_turns_are_kept(conversation: Conversation, model: FakeModel, gif: Path) -> None:
    conversation.open(gif)
    assert "".join(conversation.ask("What?")) == ANSWER and conversation.finish_reason == "eos"
    assert list(conversation.ask("And then?")) == [WORDS[0], *(f" {word}" for word in WORDS[1:])]
    assert texts(conversation) == ["What?", ANSWER, "And then?", ANSWER]
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.messages[0]["content"][0] == {"type": "video", "video": {"video_file": str(gif)}}
    assert model.prompts[1] == conversation.messages[:3] and model.num_reads == 1
    assert conversation.files == [str(gif)] and conversation.selections == [SELECTION]


def test_other_options_read_the_files_again(conversation: Conversation, model: FakeModel, gif: Path) -> None:
    conversation.open(gif)
    conversation.options["n_frames"] = 4
    list(conversation.ask("What?"))
    list(conversation.ask("What?"))
    assert model.num_reads == 2


def test_a_cancelled_answer_keeps_its_beginning(conversation: Conversation) -> None:
    pieces = conversation.ask("What?")
    assert next(pieces) == "one"
    conversation.cancel()
    assert list(pieces) == [] and conversation.finish_reason == "cancelled"
    assert texts(conversation) == ["What?", "one"]


def test_a_question_is_cancelled_while_its_files_are_read(model: FakeModel, gif: Path) -> None:
    conversation = Conversation(model)
    read = model.read_media

    def read_and_cancel(*args: Any) -> Any:
        conversation.cancel()
        return read(*args)

    conversation.open(gif)
    conversation.options["n_frames"] = 4
    model.read_media = read_and_cancel
    assert list(conversation.ask("What?")) == [] and conversation.finish_reason == "cancelled"
    assert model.prompts == [] and conversation.messages == [] and conversation.files == [str(gif)]


def test_an_abandoned_answer_keeps_its_beginning(conversation: Conversation) -> None:
    pieces: Any = conversation.ask("What?")
    next(pieces), next(pieces)
    pieces.close()
    assert texts(conversation) == ["What?", "one two"]


def test_a_broken_file_changes_nothing(conversation: Conversation, gif: Path) -> None:
    conversation.open(gif)
    broken = gif.with_name("broken.mp4")
    broken.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"broken\.mp4"):
        conversation.open(broken)
    list(conversation.ask("What?"))
    assert conversation.files == [str(gif)]


def test_a_failed_question_is_removed(conversation: Conversation, gif: Path) -> None:
    list(conversation.ask("What?"))
    conversation.open(gif)
    with pytest.raises(InputError, match="99 tokens"):
        list(conversation.ask("fail"))
    assert conversation.files == [] and texts(conversation) == ["What?", ANSWER]
    assert "".join(conversation.ask("Again?")) == ANSWER


def test_reset(conversation: Conversation, gif: Path) -> None:
    conversation.open(gif)
    list(conversation.ask("What?"))
    conversation.reset()
    assert conversation.messages == [] and conversation.files == [] and not conversation.selections


def test_saved_conversations(conversation: Conversation, model: FakeModel, gif: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    with pytest.raises(InputError, match="empty"):
        conversation.save(file)
    list(conversation.ask("Earlier?"))
    conversation.save(file)
    conversation.open(gif)
    list(conversation.ask("What?"))
    conversation.save(file)
    other = Conversation(model)
    other.load(file)
    assert other.messages == conversation.messages and other.files == [str(gif)]
    list(other.ask("And then?"))
    assert model.prompts[-1][:-1] == conversation.messages
    file.write_text('{"messages": [{"role": "user", "content": "What?"}]}\n')
    with pytest.raises(InputError, match="does not end with an answer"):
        other.load(file)


@pytest.fixture(scope="module")
def local(reusing_engine: Engine) -> Iterator[LocalModel]:
    processor = reusing_engine.processor
    with MediaLoader(processor, workers=1, root="/") as loader, LocalModel(reusing_engine, loader) as model:
        yield model


def test_a_local_model_continues_its_slot(local: LocalModel, reusing_engine: Engine, gif: Path) -> None:
    conversation, processor = Conversation(local, SamplingOptions(ENGINE_TOKENS)), reusing_engine.processor
    conversation.open(gif)
    for turn, question in enumerate(("What moves?", "Which color?")):
        reused, patches = reusing_engine.stats.reused_tokens, reusing_engine.stats.patches
        text = "".join(conversation.ask(question))
        example = processor({"messages": conversation.messages[:-1]})
        (expected,) = answer(reusing_engine.model, processor, [example], conversation.sampling)
        assert text == expected.text and conversation.finish_reason == "length"
        assert turn == 0 or reusing_engine.stats.reused_tokens > reused
        assert turn == 0 or reusing_engine.stats.patches == patches
    assert conversation.selections == processor({"messages": conversation.messages[:-1]}).selections


def test_a_local_model_cancels(local: LocalModel) -> None:
    conversation = Conversation(local, SamplingOptions(ENGINE_TOKENS))
    pieces = conversation.ask("Tell a story.")
    next(pieces)
    conversation.cancel()
    list(pieces)
    assert conversation.finish_reason == "cancelled" and len(conversation.messages) == 2


def test_a_local_model_explains(local: LocalModel, tmp_path: Path) -> None:
    conversation = Conversation(local, SamplingOptions(ENGINE_TOKENS))
    with pytest.raises(InputError, match="the engine takes at most"):
        list(conversation.ask("word " * 500))
    with pytest.raises(InputError, match=r"absent\.mp4"):
        conversation.open(tmp_path / "absent.mp4")
    assert "".join(conversation.ask("What does <image> mean in <video>?"))  # text


def test_pictures_are_the_frames_of_the_model(local: LocalModel, tmp_path: Path) -> None:
    conversation = Conversation(local)
    conversation.open(write_gif(tmp_path / "a.gif", frames=3, size=(112, 84)))
    conversation.open(write_gif(tmp_path / "b.gif", frames=6, size=(84, 84)))
    pictures = conversation.pictures(1)
    assert len(pictures) == len(conversation.selections[1].indices)
    height, width = conversation.selections[1].frame_size
    assert all(picture.size == (width, height) for picture in pictures)
    color = np.asarray(pictures[0])[0, 0].astype(int)
    assert abs(color - (0, 255, 90)).max() <= 4  # of the palette
