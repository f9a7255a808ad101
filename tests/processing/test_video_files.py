"""The reader of video files against the ffmpeg program, which decodes the same files from their start."""

import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from av import Packet, VideoFrame
from PIL import Image

from tarsier_jax.errors import InputError
from tarsier_jax.processing import video_files
from tarsier_jax.processing.frame_sampling import sample_uniform
from tarsier_jax.processing.sample import open_visuals, read_messages
from tarsier_jax.processing.video import load_image, open_clip

H264 = ("-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p")
H265 = (
    "-c:v",
    "libx265",
    "-preset",
    "ultrafast",
    "-pix_fmt",
    "yuv420p",
    "-x265-params",
    "log-level=none:keyint=30:bframes=3",
)
OPEN_GOP = (*H264, "-x264-params", "open-gop=1:keyint=30:bframes=3")
MPEG4 = ("-c:v", "mpeg4", "-bf", "2", "-g", "15")
MPEG2 = ("-c:v", "mpeg2video", "-bf", "2", "-g", "15")
# Names as users have them; where the format differs from the name, `-f` says it.
KINDS = {
    "h264.mp4": (*H264, "-g", "30"),
    "h264.avi": (*H264, "-g", "30"),
    "h264_fragments.mp4": (*H264, "-movflags", "frag_keyframe+empty_moov"),
    "h264_open.mp4": OPEN_GOP,
    "h264_refresh.mkv": (*H264, "-x264-params", "intra-refresh=1:keyint=30"),
    "h264_interlaced.mkv": (*H264, "-x264-params", "interlaced=1:keyint=30"),
    "h264_transport.mp4": (*H264, "-g", "30", "-f", "mpegts"),
    "h264_interlaced_transport.mp4": (*H264, "-x264-params", "interlaced=1:keyint=30", "-f", "mpegts"),
    "h264_raw.mp4": (*H264, "-g", "30", "-f", "h264"),
    "h264_live.mkv": (*H264, "-g", "30", "-live", "1"),
    "h264_709.mp4": (*H264, "-vf", "scale=out_color_matrix=bt709", "-colorspace", "bt709"),
    "hevc.mkv": H265,
    "hevc_10_bits.mp4": (*H265, "-pix_fmt", "yuv420p10le"),
    "mpeg4.mp4": MPEG4,
    "mpeg4.avi": MPEG4,
    "mpeg2.mkv": MPEG2,
    "mpeg2_program.mkv": (*MPEG2, "-f", "mpeg"),
    "wmv2.wmv": ("-c:v", "wmv2", "-g", "15"),
    "h264.wmv": (*H264, "-g", "30"),
    "vp8_alt_ref.webm": ("-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "16", "-g", "30"),
    "vp9_alt_ref.webm": (
        "-c:v",
        "libvpx-vp9",
        "-auto-alt-ref",
        "1",
        "-lag-in-frames",
        "16",
        "-g",
        "30",
        "-cpu-used",
        "8",
    ),
    "vp9_profile_3.webm": ("-c:v", "libvpx-vp9", "-pix_fmt", "yuv444p12le", "-g", "20", "-cpu-used", "8"),
    "palette.avi": ("-pix_fmt", "pal8", "-c:v", "rawvideo"),
    "all_marked_as_key.mov": ("-c:v", "rpza"),
    "mjpeg.avi": ("-c:v", "mjpeg"),
    "prores.mov": ("-c:v", "prores_ks"),
}


def ffmpeg(*arguments: object) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def ffmpeg_frames(path: Path) -> np.ndarray:
    """Every frame that the ffmpeg program decodes, uint8 (N, H, W, 3)."""
    raw = ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    size = next(iter(open_clip(path).read([0]))).size
    return np.frombuffer(raw, np.uint8).reshape(-1, *size[::-1], 3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a clip of a test picture that changes in every frame: 25 frames per second of 96 x 64 pixels."""
    directory = tmp_path_factory.mktemp("sources")

    def write(name: str, arguments: tuple[str, ...], frames: int = 100) -> Path:
        path = directory / f"{frames}_{name}"
        if not path.exists():
            ffmpeg("-f", "lavfi", "-i", "testsrc2=s=96x64:r=25", "-frames:v", frames, *arguments, path)
        return path

    return write


def assert_frames(path: Path, *choices: list[int]) -> None:
    """The clip has as many frames as the ffmpeg program decodes, and shows the same at each index."""
    clip, frames = open_clip(path), ffmpeg_frames(path)
    assert clip.length == len(frames)
    for indices in choices or (sample_uniform(clip.length, 16), list(range(clip.length - 40, clip.length)), [41, 7, 7]):
        for index, picture in zip(indices, clip.read(indices), strict=True):
            np.testing.assert_array_equal(np.asarray(picture), frames[index], err_msg=f"{path.name} frame {index}")


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_of_ffmpeg(source: Callable[..., Path], name: str) -> None:
    path = source(name, KINDS[name])
    assert_frames(path)
    assert open_clip(path).rate == 25.0


def test_readings_of_one_clip_do_not_disturb_each_other(source: Callable[..., Path]) -> None:
    clip = open_clip(source("h264_open.mp4", OPEN_GOP))
    first, second = [0, 40, 80], [10, 35, 99]
    alone = [*clip.read(first), *clip.read(second)]
    together = list(zip(clip.read(first), clip.read(second), strict=True))
    for picture, expected in zip([a for a, _ in together] + [b for _, b in together], alone, strict=True):
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))


@pytest.mark.parametrize("name", ["h264_open.mp4", "hevc.mkv", "mpeg4.mp4", "mpeg4.avi", "mpeg2.mkv", "wmv2.wmv"])
def test_long_clips(source: Callable[..., Path], name: str) -> None:
    assert_frames(source(name, KINDS[name], frames=3100), sample_uniform(3100, 16), [1, 500, 3098])


def test_no_more_than_the_groups_of_wanted_frames_are_decoded(
    source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = open_clip(source("h264_open.mp4", OPEN_GOP, frames=3100))
    decode, count = video_files._decode, 0

    def counting(packets: Iterable[Packet]) -> Iterator[VideoFrame]:
        def each() -> Iterator[Packet]:
            nonlocal count
            for packet in packets:
                count += 1
                yield packet

        return decode(each())

    monkeypatch.setattr(video_files, "_decode", counting)
    list(clip.read(sample_uniform(clip.length, 4)))
    group, delay = 30, 8  # frames from one key frame to the next, and frames that the decoder waits for
    assert 0 < count <= 4 * (group + delay)


@pytest.mark.parametrize("start", [0.04, 1.5, 2.28])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("name", ["h264.mp4", "h264_open.mp4", "hevc.mkv", "mpeg4.mp4", "mpeg2.mkv"])
def test_clips_cut_without_encoding(
    source: Callable[..., Path], tmp_path: Path, name: str, suffix: str, start: float
) -> None:
    """An edit list hides frames from the key frame to the cut; frames may lack their references."""
    path = tmp_path / f"cut{suffix}"
    ffmpeg("-ss", start, "-i", source(name, KINDS[name], frames=150), "-t", 2.4, "-c", "copy", path)
    length = open_clip(path).length
    assert_frames(path, list(range(length)), sample_uniform(length, 8))


def test_frames_of_other_sizes_are_scaled_to_the_first(source: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "sizes.mp4"
    larger = source("larger.mp4", (*KINDS["h264_transport.mp4"], "-vf", "scale=128:96"))
    path.write_bytes(source("h264_transport.mp4", KINDS["h264_transport.mp4"]).read_bytes() + larger.read_bytes())
    assert {picture.size for picture in open_clip(path).read([0, 99, 100, 199])} == {(96, 64)}
    assert_frames(path, [0, 99, 100, 150, 199])


def test_photos_with_exif_as_frames(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(4):
        Image.new("RGB", (96, 64), (60 * i, 0, 0)).save(tmp_path / f"{i}.jpg", exif=exif)
    path = tmp_path / "photos.mkv"
    ffmpeg("-i", tmp_path / "%d.jpg", "-c", "copy", path)
    assert_frames(path, [0, 1, 2, 3])


@pytest.mark.parametrize("name", ["h264_fragments.mp4", "hevc.mkv", "h264_live.mkv", "vp9_alt_ref.webm", "wmv2.wmv"])
def test_recordings_that_were_broken_off(source: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """They state no number of frames, so the frames that are there are shown."""
    content = source(name, KINDS[name]).read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: len(content) * 2 // 3])
    length = open_clip(path).length
    assert 0 < length < 100
    assert_frames(path, list(range(length)), sample_uniform(length, 8))


@pytest.mark.parametrize("name", ["h264.mp4", "mpeg4.avi"])
def test_files_that_state_more_frames_are_refused(source: Callable[..., Path], tmp_path: Path, name: str) -> None:
    content = source(f"index_first_{name}", (*KINDS[name], "-movflags", "faststart")).read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(InputError, match=rf"{name} cannot be decoded.*the file ends before its last frame"):
        open_clip(path)


def boxes(content: bytes, path: list[bytes]) -> list[int]:
    """The offsets of the nested boxes of an MP4 file."""
    offsets, at, end = [], 0, len(content)
    while path:
        size, name = struct.unpack_from(">I4s", content, at)
        if name == path[0]:
            offsets, path, at, end = [*offsets, at], path[1:], at + 8, at + size
        else:
            at += size
        assert at <= end
    return offsets


def with_edits(content: bytes, edits: list[tuple[float, float]]) -> bytes:
    """An MP4 file with other edits: (seconds, where they start), or (seconds, -1) for a pause."""
    out = bytearray(content)
    *parents, at = boxes(content, [b"moov", b"trak", b"edts", b"elst"])
    size, offset = struct.unpack_from(">I", content, at)[0], struct.unpack_from(">i", content, at + 20)[0]
    rows = [(round(1000 * s), -1 if start < 0 else offset + round(12800 * start), 1, 0) for s, start in edits]
    table = b"".join(struct.pack(">IiHH", *row) for row in rows)
    out[at : at + size] = struct.pack(">I4sII", 16 + len(table), b"elst", 0, len(rows)) + table
    for parent in parents:
        struct.pack_into(">I", out, parent, struct.unpack_from(">I", content, parent)[0] + 16 + len(table) - size)
    return bytes(out)


@pytest.mark.parametrize("name", ["h264.mp4", "h264_open.mp4", "hevc_10_bits.mp4"])
@pytest.mark.parametrize(
    "edits",
    [[(1.5, 1.1)], [(0.7, -1), (2, 0.5)], [(1, 0.3), (1, 2.5)], [(1, 2.1), (1, 0.5)], [(1, 0.52), (1, 0.52)]],
    ids=["middle", "pause", "two", "exchanged", "twice"],
)
def test_edit_lists(source: Callable[..., Path], tmp_path: Path, edits: list[tuple[float, float]], name: str) -> None:
    path = tmp_path / "edited.mp4"
    path.write_bytes(with_edits(source(name, KINDS[name]).read_bytes(), edits))
    length = open_clip(path).length
    assert 0 < length < 100
    assert_frames(path, list(range(length)), sample_uniform(length, 8))


@pytest.mark.parametrize("rate", ["25", "24"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_clips_joined_without_encoding(source: Callable[..., Path], tmp_path: Path, suffix: str, rate: str) -> None:
    """Where rates differ, timestamps of the second part are out of order."""
    ffmpeg("-f", "lavfi", "-i", f"testsrc2=s=96x64:r={rate}:d=3", *H264, tmp_path / "second.mp4")
    first, path = source("h264.mp4", KINDS["h264.mp4"]), tmp_path / f"joined{suffix}"
    (tmp_path / "list.txt").write_text(f"file '{first}'\nfile 'second.mp4'\n")
    ffmpeg("-f", "concat", "-safe", 0, "-i", tmp_path / "list.txt", "-c", "copy", path)
    length = open_clip(path).length
    assert_frames(path, *([i] for i in range(90, length, 5)), list(range(length)))


@pytest.mark.parametrize(
    "way",
    [("rotation", "90"), ("rotation", "180"), ("rotation", "-90"), ("hflip",), ("vflip",), ("rotation", "90", "hflip")],
)
def test_clips_are_shown_upright(source: Callable[..., Path], tmp_path: Path, way: tuple[str, ...]) -> None:
    flags = [part if part.lstrip("-").isdigit() else f"-display_{part}" for part in way]
    path = tmp_path / "phone.mp4"
    ffmpeg(*flags, "-i", source("h264.mp4", KINDS["h264.mp4"]), "-c", "copy", path)
    assert_frames(path, [0, 50, 99])


@pytest.fixture
def variable(source: Callable[..., Path], tmp_path: Path) -> Path:
    """25 frames per second for two seconds, then one every 0.4 s: frame 50 + i comes at 2 + 0.4 i seconds."""
    path = tmp_path / "variable.mp4"
    select = "select=lt(n\\,50)+not(mod(n\\,10))"
    ffmpeg(
        "-f", "lavfi", "-i", "testsrc2=s=96x64:r=25:d=12", "-vf", select, "-fps_mode", "vfr", *H264, "-bf", "2", path
    )
    return path


def test_times_of_a_variable_rate(variable: Path) -> None:
    clip = open_clip(variable)
    expected = [*(i / 25 for i in range(50)), *(2 + 0.4 * i for i in range(25))]
    np.testing.assert_allclose(clip.times, expected, atol=1e-4)
    assert_frames(variable, list(range(75)))


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"start_time": 0, "end_time": 1.99}, [0, 16, 33, 49]),
        ({"start_time": 2, "end_time": 4}, [50, 52, 53, 55]),
        ({"start_time": 3.1, "end_time": 60}, [52, 59, 67, 74]),
        ({"time_indices": [1, 2.0, 4.3, 11.6]}, [25, 50, 55, 74]),
        ({"fps": 1, "start_time": 8}, [65, 67, 70, 72]),
    ],
)
def test_seconds_are_those_of_the_timestamps(variable: Path, item: dict, expected: list[int]) -> None:
    content = [{"type": "video", "video": {"video_file": str(variable), **item}}]
    messages = read_messages({"messages": [{"role": "user", "content": content}]})
    (visual,) = open_visuals(messages, 4, 256, "v1", 1, None)
    assert visual.indices == expected


def test_a_damaged_frame_that_is_wanted_is_an_error(source: Callable[..., Path], tmp_path: Path) -> None:
    content = bytearray(source("h264.mp4", (*KINDS["h264.mp4"], "-movflags", "faststart")).read_bytes())
    third = len(content) // 3
    content[third : 2 * third] = bytes(third)
    path = tmp_path / "hole.mp4"
    path.write_bytes(content)
    clip = open_clip(path)
    assert clip.length == 100
    with pytest.raises(InputError, match=r"hole\.mp4 cannot be decoded.*a frame is missing"):
        list(clip.read(range(100)))


def test_sound_with_a_cover_picture_is_no_video(source: Callable[..., Path], tmp_path: Path) -> None:
    cover, path = tmp_path / "cover.png", tmp_path / "song.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=96x64", "-frames:v", 1, cover)
    sound = ("-f", "lavfi", "-i", "sine=d=0.2")
    streams = ("-map", 0, "-map", 1, "-c:a", "aac", "-c:v", "copy", "-disposition:v", "attached_pic")
    ffmpeg(*sound, "-i", cover, *streams, "-f", "ipod", path)
    with pytest.raises(InputError, match=r"song\.mp4 cannot be decoded: it contains only sound"):
        open_clip(path)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"<!DOCTYPE html><html>403 Forbidden</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n", "git lfs pull"),
    ],
)
def test_what_a_failed_download_leaves_is_named(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"clip\.mp4 cannot be decoded: it is .*{cause}"):
        open_clip(path)


@pytest.mark.parametrize("name", ["a:b.mp4", "concat:a.mp4", "50% #1?.mp4", "-i.mp4", "caf\udce9.mp4", "日本 語.mp4"])
def test_names_of_files(
    source: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(source("h264.mp4", KINDS["h264.mp4"]).read_bytes())
    assert open_clip(name).length == 100


def test_urls_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"https://example\.com/a\.mp4 is a URL.*Download it"):
        open_clip("https://example.com/a.mp4")
    with pytest.raises(InputError, match=r"^The file is a data URL, which is not read"):
        load_image("data:image/png;base64," + 10_000 * "A")
