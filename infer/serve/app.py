"""The routes of the server."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from infer.serve import metrics
from infer.serve.errors import NO_RETRY, ApiError
from infer.serve.prompts import Prompt, PromptLimits, read_prompt
from infer.serve.protocol import read_request
from infer.serve.replies import stream_response, whole_response
from infer.serve.security import Guard
from infer.serve.service import Answer, Service

T = TypeVar("T")

_LARGE_BODY = 2**16  # bytes; a larger body is parsed in a thread
_SEND_S = 30.0  # seconds after the deadline of a request in which its stream must be received


@dataclasses.dataclass(frozen=True)
class BodyLimits:
    """Limits of the body of a request.

    Attributes:
        nbytes: Largest size.
        seconds: Time in which it must arrive.
    """

    nbytes: int = 64 * 2**20
    seconds: float = 60.0


class EventStream(StreamingResponse):
    """The stream of an answer, which is closed at the end, also when the client leaves before the first event.

    The stream and its connection end if the client does not receive it in time.
    """

    def __init__(self, events: AsyncIterator[str], answer: Answer, seconds: float):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._answer, self._seconds = answer, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()

    async def stream_response(self, send: Send) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                await super().stream_response(send)


class _Routes:
    """The endpoints of a service; see `make_app`."""

    def __init__(self, service: Service, prompt_limits: PromptLimits, body_limits: BodyLimits):
        self._service, self._prompt_limits, self._body_limits = service, prompt_limits, body_limits

    async def chat_completions(self, request: Request) -> Response:
        service = self._service
        with service.admission():
            body = await read_body(request, self._body_limits)
            read = asyncio.to_thread if len(body) > _LARGE_BODY else _call
            prompt, stream, include_usage = await read(self._read, body)
            del body
            answer = service.submit(prompt, stream)
        try:
            if not stream:
                return JSONResponse(await _while_connected(request.receive, whole_response(service, answer)))
            await _while_connected(request.receive, answer.prepared())
        except BaseException:
            answer.close()
            raise
        events = stream_response(service, answer, include_usage)
        return EventStream(events, answer, service.seconds + _SEND_S)

    def _read(self, body: bytes) -> tuple[Prompt, bool, bool]:
        """Returns the prompt, and whether the answer and its usage are streamed. Raises ApiError."""
        request = read_request(body)
        if request.model not in (None, self._service.name):
            raise self._unknown_model(request.model)
        options = request.stream_options
        return (
            read_prompt(request, self._prompt_limits),
            request.stream,
            options is not None and options.include_usage,
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["id"] != self._service.name:
            raise self._unknown_model(request.path_params["id"])
        return JSONResponse(self._card())

    async def health(self, request: Request) -> Response:
        return Response(status_code=200 if self._service.error is None else 503)

    async def ready(self, request: Request) -> Response:
        is_ready = self._service.error is None and not self._service.is_draining
        return Response(status_code=200 if is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.export(), media_type=metrics.CONTENT_TYPE)

    def _card(self) -> dict[str, Any]:
        limits = self._prompt_limits
        return {
            "id": self._service.name,
            "object": "model",
            "created": self._service.created,
            "owned_by": "tarsier_jax",
            "max_model_len": limits.prompt_tokens + limits.new_tokens,
        }

    def _unknown_model(self, name: str | None) -> ApiError:
        message = f"The model {(name or '')[:100]!r} is not served. This server has {self._service.name!r}."
        return ApiError(404, message, "model", "model_not_found")


def make_app(
    service: Service,
    prompt_limits: PromptLimits,
    body_limits: BodyLimits = BodyLimits(),
    *,
    key: str | None = None,
    local: bool = True,
) -> Starlette:
    """Returns the application.

    Args:
        service: Answers prompts.
        prompt_limits: Limits of a prompt.
        body_limits: Limits of the body of a request.
        key: Key that requests must have; None for none.
        local: Whether the server listens on the loopback address, which restricts the header Host.
    """
    routes = _Routes(service, prompt_limits, body_limits)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", routes.chat_completions, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{id:path}", routes.model),
            Route("/health", routes.health),
            Route("/ready", routes.ready),
            Route("/metrics", routes.metrics),
        ],
        middleware=[Middleware(Guard, metrics=service.metrics, key=key, local=local)],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _disconnected,
            Exception: _unexpected_error,
        },
    )
    app.router.redirect_slashes = False
    return app


async def read_body(request: Request, limits: BodyLimits) -> bytes:
    """Returns the body of a request.

    Raises:
        ApiError: the body is not JSON, is too large, or does not arrive in time.
        ClientDisconnect: the client closed the connection.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "The body must be JSON: send the header Content-Type: application/json.")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "A compressed body is not read. Send it without Content-Encoding.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.nbytes:
        raise _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.nbytes:
                    raise _too_large(limits)
    except TimeoutError:
        headers = {**NO_RETRY, "Connection": "close"}
        raise ApiError(408, f"The body did not arrive within {limits.seconds:g} seconds.", headers=headers) from None
    return bytes(body)


def _too_large(limits: BodyLimits) -> ApiError:
    return ApiError(
        413,
        f"The body is larger than {limits.nbytes} bytes, the limit. Send smaller files, or fewer frames.",
        headers={"Connection": "close"},
    )


async def _call(function: Any, *args: Any) -> Any:
    return function(*args)


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`, which is cancelled when the client closes the connection.

    Raises:
        ClientDisconnect: the client closed the connection.
    """
    task, disconnection = asyncio.ensure_future(work), asyncio.ensure_future(_disconnection(receive))
    try:
        await asyncio.wait((task, disconnection), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        disconnection.cancel()
        await asyncio.gather(task, disconnection, return_exceptions=True)


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method[:20]} {request.scope['path'][:100]}: {error.detail}."
    return await _api_error(request, ApiError(error.status_code, message, headers=error.headers))


async def _disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody receives it


async def _unexpected_error(request: Request, error: Exception) -> Response:
    return await _api_error(request, ApiError(500, "An unexpected error; see the log of the server."))
