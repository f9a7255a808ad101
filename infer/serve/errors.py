"""The error that a request is answered with."""

from collections.abc import Mapping
from typing import Any

_MAX_MESSAGE = 600  # characters; an error must not be much longer than the request that causes it
_TYPES = {
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "TimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}
NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients read it: the same request would do the same work again


class ApiError(Exception):
    """An error of one request, as an object of OpenAI's protocol.

    Attributes:
        status: HTTP status.
        message: Names the field and the remedy.
        param: Name of the field, or None.
        code: Short label, such as "too_large"; the status by default.
        headers: Headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | int | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param = status, param if param is None else param[:100]
        self.message = message if len(message) <= _MAX_MESSAGE else f"{message[:_MAX_MESSAGE]}..."
        self.code = status if code is None else code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        kind = _TYPES.get(self.status, "BadRequestError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Returns the error for a request that is not valid."""
    return ApiError(400, message, param, code)
