"""Servers and judges of tests."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eval.judges.cache import ReplyCache
from eval.judges.endpoint import EndpointJudge, EndpointOptions
from eval.judges.prompts import DEFAULT_PROMPTS
from tests.eval.judges.servers import Server, ServerFactory, serve


@pytest.fixture
def start_server() -> Iterator[ServerFactory]:
    """Starts servers that stop at the end of the test."""
    with contextlib.ExitStack() as stack:

        def start(*replies: Any, **options: Any) -> Server:
            server = Server(*replies, **options)
            stack.enter_context(serve(server))
            return server

        yield start


@pytest.fixture
def make_judge(tmp_path: Path) -> Iterator[Callable[..., EndpointJudge]]:
    """Makes judges that share a cache, with short waits."""
    with ReplyCache(tmp_path / "replies.sqlite") as cache:

        def make(url: str, **options: Any) -> EndpointJudge:
            return EndpointJudge(EndpointOptions(url, **{"first_wait": 0.001, **options}), DEFAULT_PROMPTS, cache)

        yield make
