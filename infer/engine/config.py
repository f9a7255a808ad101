"""The shapes that the engine's programs are compiled for."""

import dataclasses
import math

from jax.sharding import AbstractMesh, Mesh

from tarsier_jax.config import VisionConfig
from tarsier_jax.errors import InputError
from tarsier_jax.models.vision_layers import saturating_patches
from tarsier_jax.processing.image import temporal_patches
from tarsier_jax.processing.packing import RowShape
from tarsier_jax.processing.processor import Processor

_TEXT, _LONG_TEXT = 64, 256  # tokens of text beside the frames of a prompt: usual, and the default limit
_SHORTEST_ROW = 1024  # tokens; several small prompts fill a row better than one
_BIN_SIZES = 6  # one or several frames fill a bin of one of these sizes to within an eighth
_MAX_FRAMES_PER_BIN = 8
_LENGTHS = (0.75, 0.9375, 1.0)  # of rows, as fractions of the longest; one large clip rarely fills a row
_SHORT_LENGTHS = (0.25, 0.5, 0.75, 1.0)  # the same for conversations, whose prompts are often alone in their rows
_READ_LENGTHS = (0.25, 0.5, 0.75, 1.0)  # of a slot that decoding reads, as fractions of its size
_READ_STEP = 256  # tokens; reading fewer positions of a small slot saves less time than compiling another program takes
_CHUNKS = (32, 256)  # tokens: a question, or a text
_STEPS = 8  # approximate number of calls that run the bins of a row; calls for unused bins at its end are skipped


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Shapes of an engine.

    Attributes:
        slots: Number of answers in progress at once.
        prompt_tokens: Limit of a prompt, in tokens.
        new_tokens: Limit of an answer, in tokens.
        buckets: Shapes of the packed rows. They differ in the size of their vision bins, which one or a few frames of
            a bucket fill.
        groups: Number of groups of slots and rows, one per data-parallel part of the mesh.
        devices: Number of devices of a group, the tensor axis of the mesh. Each runs bins of its own.
        reuse_prefixes: Whether a prompt that begins with the content of a free slot continues there.

    Raises:
        InputError: the slots cannot be split into groups, or a number is below 1.
    """

    slots: int
    prompt_tokens: int
    new_tokens: int
    buckets: tuple[RowShape, ...]
    groups: int = 1
    devices: int = 1
    reuse_prefixes: bool = False

    def __post_init__(self) -> None:
        if min(self.slots, self.prompt_tokens, self.new_tokens, self.groups) < 1 or self.slots % self.groups:
            raise InputError(
                f"{self.slots} slots cannot be split into {self.groups} groups, with {self.prompt_tokens} tokens per "
                f"prompt and {self.new_tokens} per answer. Use a multiple of {self.groups} slots."
            )

    @property
    def size(self) -> int:
        """Capacity of a slot, in tokens."""
        return self.prompt_tokens + self.new_tokens

    @property
    def read_lengths(self) -> tuple[int, ...]:
        """Numbers of cache positions that decoding can read, ascending; it uses the first that all answers fit."""
        return tuple(sorted({min(_round_up(self.size * share, _READ_STEP), self.size) for share in _READ_LENGTHS}))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths to which packed rows are truncated, in tokens, ascending."""
        longest = self.buckets[0].tokens
        shares = _SHORT_LENGTHS if self.reuse_prefixes else _LENGTHS
        return tuple(sorted({min(_round_up(longest * share, 64), longest) for share in shares}))

    @property
    def chunks(self) -> tuple[int, ...]:
        """Numbers of tokens that continue a slot in one call, ascending."""
        return tuple(sorted({min(tokens, self.prompt_tokens) for tokens in _CHUNKS}))

    def step(self, bucket: int) -> int:
        """Returns the number of bins of this bucket that run at a time, a divisor of the number of its bins.

        It is a multiple of the number of devices if that divides the number of bins: otherwise devices run empty bins.
        """
        row = self.buckets[bucket]
        limit = min(_bins_at_once(row.bins, row.patches, self.devices), row.bins)
        return max((n for n in range(1, limit + 1) if row.bins % n == 0), key=lambda n: (n % self.devices == 0, n))

    def num_features(self, vision: VisionConfig) -> int:
        """Returns the visual tokens of the largest row."""
        return vision.num_tokens(max(row.bins * row.patches for row in self.buckets))

    def bucket_of(self, frame: int) -> int:
        """Returns the bucket whose bins are filled best by frames of this many patches."""
        waste = [row.patches % frame / row.patches if row.patches >= frame else 1.0 for row in self.buckets]
        return min(range(len(waste)), key=waste.__getitem__)


def fit_config(
    processor: Processor,
    slots: int,
    new_tokens: int,
    mesh: Mesh | AbstractMesh | None = None,
    prompt_tokens: int | None = None,
) -> EngineConfig:
    """Returns a config for the largest prompt of the processor's options: n_frames of the largest frame, and text."""
    groups, devices = 1, 1
    if mesh is not None:
        groups, devices = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    options, vision = processor.options, processor.config.vision
    frame, smallest = processor.largest_frame, vision.smallest_frame
    num_frames = temporal_patches(options.n_frames, vision.temporal_patch_size, processor.double_frames)
    visual = num_frames * vision.frame_tokens(frame)
    prompt_tokens = prompt_tokens or min(_round_up(visual + _LONG_TEXT, 64), options.max_seq_len)
    tokens = max(prompt_tokens, _SHORTEST_ROW)
    patches = tokens * (frame / vision.frame_tokens(frame)) * visual / (visual + _TEXT)
    fractions = [2 ** (-i / _BIN_SIZES) for i in range(_BIN_SIZES)]
    sizes = sorted({max(_round_up(frame * fraction, vision.bin_multiple), smallest) for fraction in fractions})
    rows = tuple(
        RowShape(
            tokens=tokens,
            bins=_num_bins(patches / size, size, devices),
            patches=size,
            frames=min(size // smallest, _MAX_FRAMES_PER_BIN),
            samples=max(1, slots // groups // 2),  # a row need not wait until all slots are free
        )
        for size in sizes
    )
    return EngineConfig(slots, prompt_tokens, new_tokens, rows, groups, devices)


def _num_bins(needed: float, patches: int, devices: int) -> int:
    """Returns a number of bins, at least `needed`, of equal calls of the vision tower, equally many per device."""
    calls = math.ceil(needed / _bins_at_once(int(needed), patches, devices))
    return calls * _round_up(needed / calls, devices)


def _bins_at_once(bins: int, patches: int, devices: int) -> int:
    """Returns the largest number of bins per call of the vision tower, for rows of `bins` bins of `patches` patches."""
    return devices * max(bins // _STEPS // devices, saturating_patches() // patches, 1)


def _round_up(x: float, step: int) -> int:
    return -int(-x // step) * step
