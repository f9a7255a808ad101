"""The address and the key of a program that listens on the network."""

import ipaddress
import os
import socket
from pathlib import Path

from tarsier_jax.errors import InputError

KEY_VARIABLE = "TARSIER_API_KEY"
_MIN_LENGTH = 16


def read_key(path: Path | None = None) -> str | None:
    """Returns the key in a file, or else of the environment variable `KEY_VARIABLE`, or None.

    Raises:
        InputError: the key is too short, or has characters that a header cannot contain.
        OSError: the file cannot be read.
    """
    source, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE, "").strip()
    if path is not None:
        source, key = str(path), _read_file(path)
    elif not key:
        return None
    if len(key) < _MIN_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(
            f"The key in {source} must have at least {_MIN_LENGTH} printable ASCII characters. Make one with "
            "`openssl rand -hex 32`."
        )
    return key


def is_loopback(host: str) -> bool:
    """Returns whether a host is this machine, and not reachable from others."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound to an address. Port 0 chooses a free one. Raises InputError."""
    if not 0 <= port < 2**16:  # getaddrinfo takes its lower 16 bits
        raise InputError(f"--port is {port}; it must be from 0 to {2**16 - 1}.")
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"The program cannot listen on {host}:{port} ({reason}). Choose another --host or --port."
        ) from None
    return sock


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file with a key.") from None
