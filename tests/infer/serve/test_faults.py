"""500 malformed requests: each is answered with its reason, and the server answers others after it."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.infer.serve import faults
from tests.infer.serve.stub import RunningServer, StubEngine

CASES = 500
LIBRARY_TEXT = re.compile("Traceback|Errno|Invalid data found|cannot identify|0x[0-9a-f]{6}|<_io")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[RunningServer]:
    with RunningServer(StubEngine(), root=root, waiting=8) as server:
        yield server


def test_malformed_requests(server: RunningServer, root: Path) -> None:
    rng = random.Random(0)
    bodies = [
        *faults.malformed_bodies(rng),
        *(json.dumps(content).encode() for content in faults.wrong_fields(rng)),
        *(json.dumps(content).encode() for content in faults.broken_media(rng, root)),
    ]
    bodies += [json.dumps(content).encode() for content in faults.copies(rng, max(CASES - len(bodies), 20))]
    assert len(bodies) >= CASES
    good = json.dumps(faults.body(faults.image(faults.data_url(faults.picture(), "image/png")))).encode()
    wrong: list[tuple[bytes, int, str]] = []
    headers = {"Content-Type": "application/json"}
    with httpx2.Client(base_url=server.url, timeout=60, headers=headers) as client:
        for i, content in enumerate(bodies):
            response = client.post("/v1/chat/completions", content=content)
            error = response.json().get("error", {})
            message = error.get("message", "")
            is_good = 400 <= response.status_code < 500 and len(message) > 10 and len(response.content) < 2000
            if not is_good or LIBRARY_TEXT.search(message):
                wrong.append((content[:300], response.status_code, response.text[:300]))
            if i % 100 == 0:
                assert client.post("/v1/chat/completions", content=good).status_code == 200
    assert not wrong, "\n".join(map(str, wrong))
    assert server.service.frontend.num_pending == 0
