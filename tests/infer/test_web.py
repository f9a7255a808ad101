"""The web page: its functions, and the page in headless Chromium."""

import argparse
import dataclasses
import itertools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import tarsier_jax
from infer import web
from infer.conversation import Conversation, LocalModel, Messages, fit_conversations
from infer.engine import Engine
from infer.media import MediaLoader
from infer.network import listen
from tarsier_jax.errors import InputError
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.processing.frame_sampling import sample_uniform
from tarsier_jax.processing.video import open_clip
from tarsier_jax.weights import EMBEDDED, EMBEDDED_CLIP
from tests.infer.fake_model import FakeAnswer

gradio = pytest.importorskip("gradio")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CAPTION = "Then the orange triangle disappears."
SLOW = ["word"] * 5000  # at a rate at which a test can stop it


class Model(LocalModel):
    """The embedded model, which answers "count" slowly."""

    def answer(self, messages: Messages, media: Any, sampling: SamplingOptions, options: Mapping[str, Any]) -> Any:
        if messages[-1]["content"][-1]["text"] == "count":
            return FakeAnswer(False, media.selections, 0.05, SLOW)
        return super().answer(messages, media, sampling, options)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    parameters, processor = tarsier_jax.load(EMBEDDED)
    processor = processor.replace(n_frames=8)
    config = fit_conversations(processor, 2, 48)
    engine = Engine(parameters, processor, dataclasses.replace(config, buckets=config.buckets[:1]))
    with MediaLoader(processor, root="/") as loader, Model(engine, loader) as model:
        yield model


def test_a_turn(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_show", lambda error, _: pytest.fail(str(error)))
    conversation = Conversation(model, SamplingOptions(48))
    _, frames = web.open_files([str(EMBEDDED_CLIP)], conversation, 4)
    clip = open_clip(EMBEDDED_CLIP)
    assert clip.times is not None
    assert [caption for _, caption in frames] == [f"{clip.times[i]:.2f} s" for i in sample_uniform(clip.length, 4)]
    steps = list(web.answer_question("Describe the video in detail.", conversation, 4, 0.0, 1.0))
    messages = steps[-1][0]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[0]["content"] == "[clip.mp4]\nDescribe the video in detail."
    assert messages[1]["content"].startswith("The blue cross")
    streamed = [messages[-1]["content"] for messages, *_ in steps[1:-1]]
    assert len(streamed) > 2 and all(b.startswith(a) for a, b in itertools.pairwise(streamed))
    assert steps[0][1] == "" and all(field == gradio.skip() for _, field, *_ in steps[1:])  # typed meanwhile


def test_a_file_that_cannot_be_used(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(gradio, "Warning", lambda message, **_: warnings.append(message))
    broken = tmp_path / "<b>broken.mp4"
    broken.write_bytes(EMBEDDED_CLIP.read_bytes()[:2000])
    conversation = Conversation(model, SamplingOptions(48))
    _, frames = web.open_files([str(broken), str(EMBEDDED_CLIP)], conversation, 4)
    assert len(frames) == 4  # of the other file
    assert warnings[0].startswith("&lt;b&gt;broken.mp4 cannot be decoded")  # without the directory of the uploads


def test_a_key_is_needed_on_other_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TARSIER_API_KEY", raising=False)
    with pytest.raises(InputError, match=r"--host 0\.0\.0\.0 is reachable from other machines, which needs a key"):
        web.main(web.parse(["--host", "0.0.0.0"]))
    monkeypatch.setenv("TARSIER_API_KEY", "short")
    with pytest.raises(InputError, match="must have at least 16 printable ASCII characters"):
        web.main(argparse.Namespace(**vars(web.parse([]))))


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TARSIER_API_KEY", raising=False)
    with pytest.raises(InputError, match="--port is 99999; it must be from 0 to 65535"):
        web.main(web.parse(["--port", "99999"]))
    with listen("127.0.0.1", 0) as sock:
        sock.listen()
        with pytest.raises(InputError, match="Choose another --host or --port"):
            web.main(web.parse(["--port", str(sock.getsockname()[1])]))


def test_visitors_have_conversations_of_their_own(model: Model) -> None:
    """Before the events of a page's first load, too: a fast visitor opens a file earlier."""
    from gradio.state_holder import SessionState

    page = web.make_page(model, 4, SamplingOptions(48))
    (key,) = [key for key, block in page.blocks.items() if isinstance(block, gradio.State)]
    first, second = SessionState(page)[key], SessionState(page)[key]
    web.open_files([str(EMBEDDED_CLIP)], first, 4)
    assert first.files == [str(EMBEDDED_CLIP)] and second.files == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_in_a_browser(model: Model, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    page = web.make_page(model, 8, SamplingOptions(48))
    web.launch(page, "127.0.0.1", web.find_port("127.0.0.1", 0), None, 2)
    try:
        with sync_api.sync_playwright() as playwright:
            flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
            _use(browser.new_page(), page.local_url, tmp_path)
            browser.close()
    finally:
        page.close()


def _use(page: Any, url: str, tmp_path: Path) -> None:
    """Uploads, asks, stops, asks again, restarts, and uploads a broken file."""
    others: list[str] = []
    page.on("request", lambda request: others.append(request.url))
    page.set_default_timeout(60_000)
    page.goto(url)
    upload, ask = page.locator("input[type=file]").first, page.get_by_role("button", name="Ask")
    question = page.get_by_label("Question")
    upload.set_input_files(str(EMBEDDED_CLIP))
    page.get_by_text("0.00 s").wait_for()
    assert page.locator(".thumbnail-item").count() == 8
    ask.click()
    page.get_by_text(CAPTION).wait_for()

    question.fill("count")
    ask.click()  # waits for the end of the answer, during which the button is disabled
    page.get_by_text("word word word").wait_for()  # while the answer is streamed
    assert ask.is_disabled()
    question.fill("Describe the video in detail.")
    page.wait_for_timeout(1000)
    page.get_by_role("button", name="Stop").click()
    page.wait_for_timeout(1000)
    words = page.get_by_text("word word word").inner_text()
    assert 3 <= len(words.split()) < 5000

    ask.click()  # the question that was typed during the answer
    page.get_by_test_id("bot").nth(2).get_by_text("The ").wait_for()  # its content depends on the words before

    page.get_by_role("button", name="Restart").click()  # during the answer
    page.get_by_text(CAPTION).first.wait_for(state="detached")
    page.wait_for_function("!document.querySelector('button.primary').disabled")
    assert page.locator(".thumbnail-item").count() == 0

    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"<html>not found</html>")
    upload.set_input_files(str(broken))
    page.get_by_text("broken.mp4 cannot be decoded: it is a web page").wait_for()
    upload.set_input_files(str(EMBEDDED_CLIP))
    page.get_by_text("0.00 s").wait_for()
    assert not [other for other in others if not other.startswith((url, "data:", "blob:"))]
