"""The loader equals the processor, whatever the source is, and refuses what exceeds its limits."""

import base64
import dataclasses
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infer.media import MediaError, MediaLimits, MediaLoader
from infer.media.cache import VisualCache
from tarsier_jax.errors import InputError
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.processor import Processor
from tarsier_jax.processing.visuals import VisualInputs
from tarsier_jax.weights import EMBEDDED_CLIP
from tests.infer.media.conftest import animation, picture, sample


def assert_equal(a: Example, b: Example) -> None:
    for field in dataclasses.fields(Example):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype, field.name
            np.testing.assert_array_equal(x, y)
        else:
            assert x == y, field.name


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def reason(loader: MediaLoader, kind: str, source: object, **keys: object) -> str:
    with pytest.raises(MediaError) as error:
        loader(sample(kind, source, **keys))
    return error.value.reason


@pytest.mark.parametrize("options", [{}, {"n_frames": 5, "max_pixels": 4000}])
def test_examples_are_those_of_the_processor(processor: Processor, loader: MediaLoader, options: dict) -> None:
    video = sample("video", str(EMBEDDED_CLIP), start_time=0.5)
    example = loader(video, **options)
    assert_equal(example, processor.replace(**options)(video))
    assert example.selections[0].decode_seconds > 0
    assert example.selections[0].frame_size == tuple(example.grid_thw[0, 1:] * 14)


