"""The types of media files, by the ending of a name or by the first bytes."""

from pathlib import Path

from tarsier_jax.errors import MediaError

VIDEO_SUFFIXES = (".mp4", ".avi", ".webm", ".mov", ".mkv", ".wmv")
GIF_SUFFIXES = (".gif",)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
MEDIA_SUFFIXES = VIDEO_SUFFIXES + GIF_SUFFIXES + IMAGE_SUFFIXES
ACCEPTED = (
    f"Videos end in {' '.join(VIDEO_SUFFIXES)}, animations in {' '.join(GIF_SUFFIXES)}, "
    f"images in {' '.join(IMAGE_SUFFIXES)}, in upper or lower case."
)

HEAD = 1024  # bytes that determine the type of a file
# The first bytes of the formats of images and videos. A transport stream has the same byte every 188 bytes.
_SIGNATURES = (
    (0, b"\xff\xd8\xff", "image"),
    (0, b"\x89PNG\r\n\x1a\n", "image"),
    (0, b"GIF87a", "gif"),
    (0, b"GIF89a", "gif"),
    (8, b"WEBP", "image"),
    (0, b"BM", "image"),
    (0, b"II*\0", "image"),
    (0, b"MM\0*", "image"),
    (8, b"AVI ", "video"),
    (0, b"\x1a\x45\xdf\xa3", "video"),  # Matroska, WebM
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "video"),  # ASF
    (0, b"\0\0\x01\xba", "video"),  # MPEG program stream
    (0, b"FLV\x01", "video"),
    (0, b"OggS", "video"),
    *((4, box, "video") for box in (b"moov", b"mdat", b"wide", b"free", b"skip")),  # MP4, QuickTime
)
_STILL_BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis")  # pictures in the container of MP4


def kind_of_suffix(name: str | Path) -> str | None:
    """Returns "video", "gif" or "image" according to the ending of a name, or None for another ending."""
    suffix = Path(name).suffix.lower()
    kinds = {"video": VIDEO_SUFFIXES, "gif": GIF_SUFFIXES, "image": IMAGE_SUFFIXES}
    return next((kind for kind, suffixes in kinds.items() if suffix in suffixes), None)


def kind_of_content(head: bytes, name: str) -> str:
    """Returns "video", "gif" or "image" according to the first `HEAD` bytes of a file. Raises MediaError."""
    if head[4:8] == b"ftyp" and head[8:12] not in _STILL_BRANDS:
        return "video"
    if head[:1] == b"G" and head[188:189] == b"G" and not head.startswith(b"GIF8"):
        return "video"  # a transport stream
    for offset, signature, kind in _SIGNATURES:
        if head[offset : offset + len(signature)] == signature:
            return kind
    raise MediaError(
        f"{name} is not a video or image of a known format. Convert it to MP4, WebM, GIF, JPEG, PNG or WebP.",
        "unsupported",
    )
