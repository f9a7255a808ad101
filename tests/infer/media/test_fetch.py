"""Media are fetched from listed hosts only, at public addresses only. Servers are on the loopback interface."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from infer.media import MediaError, MediaLimits, MediaLoader
from infer.media.addresses import is_public
from infer.media.fetch import Fetcher
from tarsier_jax.errors import InputError
from tarsier_jax.processing.processor import Processor
from tests.infer.media.conftest import picture, sample

LOCAL = (
    *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
    *("192.0.2.1", "198.18.0.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "::127.0.0.1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254"),
    *("64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::808:808", "2002:7f00:1::", "2002:a9fe:a9fe::1"),
    *("2001:0:7f00:1::", "2001:0:808:808:8000:63bf:80ff:fffe", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1"),
    *("fd00:ec2::254", "ff02::1", "2001:db8::1", "localhost", "", "2130706433", "0x7f.1"),
)
PUBLIC = ("8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "2002:808:808::1", "::ffff:8.8.8.8")


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the path says, and records the Host headers."""

    hosts: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.hosts.append(self.headers["Host"])
        name = self.path.split("?")[0]
        if name.startswith("/redirect"):
            return self.reply(302, b"", Location="http://127.0.0.1:9/")
        if name == "/missing.png":
            return self.reply(404, b"")
        if name == "/gzip.png":
            return self.reply(200, b"", **{"Content-Encoding": "gzip"})
        if name == "/large.png":
            return self.reply(200, b"", **{"Content-Length": "100000000"})
        self.send_response(200)
        self.end_headers()
        if name == "/endless.png":
            self.write(b"x" * 1000, 10_000, 0)
        elif name == "/slow.png":
            self.write(b"x", 100, 0.1)
        else:
            self.wfile.write(picture())

    def reply(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def write(self, data: bytes, times: int, pause: float) -> None:
        try:
            for _ in range(times):
                self.wfile.write(data)
                self.wfile.flush()
                time.sleep(pause)
        except OSError:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The host and port of a server on the loopback interface."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def reason(fetcher: Fetcher, url: str, max_bytes: int = 100_000, seconds: float = 10.0) -> str:
    with pytest.raises(MediaError) as error:
        fetcher.fetch(url, max_bytes, time.monotonic() + seconds)
    return error.value.reason


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Makes every host have these addresses, and returns the names that are resolved."""
    names: list[str] = []

    def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        names.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


@pytest.mark.parametrize("address", LOCAL)
def test_local_addresses(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", [a for a in LOCAL if a[:1].isdigit() or ":" in a])
def test_a_listed_name_with_a_local_address_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, "8.8.8.8", address)
    assert reason(Fetcher(["example.com"]), "http://example.com/a.png") == "forbidden"
    host = f"[{address}]" if ":" in address else address
    label = reason(Fetcher(["example.com"]), f"http://{host}/a.png")
    assert label == ("unsupported" if "%" in address else "forbidden")


def test_a_listed_address_allows_itself(server: str, processor: Processor) -> None:
    with MediaLoader(processor, hosts=[server], workers=1) as loader:
        example = loader(sample("image", f"HTTP://{server}/a.png?b=c#part"))
        assert example.selections[0].fetch_seconds > 0
        again = loader(sample("image", f"HTTP://{server}/a.png?b=c#part"))
    assert again.pixel_values is example.pixel_values  # fetched, but not decoded again
    assert Handler.hosts[-2:] == [server, server]
    port = server.partition(":")[2]
    for host in (f"127.0.0.2:{port}", f"localhost:{port}", "127.0.0.1:1", "127.0.0.1", f"[::ffff:7f00:1]:{port}"):
        assert reason(Fetcher([server]), f"http://{host}/a.png") == "forbidden"


def test_a_name_is_resolved_once_and_kept_in_the_request(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With DNS rebinding, a second resolution would lead to another address."""
    port = int(server.partition(":")[2])
    names = resolve_to(monkeypatch, "127.0.0.1")
    monkeypatch.setattr("infer.media.fetch.is_public", lambda address: True)
    fetcher = Fetcher([f"example.com:{port}"])
    assert fetcher.fetch(f"http://EXAMPLE.com:{port}/a.png", 10_000, time.monotonic() + 10) == picture()
    assert [name for name in names if name != "127.0.0.1"] == ["example.com"]
    assert Handler.hosts[-1] == f"example.com:{port}"


def test_answers_of_servers(server: str) -> None:
    fetcher, base = Fetcher([server]), f"http://{server}"
    assert reason(fetcher, f"{base}/redirect.png") == "forbidden"
    assert reason(fetcher, f"{base}/missing.png") == "not_found"
    assert reason(fetcher, f"{base}/gzip.png") == "fetch_failed"
    assert reason(fetcher, f"{base}/large.png") == "too_large"
    assert reason(fetcher, f"{base}/endless.png") == "too_large"
    start = time.monotonic()
    assert reason(fetcher, f"{base}/slow.png", seconds=0.5) == "timeout"
    assert time.monotonic() - start < 5
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        assert reason(Fetcher([host]), f"http://{host}/a.png", seconds=0.3) == "timeout"
        assert reason(Fetcher([host]), f"https://{host}/a.png", seconds=0.3) == "timeout"
    assert reason(Fetcher([host]), f"http://{host}/a.png") == "fetch_failed"
    assert reason(Fetcher([host]), f"http://{host}/a.png", seconds=-1) == "timeout"


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com\\@127.0.0.1/",
        "http://user@example.com/",
        "http://user:word@example.com/",
        "http://example.com:80@127.0.0.1/",
        "http://exa\tmple.com/",
        "http://example.com/\r\nHost: a",
        "http://example.com/ a",
        "http://ex\u0430mple.com/",
        "http://example.com/\u00e9",
        "http://ex%61mple.com/",
        "http://example.com:/",
        "http://example.com:99999/",
        "http://example.com:-1/",
        "http://[::1/",
        "http://[example.com]/",
        "http:///a.png",
        "http:example.com",
        "https:/example.com",
    ],
)
def test_urls_that_parsers_read_differently(url: str) -> None:
    assert reason(Fetcher(["example.com", "127.0.0.1"]), url) == "unsupported"


def test_hosts_and_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    fetcher = Fetcher(["Example.com", "a.org:8443", "a.org:8444"])
    resolve_to(monkeypatch, "10.0.0.1")
    names = resolve_to(monkeypatch, "10.0.0.1")
    for url in ("http://example.com/", "https://example.com/", "https://a.org:8443/", "http://a.org:8444/"):
        assert reason(fetcher, url) == "forbidden"
    assert len(names) == 4  # allowed, and resolved
    for url in ("http://example.com:22/", "https://a.org/", "http://www.example.com/", "http://example.com.evil.org/"):
        assert reason(fetcher, url) == "forbidden"
    assert len(names) == 4
    for entry in ("", "http://a.com", "a.com:", "a.com:0", "a.com:x", "::1", "a b", "*"):
        with pytest.raises(InputError, match="is not a host"):
            Fetcher([entry])


def test_other_schemes(processor: Processor) -> None:
    with MediaLoader(processor, MediaLimits(), hosts=["example.com"], workers=1) as loader:
        for url in ("ftp://example.com/a.png", "gopher://example.com/a.png", "concat:/etc/passwd|/etc/hosts"):
            with pytest.raises(MediaError) as error:
                loader(sample("image", url))
            assert error.value.reason == "forbidden"
