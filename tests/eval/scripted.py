"""The scripted judge of the goldens on a port of this machine."""

import contextlib
import importlib.util
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

GOLDENS = Path(__file__).parent / "goldens"


def load_module(name: str) -> ModuleType:
    """Imports a script of the goldens."""
    spec = importlib.util.spec_from_file_location(f"goldens_{name}", GOLDENS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class ScriptedJudge:
    """A running judge.

    Attributes:
        url: Base URL for the OpenAI client.
        table: The table with the counts of requests.
    """

    def __init__(self, table: Any, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self.table = table


@contextlib.contextmanager
def scripted_judge(table: Mapping[str, Any], delay: float = 0.0) -> Iterator[ScriptedJudge]:
    """Yields a judge that answers from a table in the format of the goldens, after `delay` seconds per request."""
    module = load_module("scripted_judge")
    content = module.Table(table["rows"])
    server = module.Server(("127.0.0.1", 0), module.make_handler(content, None, delay))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield ScriptedJudge(content, server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
