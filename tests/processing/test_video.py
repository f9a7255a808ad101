import subprocess
from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, ImageSequence

from tarsier_jax.errors import InputError
from tarsier_jax.processing.clip import media_file
from tarsier_jax.processing.video import find_inputs, kind_of, load_image, open_clip
from tarsier_jax.processing.video_files import read_length
from tests.processing.conftest import frame_numbers

ENCODINGS = {
    "h264.mp4": ("-g", "10"),
    "bframes.mp4": ("-c:v", "mpeg4", "-bf", "2", "-g", "8"),
    "bframes.avi": ("-c:v", "mpeg4", "-bf", "2", "-g", "8"),
    "h264.mkv": ("-g", "10"),
    "h264.mov": ("-g", "10"),
    "vp8.webm": ("-c:v", "libvpx", "-g", "10", "-b:v", "1M"),
    "wmv2.wmv": ("-c:v", "wmv2", "-g", "8"),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_exactly_the_frames_asked_for(render: Callable[..., Path], name: str) -> None:
    clip = open_clip(render(name, *ENCODINGS[name]))
    assert (clip.length, clip.rate) == (40, 8.0)
    indices = [0, 3, 9, 10, 11, 17, 25, 32, 39]
    assert frame_numbers(list(clip.read(indices))) == indices
    again = [30, 8, 8, 31]
    assert frame_numbers(list(clip.read(again))) == again


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_length_of_a_video(render: Callable[..., Path], name: str) -> None:
    """The windows of long videos depend on it. The last frame is displayed as long as the others."""
    assert read_length(media_file(render(name, *ENCODINGS[name]))) == pytest.approx((5.0, 0.125), abs=1e-3)


def test_a_file_that_is_replaced(render: Callable[..., Path], mp4: Path, tmp_path: Path) -> None:
    """The index of frames, which stays in memory, is that of the new file."""
    path = tmp_path / "a.mp4"
    for source, length in ((mp4, 40), (render("slow.mp4", "-vf", "fps=4"), 20)):
        path.write_bytes(source.read_bytes())
        assert open_clip(path).length == length


def test_upper_case_names(mp4: Path, tmp_path: Path) -> None:
    path = tmp_path / "CLIP.MP4"
    path.write_bytes(mp4.read_bytes())
    assert open_clip(path).length == 40


@pytest.fixture
def gif(tmp_path: Path) -> Path:
    """Six frames of a moving square on a transparent ground, 50 ms each; later frames store only changes."""
    frames = []
    for i in range(6):
        pixels = np.zeros((24, 32, 4), np.uint8)
        pixels[5:15, 3 * i : 3 * i + 8] = (200, 30 * i, 50, 255)
        frames.append(Image.fromarray(pixels))
    path = tmp_path / "square.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, disposal=2)
    return path


def over_white(frame: Image.Image) -> np.ndarray:
    rgba = np.asarray(frame.convert("RGBA"))
    return np.where(rgba[..., 3:] == 0, 255, rgba[..., :3])


def test_gif_frames(gif: Path) -> None:
    clip = open_clip(gif)
    assert (clip.length, clip.rate) == (6, 20.0)
    with Image.open(gif) as image:
        every = [over_white(frame) for frame in ImageSequence.Iterator(image)]
    indices = [1, 4, 4, 0]  # repeated and unsorted, as from a video
    for frame, index in zip(clip.read(indices), indices, strict=True):
        np.testing.assert_array_equal(np.asarray(frame), every[index])


def test_a_directory_of_frames_in_natural_order(tmp_path: Path) -> None:
    for i in (10, 2, 1):
        Image.new("RGB", (8, 8), (20 + 5 * i,) * 3).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    assert frame_numbers(list(open_clip(tmp_path).read([0, 1, 2]))) == [1, 2, 10]


def test_lists_of_files_and_of_frames_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "one.jpg"
    Image.new("L", (8, 8), 25).save(path)
    clip = open_clip([path, Image.new("RGB", (8, 8), (30, 30, 30)), np.full((8, 8, 3), 35, np.uint8)])
    assert clip.rate is None
    frames = list(clip.read([2, 0, 1]))
    assert frame_numbers(frames) == [3, 1, 2]
    assert {frame.mode for frame in frames} == {"RGB"}


@pytest.fixture
def broken(mp4: Path, gif: Path, tmp_path: Path) -> Path:
    """A directory of files whose content differs from their ending."""
    directory = tmp_path / "broken"
    directory.mkdir()
    content = mp4.read_bytes()
    (directory / "no_index.mp4").write_bytes(content[200:])
    (directory / "first_bytes.mp4").write_bytes(content[:100])
    (directory / "cut.mp4").write_bytes(content[:-400])  # its index, at the start, promises more
    (directory / "empty.mp4").touch()
    (directory / "text.mp4").write_text("This is a letter. " * 100)
    sound = ["-loglevel", "error", "-f", "lavfi", "-i", "sine=d=0.1", str(directory / "sound.mp4")]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *sound], check=True)
    (directory / "cut.gif").write_bytes(gif.read_bytes()[:40])
    (directory / "text.png").write_text("no picture")
    return directory


@pytest.mark.parametrize(
    "name", ["no_index.mp4", "first_bytes.mp4", "cut.mp4", "empty.mp4", "text.mp4", "sound.mp4", "cut.gif", "text.png"]
)
def test_broken_files_are_named(broken: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} (cannot be decoded|is empty)") as error:
        clip = open_clip(broken / name)
        list(clip.read(range(clip.length)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["missing.mp4", "missing.png", "missing.gif"])
def test_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} does not exist"):
        open_clip(tmp_path / name)


def test_frames_that_the_clip_has_not(mp4: Path) -> None:
    with pytest.raises(InputError, match=r"frames 0 to 39; frame \[40\] does not exist"):
        open_clip(mp4).read([3, 40])


def test_unknown_endings_name_the_accepted_ones(tmp_path: Path) -> None:
    path = tmp_path / "clip.doc"
    path.write_text("text")
    for use in (kind_of, open_clip, find_inputs):
        with pytest.raises(InputError, match=r"ending in \.doc.*\.webm.*\.gif.*\.png"):
            use(path)


def test_a_directory_without_frames_is_no_clip(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="contains no images"):
        open_clip(tmp_path)
    with pytest.raises(InputError, match="list of frames is empty"):
        open_clip([])


def test_images_in_memory_have_to_be_bytes() -> None:
    with pytest.raises(InputError, match=r"float64 \(4, 4, 3\)"):
        load_image(np.zeros((4, 4, 3)))


def test_find_inputs(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b10.mp4", "b9.MOV", "sub/a.gif", "c.png", "notes.txt", ".hidden.mp4"):
        (tmp_path / name).write_bytes(b"x")
    assert [p.relative_to(tmp_path).as_posix() for p in find_inputs(tmp_path)] == [
        "b9.MOV",
        "b10.mp4",
        "c.png",
        "sub/a.gif",
    ]
    assert find_inputs(tmp_path / "c.png") == [tmp_path / "c.png"]


def test_find_inputs_without_media(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="contains no video, animation or image"):
        find_inputs(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        find_inputs(tmp_path / "missing.mp4")
