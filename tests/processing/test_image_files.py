import io
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from tarsier_jax.errors import InputError
from tarsier_jax.processing import image_files
from tarsier_jax.processing.clip import name_content
from tarsier_jax.processing.processor import media_sample
from tarsier_jax.processing.video import load_image, open_clip

ORIENTATION = 0x0112


@pytest.fixture
def photo() -> Image.Image:
    """A picture without symmetry: red grows to the right, green downwards."""
    y, x = np.mgrid[:24, :32]
    return Image.fromarray(np.stack([x * 8, y * 10, np.full_like(x, 40)], -1).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def ramp(dtype: str, high: float) -> np.ndarray:
    """Grey levels from 0 to `high`, (4, 256)."""
    return np.tile(np.linspace(0, high, 256), (4, 1)).astype(dtype)


LEVELS = np.tile(np.arange(256), (4, 1))


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_photos_are_upright(photo: Image.Image, tmp_path: Path, orientation: int, ending: str) -> None:
    path = tmp_path / f"photo.{ending}"
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    photo.save(path, exif=exif, quality=100)
    with Image.open(path) as image:
        upright = pixels(ImageOps.exif_transpose(image).convert("RGB"))
    assert upright.shape == ((32, 24, 3) if orientation > 4 else (24, 32, 3))
    np.testing.assert_array_equal(pixels(load_image(path)), upright)
    for source in (path, [path], tmp_path):
        np.testing.assert_array_equal(pixels(next(open_clip(source).read([0]))), upright)


def test_orientation_and_alpha_of_a_tiff(photo: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    photo.convert("RGBA").save(tmp_path / "photo.tif", exif=exif)
    upright = pixels(photo.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(pixels(load_image(tmp_path / "photo.tif")), upright)


def test_a_pil_image_is_turned_once_and_stays_as_it_is(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    photo.save(path, exif=exif)
    with Image.open(path) as image:
        frame = load_image(image)
        assert image.size == (32, 24)
        assert image.getexif()[ORIENTATION] == 6
    assert frame.size == (24, 32)
    np.testing.assert_array_equal(pixels(load_image(frame)), pixels(frame))


@pytest.mark.parametrize("exif", [b"Exif\0\0MM", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(range(40))])
def test_broken_exif_leaves_the_picture_as_it_is(photo: Image.Image, tmp_path: Path, exif: bytes) -> None:
    path = tmp_path / "photo.png"
    photo.save(path, exif=exif)
    np.testing.assert_array_equal(pixels(load_image(path)), pixels(photo))


# Transparency


def transparent_pictures() -> dict[str, Image.Image]:
    """Pictures whose left half is black and opaque, whose right half is transparent over hidden red."""
    rgba = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    rgba.paste((0, 0, 0, 255), (0, 0, 4, 4))
    red_is_clear = rgba.convert("RGB")
    red_is_clear.info["transparency"] = (255, 0, 0)
    grey = rgba.convert("RGB").convert("L")
    grey.info["transparency"] = grey.getpixel((7, 0))
    palette = rgba.convert("RGB").quantize(2)
    palette.info["transparency"] = palette.getpixel((7, 0))
    alphas = palette.copy()
    alphas.info["transparency"] = bytes(0 if i == palette.getpixel((7, 0)) else 255 for i in range(2))
    return {
        "RGBA": rgba,
        "LA": rgba.convert("LA"),
        "PA": rgba.convert("PA"),
        "RGBa": rgba.convert("RGBa"),
        "La": rgba.convert("LA").convert("La"),
        "RGB with a transparent color": red_is_clear,
        "L with a transparent level": grey,
        "P with a transparent entry": palette,
        "P with alphas": alphas,
    }


@pytest.mark.parametrize("name", transparent_pictures())
def test_transparency_is_white(name: str, tmp_path: Path) -> None:
    image, path = transparent_pictures()[name], tmp_path / "picture.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = pixels(load_image(image))
    assert (values[:, :4] == 0).all()
    assert (values[:, 4:] == 255).all()
    if image.mode not in ("PA", "RGBa", "La"):  # which PNG does not have
        image.save(path, transparency=image.info.get("transparency"))
        np.testing.assert_array_equal(pixels(load_image(path)), values)


@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_half_transparent_colors_mix_with_white(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"picture.{ending}"
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(path, lossless=True)
    np.testing.assert_allclose(pixels(load_image(path))[0, 0], (255, 127, 127), atol=1)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_opaque_pictures_are_as_pillow_converts_them(photo: Image.Image, mode: str) -> None:
    image = photo.convert("L").convert("LA") if mode == "LA" else photo.convert(mode)
    np.testing.assert_array_equal(pixels(load_image(image)), pixels(image.convert("RGB")))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, bits: int, color_type: int, row: bytes, *extra: bytes, height: int = 1) -> bytes:
    """A PNG with data for one row, of kinds that Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + data + chunk(b"IEND", b"")


# Two pixels each: one of the transparent color, one of another.
PNG_COLORS = {
    "grey of 2 bits": (png(2, 2, 0, b"\x10", chunk(b"tRNS", b"\0\0")), [255, 85]),
    "grey of 4 bits": (png(2, 4, 0, b"\x3f", chunk(b"tRNS", b"\0\x03")), [255, 255]),
    "grey of 4 bits, another": (png(2, 4, 0, b"\x38", chunk(b"tRNS", b"\0\x03")), [255, 136]),
    "grey of 16 bits": (png(2, 16, 0, b"\x12\x34\x56\x78", chunk(b"tRNS", b"\x12\x34")), [255, 0x56]),
    "color of 16 bits": (
        png(2, 16, 2, b"\x12\x34" * 3 + b"\x56\x78" * 3, chunk(b"tRNS", b"\x12\x34" * 3)),
        [255, 0x56],
    ),
    "grey and alpha of 16 bits": (png(2, 16, 4, b"\x12\x34\0\0\x56\x78\xff\xff"), [255, 0x56]),
    "color and alpha of 16 bits": (
        png(2, 16, 6, b"\x12\x34" * 3 + b"\0\0" + b"\x56\x78" * 3 + b"\xff\xff"),
        [255, 0x56],
    ),
}


@pytest.mark.parametrize("name", PNG_COLORS)
def test_transparent_colors_of_other_bit_depths(name: str, tmp_path: Path) -> None:
    data, levels = PNG_COLORS[name]
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    np.testing.assert_array_equal(pixels(load_image(path))[0, :, 0], levels)


# Bit depths


@pytest.mark.parametrize(
    ("ending", "dtype", "high"),
    [
        ("png", "uint16", 65535),
        ("tif", "uint16", 65535),
        ("tif", ">u2", 65535),
        ("tif", "int32", 65535),
        ("tif", "int32", 255),
        ("tif", "int32", 2**31 - 1),
        ("tif", "float32", 1),
        ("tif", "float32", 255),
        ("tif", "float32", 1e30),
    ],
)
def test_values_are_scaled(tmp_path: Path, ending: str, dtype: str, high: float) -> None:
    path = tmp_path / f"ramp.{ending}"
    image = Image.fromarray(ramp(dtype, high))
    image.save(path)
    for source in (path, image):
        values = pixels(load_image(source))
        assert (values.min(), values.max()) == (0, 255)
        np.testing.assert_allclose(values[..., 0], LEVELS, atol=1)


def test_dark_pictures_stay_dark(tmp_path: Path) -> None:
    for dtype, high in (("uint16", 6553), ("float32", 0.1)):
        Image.fromarray(ramp(dtype, high)).save(tmp_path / "dark.tif")
        assert pixels(load_image(tmp_path / "dark.tif")).max() == pytest.approx(25, abs=1)


def test_negative_values_and_gaps(tmp_path: Path) -> None:
    values = np.array([[-40, 0, 40, np.nan, np.inf]], np.float32)
    Image.fromarray(values).save(tmp_path / "heights.tif")
    assert pixels(load_image(tmp_path / "heights.tif"))[0, :, 0].tolist() == [0, 128, 255, 0, 0]
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(tmp_path / "heights.tif")
    assert pixels(load_image(tmp_path / "heights.tif")).max() == 0


def tiff(width: int, bits: int, photometric: int, data: bytes, sample_format: int = 1) -> bytes:
    """A TIFF of one row of grey levels, of kinds that Pillow does not write."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1)]
    tags += [(279, len(data)), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


@pytest.mark.parametrize(
    ("data", "levels"),
    [
        (tiff(2, 12, 1, b"\x80\x0f\xff"), [128, 255]),
        (tiff(2, 16, 0, b"\0\x80\xff\xff"), [127, 0]),
        (tiff(3, 32, 1, struct.pack("<III", 0, 2**31, 2**32 - 1)), [0, 128, 255]),
        (tiff(3, 16, 1, struct.pack("<hhh", -32768, 0, 32767), sample_format=2), [0, 128, 255]),
    ],
    ids=["12 bits", "zero is white", "unsigned", "signed"],
)
def test_kinds_of_tiff(tmp_path: Path, data: bytes, levels: list[int]) -> None:
    path = tmp_path / "grey.tif"
    path.write_bytes(data)
    np.testing.assert_allclose(pixels(load_image(path))[0, :, 0], levels, atol=1)


def test_color_profiles_are_applied(photo: Image.Image, tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red, green = srgb.index(b"rXYZ"), srgb.index(b"gXYZ")
    swapped = bytearray(srgb.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")))
    swapped[red : red + 4], swapped[green : green + 4] = b"gXYZ", b"rXYZ"  # red and green change places
    as_stored = pixels(photo)
    for profile, expected in ((srgb, as_stored), (bytes(swapped), as_stored[..., [1, 0, 2]]), (b"broken", as_stored)):
        photo.save(tmp_path / "photo.png", icc_profile=profile)
        np.testing.assert_allclose(pixels(load_image(tmp_path / "photo.png")), expected, atol=2)


# Animations


@pytest.fixture
def animation(tmp_path: Path) -> Callable[..., Path]:
    def save(name: str, durations: list[int], **options: Any) -> Path:
        """Frames of the grey levels 0, 40, 80, ..."""
        frames = [Image.new("RGB", (8, 8), (40 * i,) * 3) for i in range(len(durations))]
        path = tmp_path / name
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, **options)
        return path

    return save


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animations_have_all_frames_and_their_times(animation: Callable[..., Path], name: str) -> None:
    path = animation(name, [50, 200, 50, 100], **({"lossless": True} if name == "a.webp" else {}))
    clip = open_clip(path)
    assert clip.length == 4
    assert clip.rate == 10.0
    assert clip.times is not None
    np.testing.assert_allclose(clip.times, [0, 0.05, 0.25, 0.3])
    assert [pixels(frame)[0, 0, 0] for frame in clip.read([3, 0, 2])] == [120, 0, 80]
    assert media_sample(path)["task"] == "video/QA"


def test_durations_of_up_to_10_ms_are_shown_for_100_ms(animation: Callable[..., Path]) -> None:
    clip = open_clip(animation("a.gif", [10, 20, 0]))
    assert clip.times is not None
    np.testing.assert_allclose(clip.times, [0, 0.1, 0.12])
    assert clip.rate == pytest.approx(3 / 0.22)


def test_the_default_image_of_an_animated_png_is_no_frame(animation: Callable[..., Path]) -> None:
    clip = open_clip(animation("a.png", [50, 50, 50], default_image=True))
    assert [pixels(frame)[0, 0, 0] for frame in clip.read(range(clip.length))] == [40, 80]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_one_frame_of_many_is_used_with_a_warning(animation: Callable[..., Path], name: str) -> None:
    path = animation(name, [50, 50])
    with pytest.warns(
        UserWarning, match=rf"{name} (is an animation; only its first|has several pages; only the first)"
    ):
        assert pixels(load_image(path)).max() == 0


def test_still_pictures_do_not_warn(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "preview.jpg", format="MPO", save_all=True, append_images=[photo.resize((8, 6))])
    photo.save(tmp_path / "still.webp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("preview.jpg", "still.webp"):
            clip = open_clip(tmp_path / name)
            assert (clip.length, clip.rate, next(clip.read([0])).size) == (1, None, (32, 24))
            assert media_sample(tmp_path / name)["task"] == "image/QA"


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_cut_animations_are_named(animation: Callable[..., Path], name: str) -> None:
    path = animation(name, [50] * 6)
    data = path.read_bytes()
    for length in range(len(data) // 3, len(data) - (20 if name == "a.png" else 1), 3):  # checksums and IEND
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=f"{name} cannot be decoded"):
            list(open_clip(path).read([0]))


# Errors and limits


def test_panoramas_above_the_limit_of_pillow_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "_FULL_PIXELS", 10_000)
    path = tmp_path / "panorama.jpg"
    Image.new("RGB", (400, 50), (200, 100, 50)).save(path)
    frame = load_image(path)
    assert frame.size == (200, 25)
    np.testing.assert_allclose(pixels(frame)[0, 0], (200, 100, 50), atol=3)


def test_too_large_pictures_are_named_with_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png(40_000, 8, 0, b"", height=20_000))
    with pytest.raises(InputError, match=r"large\.png is too large: pictures of up to 500 megapixels.*Scale it down"):
        load_image(path)


READ_CUT_PICTURES = """
import sys
from tarsier_jax.errors import InputError
from tarsier_jax.processing.video import load_image
for path in sys.argv[1:]:
    try:
        load_image(path)
    except InputError as error:
        print(error)
"""


def test_large_pictures_do_not_warn(tmp_path: Path) -> None:
    paths = [tmp_path / "100.png", tmp_path / "260.png"]  # megapixels, but cut off
    for path, height in zip(paths, (5_000, 13_000), strict=True):
        path.write_bytes(png(20_000, 1, 0, bytes(2500), height=height)[:-20])
    command = [sys.executable, "-c", READ_CUT_PICTURES, *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stderr == ""
    assert run.stdout.count("cannot be decoded: it is cut off") == 2


def test_the_content_decides_and_not_the_ending(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.jpg", format="PNG")
    np.testing.assert_array_equal(pixels(load_image(tmp_path / "photo.jpg")), pixels(photo))


CONTENTS = {
    b"<!DOCTYPE html><p>403 Forbidden": "a web page, so the download failed",
    b"\xef\xbb\xbf\n<HTML><body>\xe9": "a web page, so the download failed",
    b"<?xml version='1.0'?><Error><Code>AccessDenied": "an XML document, so the download failed",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n": "a git-lfs pointer: run `git lfs pull`",
    b'{"error": "not found"}': "a JSON document",
    "Zugriff verweigert: Schlüssel".encode(): "text",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>": "an SVG drawing",
    b"\0\0\0\x18ftypheic\0\0\0\0": "a HEIC picture",
}


@pytest.mark.parametrize("data", CONTENTS)
def test_content_that_is_no_picture_is_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"picture.jpg cannot be decoded: it is {CONTENTS[data]}"):
        load_image(path)


def test_pictures_have_no_other_name(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    assert name_content(tmp_path / "photo.png") is None
    assert name_content(tmp_path / "missing.png") is None


def test_a_cut_picture_in_memory_is_an_input_error(photo: Image.Image) -> None:
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG")
    with Image.open(io.BytesIO(buffer.getvalue()[:-60])) as image, pytest.raises(InputError, match="cannot be decoded"):
        load_image(image)
