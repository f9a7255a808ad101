"""A web page for questions about videos and images: `python -m infer.web --model CHECKPOINT`.

The page listens on this machine only, unless a key is set. Uploaded files are removed when the program ends.
"""

import argparse
import dataclasses
import html
import itertools
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tarsier_jax
from infer.conversation import Conversation, LocalModel, fit_conversations
from infer.engine import Engine
from infer.media import MediaLimits, MediaLoader
from infer.network import is_loopback, listen, read_key
from tarsier_jax.errors import InputError
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.processing.media_types import MEDIA_SUFFIXES
from tarsier_jax.processing.options import ProcessorOptions
from tarsier_jax.programs import (
    add_model_flag,
    add_precision_flags,
    check_packages,
    prepare_process,
    resolve_dtype,
    run,
)
from tarsier_jax.weights import EMBEDDED_CLIP

if TYPE_CHECKING:  # importing it takes seconds
    import gradio

_USER = "tarsier"  # of the login, when there is a key
_QUESTION = "Describe the video in detail."
_QUEUED = 64  # questions that wait for a slot
_CONVERSATIONS = 100  # of visitors, the most recent ones
_LIMITS = MediaLimits()
_KEPT_S = 3600  # of files and conversations
_CSS = "footer {display: none !important}"

Pictures = list[tuple[Any, str]]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infer.web", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flag(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="0 chooses a free one (default %(default)s)")
    parser.add_argument("--slots", type=int, default=4, help="answers in progress at once (default %(default)s)")
    parser.add_argument("--n_frames", type=int, help="largest number of frames per question (default: the model's)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="limit of an answer (default %(default)s)")
    add_precision_flags(parser)
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    check_packages("infer.web", "web", "gradio")
    key = read_key()
    if key is None and not is_loopback(args.host):
        raise InputError(
            f"--host {args.host} is reachable from other machines, which needs a key. Set TARSIER_API_KEY."
        )
    options = {} if args.n_frames is None else {"n_frames": args.n_frames}
    ProcessorOptions(**options)  # raises InputError
    sampling = SamplingOptions(max_new_tokens=args.max_new_tokens)
    port = find_port(args.host, args.port)  # before the model is loaded: it fails fast
    prepare_process()
    print(f"loading {args.model}", file=sys.stderr, flush=True)
    dtype = resolve_dtype(args.dtype)
    parameters, processor = tarsier_jax.load(args.model, dtype, int8=args.int8, adapter=args.adapter)
    processor = processor.replace(**options)
    engine = Engine(parameters, processor, fit_conversations(processor, args.slots, args.max_new_tokens))
    with tempfile.TemporaryDirectory(prefix="tarsier_jax-web-") as uploads:
        _configure_gradio(uploads)
        with (
            MediaLoader(processor, _LIMITS, root=uploads) as loader,
            LocalModel(engine, loader) as model,
        ):
            page = make_page(model, processor.options.n_frames, sampling)
            launch(page, args.host, port, key, args.slots)
            print(f"{page.local_url} shows the page; Ctrl-C ends the program", file=sys.stderr, flush=True)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the uploads are removed
            page.block_thread()
    return 0


def make_page(model: LocalModel, n_frames: int, sampling: SamplingOptions) -> "gradio.Blocks":
    """Returns the page.

    Args:
        model: Answers.
        n_frames: Largest number of frames, and the default.
        sampling: Defaults of the sliders.
    """
    import gradio as gr

    def new_conversation() -> Conversation:
        return Conversation(model, sampling)

    private: dict[str, Any] = {"api_visibility": "private"}
    enabled = gr.update(interactive=True)  # gr.Button would add one to the page
    with gr.Blocks(title="Tarsier", analytics_enabled=False, delete_cache=(_KEPT_S // 4, _KEPT_S)) as page:
        # Gradio copies a value per visitor. It calls a function after the page has loaded, too late for a fast visitor.
        conversation = gr.State(new_conversation(), time_to_live=_KEPT_S)
        with gr.Row():
            with gr.Column(scale=1):
                files = gr.File(
                    label="Videos, animations and images", file_count="multiple", file_types=[*MEDIA_SUFFIXES]
                )
                frames = gr.Gallery(label="Frames that the model sees", columns=3, interactive=False, buttons=[])
                count = gr.Slider(1, n_frames, n_frames, step=1, label="Frames")
                temperature = gr.Slider(0.0, 2.0, sampling.temperature, step=0.05, label="Temperature (0: greedy)")
                top_p = gr.Slider(0.05, 1.0, sampling.top_p, step=0.05, label="Top-p")
                restart = gr.Button("Restart")
            with gr.Column(scale=2):
                # Markdown in an answer could load pictures from other servers.
                chat = gr.Chatbot(label="Conversation", height=480, render_markdown=False, buttons=["copy"])
                text = gr.Textbox(_QUESTION, label="Question", max_length=10_000, autofocus=True)
                with gr.Row():
                    send = gr.Button("Ask", variant="primary")
                    stop = gr.Button("Stop")
        gr.Examples([[[str(EMBEDDED_CLIP)]]], [files], label="Examples")
        opened = files.change(open_files, [files, conversation, count], [files, frames], **private)
        asked = gr.on(
            [send.click, text.submit],
            answer_question,
            [text, conversation, count, temperature, top_p],
            [chat, text, frames, send],
            trigger_mode="once",
            **private,
        )
        asked.then(lambda: enabled, outputs=send, queue=False, **private)  # after an unexpected error, too
        for event in (opened, asked):  # the time to live starts again
            event.then(lambda used: used, conversation, conversation, queue=False, **private)
        stop.click(Conversation.cancel, conversation, queue=False, **private)
        gr.on(
            [restart.click, chat.clear],  # an answer in progress ends in the former conversation
            lambda: (new_conversation(), None, [], [], _QUESTION, enabled),
            outputs=[conversation, files, frames, chat, text, send],
            cancels=asked,
            queue=False,
            **private,
        )
    return page


def launch(page: "gradio.Blocks", host: str, port: int, key: str | None, slots: int) -> None:
    """Serves a page in a thread, with a login if there is a key."""
    page.queue(max_size=_QUEUED, default_concurrency_limit=slots, api_open=False)
    page.launch(
        server_name=host,
        server_port=port,
        auth=None if key is None else (_USER, key),
        max_file_size=_LIMITS.max_bytes,
        css=_CSS,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        state_session_capacity=_CONVERSATIONS,
    )


def open_files(paths: list[str] | None, conversation: Conversation, n_frames: int) -> tuple[Any, Any]:
    """Adds files to the next question. Shows the error of a file that cannot be used; the others are added."""
    import gradio as gr

    if not paths:  # the field was cleared after the last files
        return gr.skip(), gr.skip()
    conversation.options = {"n_frames": int(n_frames)}
    for path in paths:
        try:
            conversation.open(path)
        except InputError as error:
            _show(error, [path])
    return None, pictures(conversation)


def answer_question(
    text: str, conversation: Conversation, n_frames: int, temperature: float, top_p: float
) -> Iterator[tuple[list[dict[str, str]], Any, Any, Any]]:
    """Yields the messages of the page, the content of the question field, the frames, and the Ask button.

    The field is cleared once: a question that is typed during an answer remains. The button is disabled until the
    answer ends, since the page ignores its clicks.
    """
    import gradio as gr

    before, files, media = chat_messages(conversation), conversation.files, conversation.media
    if not text.strip():
        yield before, text, gr.skip(), gr.skip()
        return
    conversation.options = {"n_frames": int(n_frames)}
    turn = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
    yield before + turn, "", gr.skip(), gr.update(interactive=False)
    try:
        conversation.sampling = _with_sliders(conversation.sampling, temperature, top_p)
        for piece in conversation.ask(text):
            turn[1]["content"] += piece
            yield before + turn, gr.skip(), gr.skip(), gr.skip()
    except InputError as error:
        _show(error, files)
        yield before, text, pictures(conversation), gr.skip()
        return
    frames = gr.skip() if conversation.media is media else pictures(conversation)  # other options, other frames
    yield chat_messages(conversation), gr.skip(), frames, gr.skip()


def chat_messages(conversation: Conversation) -> list[dict[str, str]]:
    """Returns the texts of a conversation, with the names of the files before each question."""
    messages = []
    for message in conversation.messages:
        lines = [item["text"] if item["type"] == "text" else f"[{_name(item)}]" for item in message["content"]]
        messages.append({"role": message["role"], "content": "\n".join(lines)})
    return messages


def pictures(conversation: Conversation) -> Pictures:
    """Returns the frames that the model receives, each with its time in seconds, or with the name of its file."""
    captioned: Pictures = []
    for index, (path, selection) in enumerate(zip(conversation.files, conversation.selections, strict=True)):
        names = itertools.repeat(os.path.basename(path))
        captions = names if selection.times is None else [f"{time:.2f} s" for time in selection.times]
        captioned += zip(conversation.pictures(index), captions, strict=False)
    return captioned


def _name(item: Mapping[str, Any]) -> str:
    kind = item["type"]
    return os.path.basename(item[kind][f"{kind}_file"])


def _with_sliders(sampling: SamplingOptions, temperature: float, top_p: float) -> SamplingOptions:
    return dataclasses.replace(sampling, temperature=float(temperature), top_p=float(top_p))


def _show(error: Exception, files: Sequence[str]) -> None:
    """Shows an error, with the names of the files in place of their paths on this machine."""
    import gradio as gr

    message = str(error)
    for path in files:
        message = message.replace(path, os.path.basename(path))
    gr.Warning(html.escape(message), title="The file or question cannot be used", duration=None)


def find_port(host: str, port: int) -> int:
    """Returns the port, or a free one for 0, which Gradio does not accept. Raises InputError if it cannot be used."""
    with listen(host, port) as sock:
        return sock.getsockname()[1]


def _configure_gradio(uploads: str) -> None:
    """Sets what Gradio reads when it is imported: no reports to its authors, and the directory of uploads."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = uploads


if __name__ == "__main__":
    arguments = parse()
    sys.exit(run(lambda: main(arguments), arguments.traceback))
