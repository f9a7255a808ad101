"""Fetches media from a list of hosts.

A host name is resolved once, every address of it is checked, and the connection is made to a checked address. Redirects
are refused, since a redirect may lead to another host.
"""

import asyncio
import dataclasses
import ipaddress
import re
import socket
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from infer.media.addresses import is_public
from tarsier_jax.errors import InputError, MediaError
from tarsier_jax.processing.clip import check_size

_PORTS = {"http": 80, "https": 443}
_NAME = 200  # characters of a URL in an error
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\]")
_PRINTABLE = re.compile(r"[!-~]+")  # ASCII without spaces
_UNSAFE = re.compile(r"[\\@<>\"`{}|^]")


@dataclasses.dataclass(frozen=True)
class _Target:
    """The parts of a URL.

    Attributes:
        scheme: "http" or "https".
        host: Name or address, in lower case, an IPv6 address in brackets.
        port: Port.
        path: Path and query.
    """

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        return self.host if self.port == _PORTS[self.scheme] else f"{self.host}:{self.port}"


class Fetcher:
    """Fetches URLs of a list of hosts. Thread-safe.

    Args:
        hosts: See `MediaLoader`.

    Raises:
        InputError: an entry of `hosts` is not a host, or httpx2 is not installed.
    """

    def __init__(self, hosts: Sequence[str]):
        self._hosts = frozenset(pair for entry in hosts for pair in _parse_host(entry))
        if hosts:
            try:
                import httpx2  # noqa: F401
            except ImportError:
                raise InputError("Fetching media from hosts needs httpx2: pip install httpx2.") from None

    def fetch(self, url: str, max_bytes: int, deadline: float) -> bytes:
        """Returns the content at a URL.

        Args:
            url: An http or https URL.
            max_bytes: Largest size of the content.
            deadline: The `time.monotonic` at which the attempt ends.

        Raises:
            MediaError: the URL is not allowed, or its content cannot be fetched.
        """
        target = _parse_url(url)
        self._check_host(target, url)
        addresses = self._resolve(target, url)
        try:
            return asyncio.run(_download(target, addresses, url, max_bytes, deadline))
        except TimeoutError:
            message = f"{url[:_NAME]} was not fetched in time. Send the content, or a smaller file."
            raise MediaError(message, "timeout") from None

    def _check_host(self, target: _Target, url: str) -> None:
        if (target.host, target.port) not in self._hosts:
            raise MediaError(
                f"{url[:_NAME]}: media are not fetched from this host and port. Send the content, or ask the operator "
                "to allow the host.",
                "forbidden",
            )

    def _resolve(self, target: _Target, url: str) -> list[str]:
        """Returns the addresses of the host. Raises MediaError if one of them is not public, unless it is listed."""
        host = target.host.strip("[]")
        if _is_address(host):  # an address in the list allows this address
            return [host]
        try:
            infos = socket.getaddrinfo(host, target.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise MediaError(f"{url[:_NAME]}: the host is not known. Check the URL.", "fetch_failed") from None
        addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
        if not addresses or not all(map(is_public, addresses)):
            raise MediaError(f"{url[:_NAME]}: the host has an address that is not public.", "forbidden")
        return addresses


def _parse_host(entry: str) -> list[tuple[str, int]]:
    """Returns the host and each port of an entry of `hosts`. Raises InputError."""
    host, _, port = entry.lower().partition("]:" if entry.startswith("[") else ":")
    host = f"{host}]" if entry.startswith("[") and port else host
    is_port = not port or (port.isdecimal() and port.isascii() and 0 < int(port) < 65536)
    if not _HOST.fullmatch(host) or not is_port or (entry.endswith(":")):
        raise InputError(f"{entry!r} is not a host. Use a name such as example.com or example.com:8443.")
    return [(host, number) for number in ([int(port)] if port else _PORTS.values())]


def _parse_url(url: str) -> _Target:
    """Returns the parts of a URL. Raises MediaError for every URL that two parsers might read differently."""
    try:
        if not _PRINTABLE.fullmatch(url) or _UNSAFE.search(url):
            raise ValueError("characters")
        parts = urlsplit(url)
        host, port = parts.netloc.lower(), parts.port
        if port is not None:
            host = host.rpartition(":")[0]
        if parts.scheme not in _PORTS or not _HOST.fullmatch(host) or port == 0:
            raise ValueError("host")
    except ValueError:
        raise MediaError(
            f"{url[:_NAME]!a} is not a URL of http or https in plain characters. Percent-encode others.", "unsupported"
        ) from None
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return _Target(parts.scheme, host, port or _PORTS[parts.scheme], path)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _download(target: _Target, addresses: Sequence[str], url: str, max_bytes: int, deadline: float) -> bytes:
    import httpx2

    failure = MediaError(f"{url[:_NAME]} cannot be fetched: the host does not answer. Try again.", "fetch_failed")
    async with (
        asyncio.timeout(deadline - time.monotonic()),
        httpx2.AsyncClient(trust_env=False, follow_redirects=False, timeout=None) as client,
    ):
        for address in addresses:
            try:
                return await _download_from(client, target, address, url, max_bytes)
            except httpx2.ConnectError:
                continue
            except (httpx2.HTTPError, httpx2.InvalidURL):
                raise failure from None
    raise failure


async def _download_from(client: Any, target: _Target, address: str, url: str, max_bytes: int) -> bytes:
    """Requests the content from one address. The certificate must be that of the host."""
    host = f"[{address}]" if ":" in address else address
    request = client.stream(
        "GET",
        f"{target.scheme}://{host}:{target.port}{target.path}",
        headers={"Host": target.authority, "Accept-Encoding": "identity"},
        extensions={"sni_hostname": target.host.strip("[]")},
    )
    async with request as response:
        _check_response(response, url)
        check_size(url[:_NAME], int(response.headers.get("content-length", 0)), max_bytes)
        content = bytearray()
        async for chunk in response.aiter_raw():
            content += chunk
            check_size(url[:_NAME], len(content), max_bytes)
        return bytes(content)


def _check_response(response: Any, url: str) -> None:
    status = response.status_code
    if 300 <= status < 400:
        raise MediaError(
            f"{url[:_NAME]} redirects to another URL, which is not followed. Send the final URL.", "forbidden"
        )
    if status != 200:
        reason = "not_found" if status in (404, 410) else "fetch_failed"
        raise MediaError(f"{url[:_NAME]} cannot be fetched: the host answers {status}. Check the URL.", reason)
    if response.headers.get("content-encoding", "identity") != "identity":
        raise MediaError(f"{url[:_NAME]} is compressed in transfer, although this was not requested.", "fetch_failed")
