"""Reads frames of video files by index, as FFmpeg decodes them, with their presentation times.

PyAV contains FFmpeg's libraries. Opening a file reads its packets without decoding them; their timestamps are the index
of frames. Reading seeks to the key frame before each selected frame, and decodes from there.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import struct
from collections.abc import Container, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.filter import Graph
from av.packet import Packet
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image
from PIL.Image import Transpose

from tarsier_jax.errors import MediaError
from tarsier_jax.processing.clip import Clip, ClipLimits, Frame, MediaFile, undecodable
from tarsier_jax.storage import FetchedFile

# The formats that FFmpeg reads. Others open further files or URLs (playlists), or are not videos.
_FORMATS = (
    "mov,matroska,avi,asf,asf_o,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,av1,obu,ivf,flv,ogg,mjpeg,dv,mxf,nut,wtv,rm,gif"
)
# The codecs of files that are not trusted.
_CODECS = (
    *("h264", "hevc", "vvc", "libdav1d", "av1", "vp8", "vp9", "libvpx", "libvpx-vp9", "theora", "mpeg1video"),
    *("mpeg2video", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4", "h263", "flv", "wmv1", "wmv2", "wmv3", "vc1"),
    *("mjpeg", "prores", "dnxhd", "dvvideo", "ffv1", "huffyuv", "ffvhuff", "rawvideo", "gif", "png"),
    *("qtrle", "rpza", "svq1", "svq3", "cinepak"),
)
_TIMED = {"mov", "matroska"}  # formats that store the presentation time of each frame
_CHECKED_FORMATS = {"avi", "asf", "mpegts"}  # formats whose times may be wrong
_CHECKED = 64  # frames that are decoded to check the times
_REPORTING = {"h264", "hevc", "vp9", "libdav1d", "mpeg2video"}  # decoders that omit frames without their references
_MOST_IN_ORDER = 32  # consecutive frames that are displayed in the order of decoding although frames are reordered


_PacketOrFrame = TypeVar("_PacketOrFrame", Packet, VideoFrame)


class _MissingFrame(ValueError):
    """A frame of the index that is not decoded."""


_ERRORS = (av.error.FFmpegError, ValueError, OSError)


@contextlib.contextmanager
def _named_errors(file: MediaFile, errors: tuple[type[Exception], ...] = _ERRORS) -> Iterator[None]:
    """Raises InputError for the errors that PyAV and this module raise about a file."""
    try:
        yield
    except MemoryError:
        raise
    except errors as e:  # an argument, since abandoned iterators can outlive the module at exit
        raise undecodable(file.name, file, ValueError(getattr(e, "strerror", None) or e)) from None


@dataclasses.dataclass(frozen=True)
class _Index:
    """The frames of a file in display order, and the key frames from which decoding can start.

    Attributes:
        pts: The presentation timestamp of each frame, int64 (length,), strictly increasing.
        key_pts: The presentation timestamp of each key frame, int64 (keys,), increasing.
        key_seek: The timestamp to which the container seeks for each key frame, int64 (keys,).
        reliable: Whether each timestamp in `pts` identifies a frame. Otherwise frames are counted from the start.
    """

    pts: np.ndarray
    key_pts: np.ndarray
    key_seek: np.ndarray
    reliable: bool


def open_video(file: MediaFile) -> Clip:
    """Opens a video file and reads its index of frames.

    Raises:
        InputError: The file is cut off, damaged, or lacks a video that FFmpeg decodes.
    """
    state = _state(file)
    index, average_rate, time_base = _read_header(file) if state is None else _cached_header(file, state)
    times = (index.pts - index.pts[0]) * time_base
    rate = _rate(times, average_rate)
    file.check_length(len(times), len(times), float(times[-1]))

    def decode(indices: Sequence[int]) -> Iterator[Frame]:
        frames = _seek(file, index, indices) if index.reliable else _scan(file, indices)
        count = 0
        with _named_errors(file):
            try:
                for picture in _pictures(frames):
                    count += 1
                    yield picture
            except _MissingFrame:
                # Where clips were joined, the times of frames may be out of order.
                if not index.reliable or len(_count_frames(file).pts) != len(index.pts):
                    raise
                yield from _pictures(_scan(file, indices[count:]))

    return Clip(file.name, len(times), rate, decode, times, is_video=True)


def read_length(file: MediaFile) -> tuple[float, float] | None:
    """Returns the duration of a video file and the mean time between its frames in seconds; None for other files.

    They are read from the header, or from the index of frames where the header does not state them.

    Raises:
        InputError: as `open_video`.
    """
    if file.kind != "video":
        return None
    with _named_errors(file), _opened(file) as (_, stream):
        duration, rate = (stream.duration or 0) * (stream.time_base or 0), stream.average_rate
    if duration and rate:
        return float(duration), float(1 / rate)
    clip = open_video(file)
    frame = 1 / clip.rate if clip.rate else 0.0
    return float(clip.times[-1]) + frame if clip.times is not None else frame, frame


def _state(file: MediaFile) -> tuple[int, ...] | None:
    """Returns a key of the content of a file on the disk, or None for other content."""
    if isinstance(file.content, bytes | FetchedFile):
        return None
    try:
        status = os.stat(file.path if file.content is None else file.content.path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@functools.lru_cache(maxsize=8)
def _cached_header(file: MediaFile, state: tuple[int, ...]) -> tuple[_Index, Fraction | None, float]:
    """Returns `_read_header(file)`, once for the windows of a long video, since it reads the whole file."""
    return _read_header(file)


def _read_header(file: MediaFile) -> tuple[_Index, Fraction | None, float]:
    """Returns the index of frames, the average rate, and the seconds per unit of the timestamps."""
    with _named_errors(file), _opened(file) as (container, stream):
        index = _read_index(file, container, stream)
        if not len(index.pts):
            raise ValueError("no frame can be decoded")
        return index, stream.average_rate, float(stream.time_base or 0)


@contextlib.contextmanager
def _opened(file: MediaFile) -> Iterator[tuple[InputContainer, VideoStream]]:
    # FFmpeg reads a relative name with a colon as a URL.
    source = contextlib.nullcontext(str(file.path.absolute())) if file.content is None else file.open()
    with (
        source as name_or_file,
        av.open(name_or_file, "r", metadata_errors="replace", container_options=_container_options(file)) as container,
    ):
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) and not container.streams.audio:
            raise ValueError("it contains no video stream")
        if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:  # of an album
            raise MediaError(
                f"{file.name} cannot be decoded: it contains only sound. Choose another file.", "unsupported"
            )
        if stream.codec_context is None:
            raise MediaError(
                f"{file.name} cannot be decoded: FFmpeg lacks a decoder for its codec. Convert it, for example with "
                "`ffmpeg -i in.mp4 -c:v libx264 out.mp4` on a machine that plays it.",
                "unsupported",
            )
        if file.limits is not None:
            _check_header(file, container, stream, file.limits)
        stream.codec_context.thread_count = 1  # several clips are decoded at once, each in a thread
        yield container, stream


def _container_options(file: MediaFile) -> dict[str, str]:
    """Returns the options with which FFmpeg opens no other file or URL, as playlists make it do."""
    if file.limits is None:
        return {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
    return {"protocol_whitelist": "file", "format_whitelist": _FORMATS, "codec_whitelist": ",".join(_CODECS)}


def _check_header(file: MediaFile, container: InputContainer, stream: VideoStream, limits: ClipLimits) -> None:
    """Raises MediaError if the header of a file exceeds its limits, and limits the frames that follow."""
    codec = stream.codec_context
    if codec.name not in _CODECS:
        raise MediaError(
            f"{file.name} cannot be decoded: its codec is {codec.name}, which is not allowed. Convert it, for example "
            "with `ffmpeg -i in.mov -c:v libx264 out.mp4`.",
            "unsupported",
        )
    file.check_frame_size(codec.width, codec.height)
    file.check_length(stream.frames, limits.max_frames, (container.duration or 0) / av.time_base)
    codec.options = {**codec.options, "max_pixels": str(limits.max_pixels)}  # also where the size changes


def _read_index(file: MediaFile, container: InputContainer, stream: VideoStream) -> _Index:
    codec = stream.codec_context
    packets = _bounded(file, (packet for packet in container.demux(stream) if packet.size))
    stamps = [_stamp(packet, codec.name) for packet in packets]
    # A fragmented file, such as an interrupted recording, does not state the number of frames.
    is_cut = not stamps or stamps[-1].corrupt
    if stream.frames and (len(stream.index_entries) > len(stamps) or (is_cut and stream.frames > len(stamps))):
        raise ValueError("the file ends before its last frame")
    pts = [stamp.pts for stamp in stamps]
    if is_cut or None in pts or len(set(pts)) < len(pts) or not stamps[0].key or _has_decoding_times(stamps):
        return _count_frames(file)
    if codec.pix_fmt == "pal8":  # only the first frame may contain the palette
        return _count_frames(file)
    frame_pts, first = sorted(stamp.pts for stamp in stamps if stamp.displayed), pts[0]
    if frame_pts and frame_pts[0] < first:
        frame_pts = [*_leading_frames(file, first), *(t for t in frame_pts if t >= first)]
    formats = set(container.format.name.split(","))
    if not formats & _TIMED and not (formats & _CHECKED_FORMATS and _first_frames(file) == frame_pts[:_CHECKED]):
        return _count_frames(file)
    if all(stamp.key for stamp in stamps) and not codec.codec.intra_only and codec.name not in _REPORTING:
        stamps = stamps[:1]  # the container does not mark key frames
    keys = sorted((s.pts, s.pts if s.dts is None else min(s.pts, s.dts)) for s in stamps if s.key)
    key_pts, key_seek = np.array(keys, np.int64).T
    return _Index(np.array(frame_pts, np.int64), key_pts, key_seek, True)


def _bounded(file: MediaFile, frames: Iterable[_PacketOrFrame]) -> Iterator[_PacketOrFrame]:
    """Yields the packets or frames of a file. Raises MediaError if there are more frames than its limit."""
    for count, frame in enumerate(frames, 1):
        if file.limits is not None:
            file.check_length(count, file.limits.max_frames)
        yield frame


class _Stamp(NamedTuple):
    """A packet without its data.

    Attributes:
        pts: The presentation timestamp, or None.
        dts: The decoding timestamp, or None.
        key: Whether the packet is a key frame.
        displayed: Whether its frame is displayed.
        corrupt: Whether it is incomplete.
    """

    pts: Any
    dts: Any
    key: bool
    displayed: bool
    corrupt: bool


def _stamp(packet: Packet, codec: str) -> _Stamp:
    displayed = not packet.is_discard and not _is_hidden(packet, codec)
    return _Stamp(packet.pts, packet.dts, packet.is_keyframe, displayed, packet.is_corrupt)


def _has_decoding_times(stamps: Sequence[_Stamp]) -> bool:
    """Returns whether the presentation times of a part are decoding times, although frames are reordered.

    Clips of different time bases that were joined without encoding have such parts.
    """
    runs = itertools.groupby(stamp.pts == stamp.dts for stamp in stamps)
    longest = max((sum(1 for _ in run) for is_equal, run in runs if is_equal), default=0)
    return longest > _MOST_IN_ORDER and any(a.pts > b.pts for a, b in itertools.pairwise(stamps))


def _is_hidden(packet: Packet, codec: str) -> bool:
    """Returns whether a packet of VP8 or VP9 is a reference that is never displayed.

    Source: RFC 6386, section 9.1; VP9 bitstream specification, section 6.2 and annex B.
    """
    if codec not in ("vp8", "vp9"):
        return False
    data = memoryview(packet)
    if codec == "vp8":
        return not data[0] & 0b1_0000
    superframe = data[-1] & 0b1110_0000 == 0b1100_0000  # it contains a displayed frame
    profile_3 = data[0] & 0b0011_0000 == 0b0011_0000  # a reserved bit follows the profile
    return not superframe and not data[0] & (0b0101 if profile_3 else 0b1010)  # show_existing_frame, show_frame


def _decode_file(file: MediaFile) -> Iterator[VideoFrame]:
    """Yields all frames of a file, from its start."""
    with _opened(file) as (container, stream):
        yield from _decode(container.demux(stream))


def _leading_frames(file: MediaFile, first: int) -> list[int]:
    """Returns the timestamps of decodable frames that are displayed before the first key frame, at `first`.

    After a cut, some of these frames lack their references and are not decoded.
    """
    return list(itertools.takewhile(lambda pts: pts < first, (frame.pts or 0 for frame in _decode_file(file))))


def _first_frames(file: MediaFile) -> list[int | None]:
    """Returns the timestamps of the first frames in the order of decoding.

    AVI does not store times; FFmpeg derives them, wrongly if frames are reordered. In ASF they may be decoding times.
    In a transport stream a packet may be a field, half of a frame.
    """
    return [frame.pts for frame in itertools.islice(_decode_file(file), _CHECKED)]


def _count_frames(file: MediaFile) -> _Index:
    """Returns the index of a file whose packets do not identify its frames, by decoding all of it."""
    with _opened(file) as (container, stream):
        pts = [frame.pts for frame in _bounded(file, _decode(container.demux(stream)))]
        interval = 1 / ((stream.average_rate or 25) * (stream.time_base or Fraction(1)))
    times = sorted(t for t in pts if t is not None)  # AVI has the order of decoding
    if len(set(times)) < len(pts):
        times = [round(i * interval) for i in range(len(pts))]
    none = np.zeros(0, np.int64)
    return _Index(np.array(times, np.int64), none, none, False)


def _scan(file: MediaFile, indices: Sequence[int]) -> Iterator[VideoFrame]:
    """Decodes from the start and counts frames. `indices` increase strictly."""
    frames = enumerate(_decode_file(file))
    for index in indices:
        frame = next((frame for i, frame in frames if i == index), None)
        if frame is None:
            raise _MissingFrame("a frame is missing")
        yield frame


def _seek(file: MediaFile, index: _Index, indices: Sequence[int]) -> Iterator[VideoFrame]:
    """Decodes from the key frame before each of `indices`, which increase strictly."""
    targets = index.pts[list(indices)]
    keys = np.maximum(np.searchsorted(index.key_pts, targets, side="right") - 1, 0)
    pairs = zip(keys.tolist(), targets.tolist(), strict=True)
    with _opened(file) as (container, stream):
        for key, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
            yield from _decode_group(container, stream, index, key, [pts for _, pts in group])


def _decode_group(
    container: InputContainer, stream: VideoStream, index: _Index, key: int, targets: list[int]
) -> Iterator[VideoFrame]:
    """Yields the frames with the timestamps `targets`, decoded from one key frame."""
    for first, thin in _attempts(key):
        packets = _packets_from(container, stream, index, first)
        for frame in _decode(_thinned(packets, stream.codec_context, set(targets)) if thin else packets):
            if frame.pts is None or frame.pts < targets[0]:
                continue
            if frame.pts > targets[0] or (frame.is_corrupt and (thin or first > 0)):
                break  # the frame cannot be decoded from here
            yield frame
            targets = targets[1:]
            if not targets:
                return
    raise _MissingFrame("a frame is missing")


def _attempts(key: int) -> Iterator[tuple[int, bool]]:
    """Yields the key frames to try in turn, and whether the decoder skips frames that are not selected.

    Some containers mark frames as key frames although decoding cannot start there.
    """
    yield key, True
    yield key, False
    for step in itertools.count():
        if key == 0:
            return
        key = max(0, key - 2**step)
        yield key, False


def _packets_from(container: InputContainer, stream: VideoStream, index: _Index, key: int) -> Iterator[Packet]:
    """Yields the packets from a key frame on, or none if the container does not find it."""
    codec, pts = stream.codec_context, int(index.key_pts[key])
    codec.flush_buffers()
    codec.skip_frame = "DEFAULT"
    container.seek(int(index.key_seek[key]), stream=stream)
    packets = container.demux(stream)
    for packet in packets:
        if packet.pts == pts:
            return itertools.chain([packet], packets)
        if packet.is_keyframe and packet.pts is not None and packet.pts > pts:
            break
    return iter(())


def _thinned(packets: Iterable[Packet], codec: VideoCodecContext, targets: Container[int | None]) -> Iterator[Packet]:
    """Yields the packets, and makes the decoder skip frames that are neither in `targets` nor references.

    In HEVC with temporal layers, a frame that its own layer does not refer to may be a reference of the layer above.
    """
    hevc, layers = codec.name == "hevc", codec.extradata or b""
    skips = codec.name in ("h264", "mpeg4", "mpeg2video") or (hevc and len(layers) > 21 and layers[21] >> 3 & 7 == 1)
    for packet in packets:
        codec.skip_frame = "NONREF" if skips and packet.pts not in targets else "DEFAULT"
        yield packet


def _decode(packets: Iterable[Packet]) -> Iterator[VideoFrame]:
    """Decodes packets. As in the ffmpeg program, undecodable packets are skipped."""
    for packet in packets:
        try:
            yield from packet.decode()  # pyright: ignore[reportReturnType]
        except av.error.InvalidDataError:
            continue


def _pictures(frames: Iterable[VideoFrame]) -> Iterator[Frame]:
    """Converts frames to RGB as the ffmpeg program does, and rotates them according to their display matrix."""
    graph, layout, size, turns = Graph(), None, (0, 0), list[Transpose]()
    for frame in frames:
        if layout is None:
            size = frame.width, frame.height
            turns = _turns(frame)  # once: PyAV keeps a frame with side data until the next garbage collection
        if layout != (frame.format.name, frame.width, frame.height):
            graph, layout = _rgb_graph(frame, *size), (frame.format.name, frame.width, frame.height)
        graph.push(frame)
        picture = _picture(graph.pull())
        for turn in turns:
            picture = picture.transpose(turn)
        yield picture


def _rgb_graph(frame: VideoFrame, width: int, height: int) -> Graph:
    """Returns the filters of the ffmpeg program for RGB output in the size of the first frame.

    PyAV's `reformat` converts more than 8 bits differently.
    """
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(
        source, graph.add("scale", f"{width}:{height}"), graph.add("format", "rgb24"), graph.add("buffersink")
    )
    graph.configure()
    return graph


def _picture(rgb: Any) -> Frame:
    """Returns an RGB frame as a picture."""
    (plane,) = rgb.planes
    data: Any = memoryview(plane)
    return Image.frombuffer("RGB", (rgb.width, rgb.height), data, "raw", "RGB", plane.line_size, 1)


def _turns(frame: VideoFrame) -> list[Transpose]:
    """Returns the quarter turns and mirrors of the frame's display matrix.

    The matrix maps a point (x, y) to (a x + c y, b x + d y). Other angles are rounded to quarter turns.
    """
    a, b, c, d = _display_matrix(frame)
    swaps_axes = abs(b) > abs(a)
    x, y = (c, b) if swaps_axes else (a, d)
    turns = {Transpose.TRANSPOSE: swaps_axes, Transpose.FLIP_LEFT_RIGHT: x < 0, Transpose.FLIP_TOP_BOTTOM: y < 0}
    return [turn for turn, is_needed in turns.items() if is_needed]


def _display_matrix(frame: VideoFrame) -> tuple[float, float, float, float]:
    side_data: Any
    try:
        side_data = frame.side_data
        matrix = next((m for m in side_data if m.type.name == "DISPLAYMATRIX"), None)
    except ValueError:  # PyAV does not know this kind of side data, such as Exif; only the rotation is available
        angle = math.radians(frame.rotation)
        return math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = struct.unpack("<9i", bytes(matrix))
    return a, b, c, d


def _rate(times: np.ndarray, average: Fraction | None) -> float | None:
    """Returns frames per second: the average rate in the file if its frames agree with it, else their mean rate."""
    if len(times) < 2 or times[-1] <= 0:
        return float(average) if average else None
    mean = (len(times) - 1) / float(times[-1])
    return float(average) if average and abs(average - mean) < 0.01 * mean else mean
