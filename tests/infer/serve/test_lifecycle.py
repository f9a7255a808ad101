"""The process: flags, signals, and the failure of the engine."""

import contextlib
import importlib.util
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from infer.network import read_key
from infer.serve import __main__ as program
from tarsier_jax.programs import run
from tarsier_jax.weights import EMBEDDED

QUESTION = {"messages": [{"role": "user", "content": "What happens?"}], "max_tokens": 40}
ROOT = Path(__file__).parents[3]
Start = Callable[..., tuple[subprocess.Popen[str], str]]


def serve_main(*flags: str) -> int:
    args = program.parse(list(flags))
    return run(lambda: program.main(args), args.traceback)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--host", "0.0.0.0", "--port", "0"), "needs a key"),
        (("--host", "no.such.host.invalid"), "cannot listen on no.such.host.invalid"),
        (("--port", "70000"), "--port is 70000"),
        (("--media_root", "/no/such/directory"), "/no/such/directory is not a directory"),
        (("--slots", "0"), "--slots is 0"),
        (("--timeout", "0"), "--timeout is 0"),
        (("--n_frames", "0"), "n_frames"),
        (("--mesh", "rows=2"), "--mesh rows=2"),
    ],
)
def test_wrong_flags(
    flags: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are errors before the model is loaded."""
    monkeypatch.setattr(program, "start_engine", lambda *_, **__: pytest.fail("the model is loaded"))
    assert serve_main(*flags) == 1
    err = capsys.readouterr().err
    assert message in err and "loading" not in err


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From a file or the environment; short ones are refused, without printing them."""
    file = tmp_path / "key"
    file.write_text("a-key-of-some-length\n")
    assert read_key(file) == "a-key-of-some-length"
    assert read_key() is None
    monkeypatch.setenv("TARSIER_API_KEY", "short-secret")
    assert serve_main() == 1
    err = capsys.readouterr().err
    assert "TARSIER_API_KEY" in err and "short-secret" not in err


def test_missing_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find_spec(name))
    assert serve_main() == 1
    assert "infer.serve needs uvicorn: pip install -e '.[serve]'" in capsys.readouterr().err


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the server of `stub.py`; returns its process and URL. Processes are killed at the end."""
    with contextlib.ExitStack() as stack:

        def start(*args: str) -> tuple[subprocess.Popen[str], str]:
            command = [sys.executable, "-m", "tests.infer.serve.stub", *args]
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None
            return process, f"http://127.0.0.1:{process.stdout.readline().strip()}"

        yield start


def post(url: str) -> httpx2.Response:
    return httpx2.post(f"{url}/v1/chat/completions", json=QUESTION, timeout=60)


def post_in_vain(url: str) -> None:
    with pytest.raises(httpx2.TransportError):
        post(url)


def wait_for_running(url: str) -> None:
    """Waits until a request is in a slot."""
    for _ in range(1000):
        if f'tarsier_num_requests_running{{model_name="{EMBEDDED}"}} 1.0' in httpx2.get(f"{url}/metrics").text:
            return
        time.sleep(0.02)
    pytest.fail("no request is in a slot")


def wait_for_refusal(url: str) -> None:
    """Waits until the server accepts no more connections."""
    with pytest.raises(httpx2.TransportError):
        for _ in range(1000):
            httpx2.get(f"{url}/health", timeout=5)
            time.sleep(0.02)


@pytest.mark.slow
def test_a_signal_drains(start: Start) -> None:
    process, url = start("0.1")
    responses: list[Any] = []
    thread = threading.Thread(target=lambda: responses.append(post(url)))
    thread.start()
    wait_for_running(url)
    process.send_signal(signal.SIGTERM)
    wait_for_refusal(url)
    thread.join(30)
    assert responses[0].status_code == 200 and process.wait(30) == 0


@pytest.mark.slow
def test_a_second_signal_ends_at_once(start: Start) -> None:
    process, url = start("2")
    thread = threading.Thread(target=post_in_vain, args=(url,))
    thread.start()
    wait_for_running(url)
    process.send_signal(signal.SIGTERM)
    wait_for_refusal(url)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 130
    thread.join(30)


@pytest.mark.slow
def test_a_failure_of_the_engine_ends_the_process(start: Start) -> None:
    process, url = start("0", "broken")
    assert post(url).status_code == 503
    assert process.wait(30) == 1
    assert process.stderr is not None
    assert "error: The engine failed: RuntimeError: RESOURCE_EXHAUSTED" in process.stderr.read().splitlines()


@pytest.mark.slow
def test_the_program(tmp_path: Path) -> None:
    """From its start to an answer and its end, with a key."""
    key = tmp_path / "key"
    key.write_text("a-key-of-some-length")
    command = [sys.executable, "-m", "infer.serve", "--port", "0", "--slots", "2", "--max_new_tokens", "40"]
    command += ["--api_key_file", str(key)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith("serving"))
        assert f"serving {EMBEDDED} at http://127.0.0.1:" in line and "2 slots, up to 6 requests" in line
        url = line.split()[3]
        headers = {"Authorization": "Bearer a-key-of-some-length"}
        response = httpx2.post(f"{url}/chat/completions", json=QUESTION, headers=headers, timeout=60)
        process.send_signal(signal.SIGTERM)
        assert response.status_code == 200, response.text
        assert process.wait(60) == 0
