"""A decoder that fails costs its sample an error, and nothing else."""

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from infer.media import MediaError, MediaLimits, MediaLoader
from infer.media.messages import MalformedReplyError, read_header, read_visuals, receive, send_reply
from tarsier_jax.errors import InputError
from tests.infer.media.conftest import picture, sample

Start = Callable[..., MediaLoader]


def reason(loader: MediaLoader, name: str) -> str:
    with pytest.raises(MediaError) as error:
        loader(sample("video", f"/{name}.mp4"))
    return error.value.reason


def test_failures_are_those_of_their_sample(faulty: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    loader = faulty(MediaLimits(timeout=1.0, memory_bytes=2 << 30))
    image = sample("image", picture())
    expected = loader(image).input_ids.tolist()
    for name, label in {
        "abort": "crashed",
        "killed": "crashed",
        "lie": "crashed",
        "hang": "timeout",
        "memory": "too_large",
        "address": "undecodable",
    }.items():
        (pid,) = loader._children.pids
        assert reason(loader, name) == label
        assert loader(sample("image", picture(60, 60 + len(name)))).input_ids.tolist() != []
        assert (loader._children.pids == [pid]) == (name == "address")
        assert name == "address" or not Path(f"/proc/{pid}").exists()
    assert loader(image).input_ids.tolist() == expected
    with pytest.raises(MediaError, match=r"^The images and videos cannot be decoded \(ValueError\)\. Convert"):
        loader(sample("video", "/address.mp4"))
    with pytest.raises(InputError, match=r"^none$"):  # the environment of a child is without keys
        loader(sample("video", "/secret.mp4"))


def test_a_process_killed_from_outside(faulty: Start) -> None:
    loader = faulty()
    (pid,) = loader._children.pids
    errors: list[str] = []
    thread = threading.Thread(target=lambda: errors.append(reason(loader, "hang")))
    thread.start()
    time.sleep(1.0)  # it starts, and decodes
    os.kill(pid, signal.SIGKILL)
    thread.join(10)
    assert errors == ["crashed"]
    (pid,) = loader._children.pids
    loader(sample("image", picture()))
    os.kill(pid, signal.SIGKILL)  # while no sample is decoded
    time.sleep(0.1)
    loader(sample("image", picture(60, 60)))
    assert loader._children.pids != [pid]


def test_closing_ends_calls_and_processes(faulty: Start) -> None:
    loader = faulty(workers=2)
    pids = loader._children.pids
    errors: list[str] = []
    threads = [threading.Thread(target=lambda: errors.append(reason(loader, "hang"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    loader.close()
    for thread in threads:
        thread.join(10)
    assert errors == ["crashed"] * 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    with pytest.raises(MediaError, match="closed"):
        loader(sample("image", picture()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_survives_its_program(number: int) -> None:
    """Also without `close`."""
    program = (
        "import signal, time\nfrom infer.media import MediaLimits\nfrom infer.media.children import ChildPool\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "pool = ChildPool(MediaLimits(), 2)\nprint(*pool.pids, flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    pids = process.stdout.readline().split()
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(number)
        time.sleep(0.2)
    assert process.poll() is not None
    process.stdout.close()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{int(pid)}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{int(pid)}").exists() for pid in pids)


def test_a_process_starts_without_jax_and_transformers() -> None:
    program = (
        "import sys, infer.media.child\n"
        "print(*{'jax', 'flax', 'transformers', 'torch', 'httpx2', 'jinja2'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "\n"


def test_replies_are_checked() -> None:
    two, four = b"\2" + bytes(7), b"\4" + bytes(7)
    for content in (b"", bytes(20), b"\1" + bytes(20), b"\xff" * 20, two + b"[]", four + b"\xff" * 4):
        with pytest.raises(MalformedReplyError):
            read_header(io.BytesIO(content))
    ours, theirs = socket.socketpair()
    good = {"grid_thw": [[1, 2, 2]], "frames": 1, "selections": [[[0], None, [28, 28], 0.5]]}
    with ours, theirs:
        send_reply(theirs, good, np.arange(24, dtype=np.float32).reshape(4, 6))
        (descriptor,) = receive(ours)
    with open(descriptor, "rb") as reply:
        assert read_header(reply) == good
        start = reply.tell()
        for key, value in (
            ("grid_thw", [[1, 2, 3]]),
            ("grid_thw", [[1, 2, -2]]),
            ("grid_thw", [[1, 2, 2.0]]),
            ("grid_thw", [[2**30, 2**30, 2**30]]),
            ("grid_thw", []),
            ("frames", "1"),
            ("frames", True),
            ("selections", [[[0], None, [28], 0.5]]),
            ("selections", [[[0.5], None, [28, 28], 0.5]]),
            ("selections", [[[0], [0.0, 1.0], [28, 28], 0.5]]),
            ("selections", None),
        ):
            with pytest.raises(MalformedReplyError):
                read_visuals(reply, {**good, key: value}, 6, 1)
        reply.seek(start)
        visuals = read_visuals(reply, good, 6, 1)
    np.testing.assert_array_equal(visuals.pixel_values, np.arange(24).reshape(4, 6))
