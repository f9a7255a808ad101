"""Load on `infer.serve`: many clients for some time, one client, and Hugging Face behind a single-request server.

    python -m benchmarks.serve                             # 16 clients for 10 s, on the embedded model
    python -m benchmarks.serve --clients 64 --seconds 180
    python -m benchmarks.serve --url http://127.0.0.1:8000/v1

Starts the server on the embedded model, unless --url names a running one. Each client streams the answers to clips of
moving shapes, one request after the other, and after an error 429 waits as the server says. Prints requests per second,
the 50th and 95th percentiles of the time to the first text and to the end, the statuses, and the memory of the server's
processes over time. A clip that is sent again is not decoded again. The same clips then go through Hugging Face's
`generate`, on one request at a time behind a minimal HTTP server.
"""

import argparse
import asyncio
import base64
import collections
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import httpx2
import numpy as np

from benchmarks.bulk import memory
from eval.shapes.annotations import VIDEO_PROMPT
from eval.shapes.clips import HELD_OUT, draw_clips
from eval.shapes.render import write_clip
from tarsier_jax.weights import EMBEDDED

NEW_TOKENS = 96
SLOTS = 16
REFERENCE_CLIENTS = 2  # more only wait longer


class Tally:
    """The requests of a phase.

    Attributes:
        first: Seconds to the first text of each answered request.
        total: Seconds to the end of each answered request.
        statuses: Number of responses by status.
        texts: The answers by clip.
    """

    def __init__(self) -> None:
        self.first: list[float] = []
        self.total: list[float] = []
        self.statuses = collections.Counter[int | str]()
        self.texts: dict[int, set[str]] = collections.defaultdict(set)
        self.seconds = 0.0

    @property
    def rate(self) -> float:
        return len(self.total) / self.seconds

    def __str__(self) -> str:
        quantiles = [f"{np.quantile(times or [0], q):.2f}" for times in (self.first, self.total) for q in (0.5, 0.95)]
        return (
            f"{self.rate:.2f} requests/s; first text p50 {quantiles[0]} s, p95 {quantiles[1]} s; "
            f"end p50 {quantiles[2]} s, p95 {quantiles[3]} s; {dict(self.statuses)}"
        )


async def run_clients(url: str, headers: dict[str, str], bodies: list[bytes], clients: int, seconds: float) -> Tally:
    """Runs the clients until the time is over, and waits for their last answers."""
    tally, start = Tally(), time.perf_counter()
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)

    async def run(number: int) -> None:
        for i in range(number, 10**9):
            if time.perf_counter() - start > seconds:
                return
            wait = await send(client, tally, i % len(bodies), bodies[i % len(bodies)])
            await asyncio.sleep(wait)

    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits) as client:
        await asyncio.gather(*(run(number) for number in range(clients)))
    tally.seconds = time.perf_counter() - start
    return tally


async def send(client: httpx2.AsyncClient, tally: Tally, clip: int, body: bytes) -> float:
    """Sends a request; returns the seconds to wait before the next one."""
    start, first, text = time.perf_counter(), 0.0, ""
    try:
        async with client.stream("POST", "/chat/completions", content=body) as response:
            tally.statuses[response.status_code] += 1
            if response.status_code != 200:
                await response.aread()
                return float(response.headers.get("retry-after", 1))
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    tally.statuses[str(event["error"]["code"])] += 1
                    return 0.0
                delta = event["choices"][0]["delta"].get("content", "") if event["choices"] else ""
                first = first or (time.perf_counter() - start if delta else 0.0)
                text += delta
    except httpx2.TransportError as error:
        tally.statuses[type(error).__name__] += 1
        return 1.0
    tally.first.append(first)
    tally.total.append(time.perf_counter() - start)
    tally.texts[clip].add(text)
    return 0.0


def make_bodies(clips: int) -> list[bytes]:
    """Returns the request of each clip, with the content as a data URL."""
    bodies = []
    with tempfile.TemporaryDirectory() as directory:
        for i, clip in enumerate(draw_clips(HELD_OUT, clips)):
            content = write_clip(Path(directory) / f"{i}.mp4", clip.video["frames"]).read_bytes()
            url = f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
            parts = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": VIDEO_PROMPT}]
            request = {"messages": [{"role": "user", "content": parts}], "stream": True, "max_tokens": NEW_TOKENS}
            bodies.append(json.dumps(request).encode())
    return bodies


