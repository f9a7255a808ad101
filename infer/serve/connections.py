"""The HTTP server: limits and deadlines of connections, and the end of the process."""

import asyncio
import json
import os
import socket
from types import FrameType
from typing import Any

import h11
from starlette.types import ASGIApp
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from infer.serve.errors import bad_request
from infer.serve.service import Service

_HEADER_BYTES = 32 * 1024  # of a request line and its headers
_HEADER_S = 20.0  # seconds in which they must arrive
_KEEP_ALIVE_S = 15  # seconds between two requests of a connection
_SPARE_CONNECTIONS = 64  # besides those of the requests in progress
_FORCED = 130  # exit status after a second signal


class TimedProtocol(H11Protocol):
    """A connection that ends if the headers of a request do not arrive in time.

    uvicorn limits only the time between two requests.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._header_timer = self.loop.call_later(_HEADER_S, self._end_if_idle)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._is_idle():
            self._stop_timer()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(_HEADER_S, self._end_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answers a request that is not HTTP, or whose headers are too large, with an error object."""
        body = json.dumps(bad_request(f"{msg} Headers may have {_HEADER_BYTES} bytes.").body).encode()
        headers = [("content-type", "application/json"), ("connection", "close")]
        events = [h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()]
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _end_if_idle(self) -> None:
        self._header_timer = None
        if self._is_idle():
            self.timeout_keep_alive_handler()

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


class DrainingServer(Server):
    """A server that answers the requests in progress after a signal, and ends at once after a second one.

    Args:
        config: Configuration of uvicorn.
        service: Admits no requests after the first signal.
    """

    def __init__(self, config: Config, service: Service):
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(_FORCED)  # threads of the engine may be in a device program
        self.end()

    def end(self) -> None:
        """Ends the server after the requests in progress."""
        self._service.is_draining = self.should_exit = True


def serve(service: Service, app: ASGIApp, sock: socket.socket, drain_seconds: float) -> None:
    """Serves until a signal, and then until the requests in progress are answered.

    Args:
        service: Answers the requests of the application. It is closed at the end.
        app: The application.
        sock: The result of `infer.network.listen`.
        drain_seconds: Time for the requests in progress after a signal. Then they are cancelled.

    Raises:
        EngineError: the engine failed. All requests that waited were answered with status 503.
    """
    server = make_server(app, service, drain_seconds)
    server.run(sockets=[sock])
    if service.error is not None:
        raise service.error
    service.frontend.close()


def make_server(app: ASGIApp, service: Service, drain_seconds: float) -> DrainingServer:
    """Returns a server of the application; see `serve`."""
    config = Config(
        app,
        loop="asyncio",
        http=TimedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,  # its default closes the handlers of other packages
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=service.frontend.capacity + _SPARE_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(drain_seconds),
        h11_max_incomplete_event_size=_HEADER_BYTES,
    )
    server = DrainingServer(config, service)
    service.on_failure = server.end
    return server
