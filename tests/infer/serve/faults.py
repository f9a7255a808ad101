"""Malformed requests: bodies, fields, media and paths that a server refuses."""

import base64
import copy
import io
import json
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tarsier_jax.weights import EMBEDDED_CLIP

JUNK = [None, 3, -1, 1e300, True, "x", "", [], {}, [None], [[[]]], {"a": {"b": 1}}, "\u0000", 10**30]


def data_url(content: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(kind: str = "PNG", size: tuple[int, int] = (64, 48)) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(file, kind)
    return file.getvalue()


def body(*parts: Any, **fields: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": "Describe it."}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}


def video(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url, **fields}}


def image(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def pixel_bomb(width: int, height: int) -> bytes:
    """A PNG of black pixels, a thousand times smaller than its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(min((width + 7) // 8 + 1, 10_000)) * min(height, 10_000), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def long_gif(frames: int, size: int = 1) -> bytes:
    """A GIF with a few bytes per frame."""
    head = b"GIF89a" + struct.pack("<HHBBB", size, size, 0x80, 0, 0) + bytes(3) + b"\xff" * 3
    frame = b"\x21\xf9\x04\x00\x0a\x00\x00\x00" + b"\x2c\x00\x00\x00\x00\x01\x00\x01\x00\x00" + b"\x02\x02\x44\x01\x00"
    return head + frame * frames + b";"


def malformed_bodies(rng: random.Random) -> Iterator[bytes]:
    """150 bodies that are not JSON, or not objects."""
    whole = json.dumps(body(image(data_url(picture(), "image/png")))).encode()
    for _ in range(60):
        yield rng.randbytes(rng.randrange(200))
    for _ in range(50):
        yield whole[: rng.randrange(len(whole) - 1)]
    for _ in range(30):
        at = rng.randrange(len(whole))
        yield whole[:at] + b"\xff\xfe" + whole[at:]
    yield from (
        b"",
        b"null",
        b"[]",
        b"3",
        b'"text"',
        b"{}",
        b"[" * 50_000,
        b'{"a":' * 50_000,
        b"NaN",
        b"\xef\xbb\xbf{}",
    )


def wrong_fields(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Bodies with a value that its field does not have, an unknown field, or values that contradict each other."""
    url = data_url(picture(), "image/png")
    numbers = ("temperature", "top_p", "repetition_penalty", "max_tokens", "max_completion_tokens", "seed", "top_k")
    for name in numbers:
        for value in ("1", [], {}, True, -3, 10**30, [1], "NaN"):
            yield body(image(url), **{"max_tokens": None, name: value})
    for name in ("stream", "continue_final_message"):
        for value in ("yes", 1, [], {}, 0.5):
            yield body(**{name: value})
    for name in ("stop", "mm_processor_kwargs", "media_io_kwargs", "stream_options", "messages"):
        for value in (3, True, [3], {"x": 1}, [[]], [{}], [""], ["a"] * 17):
            yield body(**{name: value})
    for name in ("n", "logprobs", "tools", "response_format", "logit_bias", "echo", "min_p", "best_of", "store"):
        yield body(**{name: rng.choice([7, "x", [1], {"type": "json_object"}])})
    for _ in range(40):
        name = "".join(rng.choices("abcdefgh_\u00e9\u4e2d", k=rng.randrange(1, 12)))
        yield body(**{f"x_{name}": rng.choice(JUNK[1:])})
    for role in ("tool", "function", "", "USER", 3, [], {}):
        yield {"messages": [{"role": role, "content": "a"}]}
    for content in (
        3,
        True,
        {},
        [3],
        [{"type": "audio"}],
        [{"text": "a"}],
        [{"type": "text"}],
        [{"type": "text", "text": 3}],
    ):
        yield {"messages": [{"role": "user", "content": content}]}
    for part in ({"type": "image_url", "image_url": url}, {"type": "image_url"}, image(""), image(url, detail="high")):
        yield body(part)
    for fields in ({"fps": 0}, {"fps": -1}, {"fps": "2"}, {"num_frames": 0}, {"num_frames": 10**9}, {"nframes": 4},
                   {"num_frames": 2, "n_frames": 3}, {"max_pixels": 0}, {"max_pixels": 10**12}, {"min_pixels": 10**9},
                   {"start_time": -1}, {"start_time": 5, "end_time": 2}, {"start_time": 10**9}):  # fmt: skip
        yield body(video(data_url(EMBEDDED_CLIP.read_bytes()), **fields))
    yield body(image(url), mm_processor_kwargs={"fps": 2})
    yield body(mm_processor_kwargs={"max_pixels": 5000})
    yield body(video(url, num_frames=3), mm_processor_kwargs={"num_frames": 4})
    yield body(video(url, num_frames=3), video(url))
    yield body(image(url, max_pixels=3000), image(url))
    yield body(max_tokens=3, max_completion_tokens=4)
    yield body(stream_options={"include_usage": True})
    yield body(continue_final_message=True)
    yield body(add_generation_prompt=False)
    yield body(model="gpt-9")
    yield {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    yield {"messages": [{"role": "assistant", "content": [image(url)]}, {"role": "user", "content": "b"}]}
    yield {"messages": [{"role": "user", "content": "word " * 30_000}]}
    yield body(*[image(url)] * 300)


def broken_media(rng: random.Random, root: Path) -> Iterator[dict[str, Any]]:
    """Bodies whose images, videos or paths cannot be used."""
    clip = EMBEDDED_CLIP.read_bytes()
    for kind in ("video/mp4", "image/png", "video/jpeg", "image/gif", "application/pdf"):
        for text in ("", "!", "AAA", "A===", "=", "AAAA\n*", "%41", ",,", "AAAA," * 5, "\u00e9"):
            yield body(video(f"data:{kind};base64,{text}"))
    for head in (
        "data:",
        "data:,",
        "data:;base64",
        "data:video/mp4,AAAA",
        "data:video/mp4;base32,AAAA",
        "data:" + "a" * 5000,
    ):
        yield body(image(head))
    for share in range(1, 25):
        yield body(video(data_url(clip[: len(clip) * share // 50])))
    for kind in ("PNG", "GIF", "BMP"):
        whole = picture(kind)
        for share in range(1, 11):
            yield body(image(data_url(whole[: len(whole) * share // 15], f"image/{kind.lower()}")))
    for _ in range(15):
        yield body(video(data_url(rng.randbytes(rng.randrange(1, 4000)))))
    for kind in ("video/x-unknown", "text/html", "audio/mpeg", "application/octet-stream"):
        yield body(video(data_url(b"<html>not a video</html>", kind)))
    yield body(image(data_url(pixel_bomb(60_000, 60_000), "image/png")))
    yield body(image(data_url(pixel_bomb(2**31 - 1, 2**31 - 1), "image/png")))
    yield body(image(data_url(pixel_bomb(20_000, 20_000), "image/png")))
    yield body(video(data_url(pixel_bomb(30_000, 30_000), "image/png")))
    yield body(video(data_url(long_gif(10_000), "image/gif")))
    yield body(video(data_url(long_gif(3, 65_535), "image/gif")))
    yield body(video("data:video/jpeg;base64," + ",".join([base64.b64encode(picture("JPEG")).decode()] * 2000)))
    yield from (body(video(url)) for url in _paths(root))
    yield from (body(image(url)) for url in _addresses())


def _paths(root: Path) -> Iterator[str]:
    """URLs of files outside `root`, or of none."""
    (root / "link.mp4").symlink_to("/etc/passwd")
    (root / "up").symlink_to("/")
    yield from (f"file:///etc/{name}" for name in ("passwd", "hostname", "shadow", "../etc/passwd"))
    for climb in ("../", "..%2f", "%2e%2e/", "x/../../", "./../", "..//", "%252e%252e/", "..\\"):
        yield f"file://{root}/{climb}secret.mp4"
    for name in ("link.mp4", "up/etc/passwd", "absent.mp4", "", "%00.mp4", "a\u0000.mp4"):
        yield f"file://{root}/{name}"
    yield from (
        "file:///proc/self/environ",
        "file:///dev/zero",
        "file:///dev/stdin",
        "file:///",
        "file://",
        "file:a.mp4",
    )
    yield from ("file://host/share/a.mp4", "FILE:///etc/passwd", "/etc/passwd", "etc/passwd", "~/a.mp4", "C:\\a.mp4")


def _addresses() -> Iterator[str]:
    for host in (
        "127.0.0.1",
        "localhost",
        "[::1]",
        "169.254.169.254",
        "0.0.0.0",
        "2130706433",
        "0x7f.1",
        "example.com",
    ):
        yield f"http://{host}/a.png"
    yield from (
        "http://user@127.0.0.1/a.png",
        "http://127.0.0.1\\@example.com/a.png",
        "https://",
        "http://[::",
        "http://\u2460.com",
    )
    yield from (
        "ftp://127.0.0.1/a.png",
        "gopher://127.0.0.1/",
        "javascript:alert(1)",
        "s3://bucket/a.png",
        "//host/a.png",
    )
    yield "http://example.com/" + "a" * 5000


def copies(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Bodies in which one value anywhere is replaced by one of another type."""
    whole = body(video(data_url(EMBEDDED_CLIP.read_bytes()), fps=2.0), stream=False, temperature=0.5, seed=3)
    paths = [path for path, _ in _leaves(whole, ())]
    for _ in range(count):
        changed = copy.deepcopy(whole)
        *path, last = rng.choice(paths)
        place: Any = changed
        for key in path:
            place = place[key]
        place[last] = [place[last]] if not isinstance(place[last], list) else {"a": place[last]}
        yield changed


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key), item
        yield from _leaves(item, (*path, key))
