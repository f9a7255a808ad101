"""A Hugging Face hub on this machine, with the routes that `huggingface_hub.HfFileSystem` reads."""

import json
import re
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/main|/tree/main/?(.*))?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/main/(.+)")


class Hub(ThreadingHTTPServer):
    """Serves directories by the names of their repositories, such as "datasets/org/name", and lists the requests."""

    def __init__(self, repositories: Mapping[str, Path]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.requests = repositories, list[str]()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(path)
        match = _API.fullmatch(path) or _FILE.fullmatch(path)
        kind, name, inside = match.groups() if match else ("", "", None)
        repository = self.server.repositories.get(f"datasets/{name}" if kind in ("datasets", "datasets/") else name)
        if repository is None or not (target := repository / (inside or "")).exists():
            self._send(404, b"", "RepoNotFound" if repository is None else "EntryNotFound")
        elif target.is_file():
            self._send(200, target.read_bytes())
        elif inside is None:
            self._send(200, json.dumps({"id": name, "sha": "0" * 40}).encode())
        else:
            files = target.rglob("*") if "recursive=true" in self.path.lower() else target.iterdir()
            self._send(200, json.dumps([_entry(file, repository) for file in files]).encode())

    def _send(self, status: int, content: bytes, error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Error-Code", error)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _entry(file: Path, repository: Path) -> dict[str, Any]:
    kind, status = "file" if file.is_file() else "directory", file.stat()
    path = file.relative_to(repository).as_posix()
    return {"path": path, "type": kind, "size": status.st_size, "oid": str(status.st_mtime_ns)}