@contextlib.contextmanager
def our_server() -> Iterator[tuple[str, int]]:
    """Starts `infer.serve` on the embedded model; yields its URL and process."""
    command = [sys.executable, "-m", "infer.serve", "--port", "0", "--slots", str(SLOTS)]
    command += ["--max_new_tokens", str(NEW_TOKENS)]
    with tempfile.NamedTemporaryFile("w+") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            line = wait_for_line(Path(log.name), process)
            print(line, flush=True)
            yield line.split()[3], process.pid
        finally:
            process.send_signal(signal.SIGTERM)


@contextlib.contextmanager
def watched_memory(pid: int) -> Iterator[list[int]]:
    """Yields a list that receives the MiB of a process and its descendants, now and every second of the block."""
    samples, end = [memory(pid) >> 20], threading.Event()

    def watch() -> None:
        while not end.wait(1):
            samples.append(memory(pid) >> 20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        end.set()
        thread.join()


def wait_for_line(log: Path, process: subprocess.Popen[Any]) -> str:
    """Returns the line that a started server prints."""
    while process.poll() is None:
        for line in log.read_text(encoding="utf-8").splitlines():
            if line.startswith("serving"):
                return line
        time.sleep(0.1)
    raise RuntimeError(f"The server did not start:\n{log.read_text(encoding='utf-8')}")


def serve_reference(port: Any) -> None:
    """Answers requests with Hugging Face's model, one at a time. Only the text of the first event is sent."""
    from benchmarks.caption import Reference  # sets the threads of this process
    from convert.references import Qwen2VlReference
    from infer.media import MediaLoader
    from tarsier_jax.families import family_of, load_config
    from tarsier_jax.weights import resolve

    directory = resolve(EMBEDDED)
    config = load_config(directory)
    processor = family_of(config).load_processor(directory, config)
    model = Reference(Qwen2VlReference(directory, config, processor.eos_token_ids).model, processor.eos_token_ids)
    loader = MediaLoader(processor, workers=1)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            video, text = request["messages"][0]["content"]
            item = {"type": "video", "video": {"video_file": video["video_url"]["url"]}}
            example = loader({"messages": [{"role": "user", "content": [item, text]}]})
            (tokens,) = model.answer([example], [NEW_TOKENS])
            event = {"choices": [{"delta": {"content": processor.decode(tokens)}}]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(HTTPServer):
        request_queue_size = 1024  # connections that wait

    server = Server(("127.0.0.1", 0), Handler)
    port.send(server.server_port)
    server.serve_forever()


@contextlib.contextmanager
def reference_server() -> Iterator[str]:
    """Starts `serve_reference` in a process; yields its URL."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    process = context.Process(target=serve_reference, args=(sender,))
    process.start()
    try:
        yield f"http://127.0.0.1:{receiver.recv()}"
    finally:
        process.kill()
        process.join()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="of a running server, http://127.0.0.1:8000/v1; its key is in TARSIER_API_KEY")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10, help="of the load (one client: half, at most 20 s)")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--no_reference", action="store_true", help="without Hugging Face")
    args = parser.parse_args()
    bodies = make_bodies(args.clips)
    headers = {
        "Authorization": f"Bearer {os.environ.get('TARSIER_API_KEY', 'none')}",
        "Content-Type": "application/json",
    }

    def load(url: str, clients: int, seconds: float) -> Tally:
        return asyncio.run(run_clients(url, headers, bodies, clients, seconds))

    print(f"load of the machine: {os.getloadavg()[0]:.1f}, {len(os.sched_getaffinity(0))} cores")
    with contextlib.ExitStack() as stack:
        url, pid = (args.url, None) if args.url else stack.enter_context(our_server())
        load(url, 1, 1)
        one = load(url, 1, min(args.seconds / 2, 20))
        print(f"one client: {one}", flush=True)
        watch = stack.enter_context(watched_memory(pid)) if pid else []
        many = load(url, args.clients, args.seconds)
        print(f"{args.clients} clients for {many.seconds:.0f} s: {many}")
        print(f"{many.rate / one.rate:.1f} times the requests of one client")
        if watch:
            tenths = [watch[i * (len(watch) - 1) // 10] for i in range(11)]
            print(f"MiB of the server's memory, at each tenth of the time: {', '.join(map(str, tenths))}")
    if not args.no_reference:
        with reference_server() as url:
            load(url, 1, 1)
            reference = load(url, REFERENCE_CLIENTS, min(args.seconds, 30))
        print(f"Hugging Face, {REFERENCE_CLIENTS} clients: {reference}")
        same = sum(many.texts[clip] == reference.texts[clip] for clip in reference.texts)
        print(f"{many.rate / reference.rate:.1f} times Hugging Face; {same} of {len(reference.texts)} answers equal")
    print(f"load of the machine: {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
