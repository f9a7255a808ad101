"""Checks of every request before its route: the host, the key, and the identifier of the request."""

import hmac
import logging
import re
import secrets
from collections.abc import Iterable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infer.serve.errors import ApiError
from infer.serve.metrics import Metrics

_logger = logging.getLogger("infer.serve")
_MAX_PATH = 100  # characters of a path in the log
_OPEN_PATHS = frozenset({"/health"})
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_PORT = re.compile(r":\d{0,5}\Z", re.ASCII)


class Guard:
    """Middleware that checks the key on every path but /health, and the host if the server is on this machine only.

    A page of another site cannot read from a server on the user's machine by a name that resolves to 127.0.0.1 (DNS
    rebinding), because its requests have another host.

    Args:
        app: The application.
        metrics: Counts responses by status.
        key: The key of the header `Authorization: Bearer KEY`; None for none.
        local: Whether the server listens on the loopback address.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, key: str | None, local: bool):
        self._app, self._metrics, self._local = app, metrics, local
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = list(scope["headers"])
        identifier = _request_id(_values(headers, b"x-request-id"))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responses(str(message["status"])).inc()
                if scope["method"] != "GET" or message["status"] >= 400:
                    path = scope["path"][:_MAX_PATH]
                    _logger.info(
                        "%s %r %d %s", scope["method"][:_MAX_PATH], path, message["status"], identifier.decode()
                    )
                message = {**message, "headers": [*message["headers"], (b"x-request-id", identifier)]}
            await send(message)

        try:
            self._check(scope["path"], headers)
        except ApiError as error:
            response = JSONResponse(error.body, error.status, error.headers)
            await response(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)

    def _check(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raises ApiError for a wrong host or key."""
        if self._local:
            hosts = [_PORT.sub("", value.decode("latin-1")).lower() for value in _values(headers, b"host")]
            if len(hosts) != 1 or hosts[0] not in _LOCAL_HOSTS:
                raise ApiError(
                    403, "The server listens on this machine only. Use http://127.0.0.1 or http://localhost."
                )
        if self._key is None or path in _OPEN_PATHS:
            return
        values = _values(headers, b"authorization")
        scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
            raise ApiError(
                401,
                "The key is missing or wrong. Send the header Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _values(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for key, value in headers if key.lower() == name]


def _request_id(values: list[bytes]) -> bytes:
    """Returns the client's identifier, if it has a plain one, or a new one."""
    text = values[0].decode("latin-1") if values else ""
    return values[0] if _REQUEST_ID.fullmatch(text) else secrets.token_hex(16).encode()