def test_bytes_and_data_urls_equal_files(processor: Processor, loader: MediaLoader, tmp_path: Path) -> None:
    for kind, content, name in (
        ("video", EMBEDDED_CLIP.read_bytes(), "a.mp4"),
        ("video", animation(4), "a.gif"),
        ("image", picture(), "a.png"),
        ("image", picture(format="JPEG"), "a.jpg"),
        ("image", picture(format="WEBP"), "a.webp"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        expected = processor(sample(kind, str(path)))
        for source in (content, data_url(content, "application/pdf"), path, f"file://{path}"):
            assert_equal(loader(sample(kind, source)), expected)


def test_frames_that_are_cut_already(processor: Processor, loader: MediaLoader) -> None:
    frames = [picture(64, 64, "JPEG"), picture(64, 64, "JPEG", quality=5)]
    url = "data:video/jpeg;base64," + ",".join(base64.b64encode(frame).decode() for frame in frames)
    item = {"type": "video", "video": {"frames": frames}}
    listed = loader({"messages": [{"role": "user", "content": [item, {"type": "text", "text": "Describe."}]}]})
    assert_equal(loader(sample("video", url)), listed)
    assert listed.frames == 2
    with MediaLoader(processor, MediaLimits(max_files=10), workers=1) as small:
        assert reason(small, "video", "data:video/jpeg;base64," + ",".join(["AAAA"] * 1_000_000)) == "too_many_frames"


def test_texts_and_images_in_memory(processor: Processor, loader: MediaLoader, tmp_path: Path) -> None:
    assert_equal(loader(sample("image")), processor(sample("image")))
    image = {"type": "image", "image": Image.new("RGB", (60, 60), "red")}
    question = {"messages": [{"role": "user", "content": [image]}]}
    assert_equal(loader(question), processor(question))
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture())
    assert_equal(loader(sample("video", str(tmp_path))), processor(sample("video", str(tmp_path))))


def test_errors_of_the_sample(processor: Processor, loader: MediaLoader) -> None:
    for question in (sample("video", str(EMBEDDED_CLIP), frame_indices=[99]), sample("video", "missing.mp4"), {}):
        with pytest.raises(InputError) as expected:
            processor(question)
        with pytest.raises(InputError) as error:
            loader(question)
        assert str(error.value) == str(expected.value)
    with pytest.raises(InputError, match="n_frame does not exist"):
        loader(sample("image"), n_frame=3)


def test_warnings_reach_the_program(loader: MediaLoader) -> None:
    with pytest.warns(UserWarning, match="The image 1 is an animation"):
        loader(sample("image", animation(3)))


def test_one_process_decodes_many_files(processor: Processor) -> None:
    with MediaLoader(processor, root="/", workers=1) as loader:
        (pid,) = loader._children.pids
        descriptors = len(os.listdir("/proc/self/fd"))
        for i in range(50):
            loader(sample("image", picture(56, 56 + i)))
        assert loader._children.pids == [pid]
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert len(os.listdir(f"/proc/{pid}/fd")) < 10
    assert not Path(f"/proc/{pid}").exists()


def test_a_resent_video_is_not_decoded_again(processor: Processor, loader: MediaLoader, tmp_path: Path) -> None:
    content = EMBEDDED_CLIP.read_bytes()
    first = loader(sample("video", content), n_frames=3)
    again = loader(sample("video", content, text="And then?"), n_frames=3)
    assert again.pixel_values is first.pixel_values
    assert not again.pixel_values.flags.writeable
    assert again.selections[0].decode_seconds == 0
    assert loader(sample("video", content), n_frames=4).pixel_values is not first.pixel_values
    path = tmp_path / "a.png"
    path.write_bytes(picture(60, 60))
    small = loader(sample("image", str(path)))
    assert loader(sample("image", str(path))).pixel_values is small.pixel_values
    path.write_bytes(picture(90, 90))
    assert not np.array_equal(loader(sample("image", str(path))).pixel_values, small.pixel_values)


def test_the_cache_is_bounded() -> None:
    cache = VisualCache(100)
    visuals = {key: VisualInputs(np.zeros((1, 10), np.float32), np.zeros((0, 3)), 0, ()) for key in (b"a", b"b", b"c")}
    cache.put(b"a", visuals[b"a"])
    cache.put(b"b", visuals[b"b"])
    assert cache.get(b"a") is visuals[b"a"]
    cache.put(b"c", visuals[b"c"])
    assert (cache.get(b"a"), cache.get(b"b"), cache.get(b"c")) == (visuals[b"a"], None, visuals[b"c"])


def test_several_threads(processor: Processor) -> None:
    expected = processor(sample("video", str(EMBEDDED_CLIP)))
    with MediaLoader(processor, MediaLimits(cache_bytes=1), root="/", workers=2) as loader:
        examples: list[Example] = []
        threads = [
            threading.Thread(target=lambda: examples.append(loader(sample("video", str(EMBEDDED_CLIP)))))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for example in examples:
        assert_equal(example, expected)
    assert len(examples) == 6


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size whose pixels are missing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    parts = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_bombs(processor: Processor, loader: MediaLoader) -> None:
    gif = bytearray(animation(2))
    gif[6:10] = struct.pack("<HH", 60_000, 60_000)
    assert reason(loader, "image", png_header(50_000, 50_000)) == "too_many_pixels"
    assert reason(loader, "video", bytes(gif)) == "too_many_pixels"
    assert reason(loader, "video", animation(10_000)) == "too_many_frames"
    assert reason(loader, "video", animation(3, "PNG", duration=10**7)) == "too_long"
    assert reason(loader, "video", str(EMBEDDED_CLIP), frame_indices=[0] * 1000) == "too_many_frames"
    limits = {
        "too_large": MediaLimits(max_bytes=1000),
        "too_many_pixels": MediaLimits(max_pixels=200 * 200),
        "too_many_frames": MediaLimits(max_frames=39),
        "too_long": MediaLimits(max_seconds=2.0),
    }
    for label, limit in limits.items():
        with MediaLoader(processor, limit, root="/", workers=1) as small:
            assert reason(small, "video", str(EMBEDDED_CLIP)) == label
            assert reason(small, "video", EMBEDDED_CLIP.read_bytes()) == label
    with MediaLoader(processor, MediaLimits(max_sample_bytes=1000), workers=1) as small:
        assert reason(small, "image", picture(200, 200, "BMP")) == "too_large"


def test_broken_content(loader: MediaLoader) -> None:
    clip = EMBEDDED_CLIP.read_bytes()
    assert reason(loader, "video", clip[: len(clip) // 2]) == "undecodable"
    assert reason(loader, "image", picture()[:-40]) == "undecodable"
    assert reason(loader, "image", "data:image/png;base64,A*A=") == "undecodable"
    assert reason(loader, "image", "data:image/png;base64,iVBORw0K\nGgo=") == "undecodable"
    assert reason(loader, "image", "data:image/svg+xml;utf8,<svg/>") == "unsupported"
    for content in (b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", b"\0" * 4000, b"text"):
        assert reason(loader, "image", content) == "unsupported"
    assert reason(loader, "image", clip) == "unsupported"


def test_playlists_open_no_other_file(loader: MediaLoader, tmp_path: Path) -> None:
    playlists = {
        "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{EMBEDDED_CLIP}\n#EXT-X-ENDLIST\n",
        "concat.mp4": f"ffconcat version 1.0\nfile '{EMBEDDED_CLIP}'\n",
        "dash.mp4": "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='static'></MPD>",
    }
    for name, text in playlists.items():
        (tmp_path / name).write_text(text)
        assert reason(loader, "video", str(tmp_path / name)) == "undecodable"
        assert reason(loader, "video", text.encode()) == "unsupported"


def test_messages_have_no_text_of_libraries(loader: MediaLoader, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(128, 256)))
    for source in (str(tmp_path / "a.png"), picture()[:-40]):
        with pytest.raises(MediaError, match=r"without pictures\. Copy it again") as error:
            loader(sample("image", source))
        assert "(" not in str(error.value)


def test_files_below_the_root(processor: Processor, tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "below").mkdir(parents=True)
    outside.mkdir()
    for path in (root / "a.png", root / "below" / "b.png", outside / "c.png"):
        path.write_bytes(picture())
    (root / "link.png").symlink_to(root / "a.png")
    (root / "out.png").symlink_to(outside / "c.png")
    (root / "folder").symlink_to(outside)
    (root / "empty.png").touch()
    (root / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe.png")
    (tmp_path / "linked").symlink_to(root)
    with MediaLoader(processor, root=tmp_path / "linked", workers=1) as loader:
        expected = processor(sample("image", str(root / "a.png")))
        for path in (
            "a.png",
            "./below/../a.png",
            str(root / "a.png"),
            "below/b.png",
            "link.png",
            f"file://{root}/a.png",
        ):
            assert_equal(loader(sample("image", path)), expected)
        forbidden = ("../outside/c.png", str(outside / "c.png"), "out.png", "folder/c.png", "zero.png", "pipe.png")
        for path in (*forbidden, "below", "/proc/self/environ", "/etc/passwd", "a.png\0", "a" * 5000 + ".png"):
            assert reason(loader, "image", path) == "forbidden", path
        assert reason(loader, "image", "empty.png") == "undecodable"
        assert reason(loader, "image", "missing.png") == "not_found"
    with MediaLoader(processor, workers=1) as loader:
        assert reason(loader, "image", str(root / "a.png")) == "forbidden"
        assert reason(loader, "image", "https://example.com/a.png") == "forbidden"


def test_limits_are_checked() -> None:
    with pytest.raises(InputError, match="timeout must be above 0"):
        MediaLimits(timeout=0)
