"""The few shapes that the engine's programs are compiled for."""

import dataclasses

from tarsier_jax.errors import InputError
from tarsier_jax.processing.image import temporal_patches
from tarsier_jax.processing.packing import RowShape
from tarsier_jax.processing.processor import Processor

_TEXT, _LONG_TEXT = 64, 256  # tokens of text beside a prompt's frames: as a rule, and the most, if nothing else is said
_SHORTEST_ROW = 1024  # tokens: several small prompts fill a row better than one
_KINDS = 6  # of bins: a frame, or several, fill one of them to within an eighth
_ROUNDING = 1.06  # by which a frame may grow when its sides are rounded to whole blocks of patches
_SMALLEST_FRAME = 16  # patches, Qwen2-VL's least
_FRAMES_A_BIN = 8  # at most
_LENGTHS = (0.75, 0.9375, 1.0)  # of rows, as shares of the longest: one large clip seldom fills a row
_SPANS = (0.25, 0.5, 0.75, 1.0)  # of the slots' tokens that decoding reads, as shares of all
_STEPS = 8  # in which a row's bins are run, about: those at its end that are not in use are left out


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """slots: answers under way at once.  prompt_tokens, new_tokens: of the longest prompt and the longest answer.
    buckets: shapes of prompt rows that are run at once, which differ in their bins: the patches of a bin are what a
    frame of this bucket, or a few of them, fill.  groups: of slots and rows, one a data-parallel part of the mesh.

    Raises:
        InputError: the slots cannot be split into groups, or something is below 1.
    """

    slots: int
    prompt_tokens: int
    new_tokens: int
    buckets: tuple[RowShape, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        if min(self.slots, self.prompt_tokens, self.new_tokens, self.groups) < 1 or self.slots % self.groups:
            raise InputError(
                f"{self.slots} slots cannot be shared by {self.groups} parts of the mesh, with {self.prompt_tokens} "
                f"tokens a prompt and {self.new_tokens} an answer. Give a multiple of {self.groups} slots."
            )

    @property
    def size(self) -> int:
        """Tokens that a slot has room for."""
        return self.prompt_tokens + self.new_tokens

    @property
    def read_lengths(self) -> tuple[int, ...]:
        """How many of a slot's tokens decoding reads, ascending: the first that all answers under way fit."""
        return tuple(sorted({min(_round_up(self.size * share, 64), self.size) for share in _SPANS}))

    @property
    def lengths(self) -> tuple[int, ...]:
        """The tokens to which rows are cut, ascending."""
        longest = self.buckets[0].tokens
        return tuple(sorted({min(_round_up(longest * share, 64), longest) for share in _LENGTHS}))

    def step(self, bucket: int) -> int:
        """How many bins of a row of this bucket are run at a time: a divisor of all of them."""
        bins = self.buckets[bucket].bins
        return max(n for n in range(1, max(bins // _STEPS, 1) + 1) if bins % n == 0)

    @property
    def features(self) -> int:
        """Merged patches that a row of any bucket has."""
        return max(row.bins * row.patches for row in self.buckets) // 4

    def bucket_of(self, frame: int) -> int:
        """Which bucket of row leaves least unused in bins full of frames of so many patches."""
        unused = [row.patches % frame / row.patches if row.patches >= frame else 1.0 for row in self.buckets]
        return min(range(len(unused)), key=unused.__getitem__)


def fit_config(
    processor: Processor, slots: int, new_tokens: int, groups: int = 1, prompt_tokens: int | None = None
) -> EngineConfig:
    """A shape for what the processor's options let through: n_frames of the largest frame, and text."""
    options, vision = processor.options, processor.config.vision
    area = min(options.max_pixels * _ROUNDING, processor.image.max_pixels)
    frame = max(_round_up(area / vision.patch_size**2, 4), _SMALLEST_FRAME)
    shown = temporal_patches(options.n_frames, processor.image.temporal_patch_size, processor.double_frames)
    visual = vision.num_tokens(shown * frame)
    prompt_tokens = prompt_tokens or min(_round_up(visual + _LONG_TEXT, 64), options.max_seq_len)
    tokens = max(prompt_tokens, _SHORTEST_ROW)
    patches = tokens * vision.merge_factor * visual / (visual + _TEXT)
    rows = tuple(
        RowShape(
            tokens=tokens,
            bins=_round_up(patches / size, max(1, int(patches / size) // _STEPS)),
            patches=size,
            frames=min(size // _SMALLEST_FRAME, _FRAMES_A_BIN),
            samples=max(1, slots // groups // 2),  # so that rows need not wait until all slots are free
        )
        for size in sorted({max(_round_up(frame * 2 ** (-i / _KINDS), 4), _SMALLEST_FRAME) for i in range(_KINDS)})
    )
    return EngineConfig(slots, prompt_tokens, new_tokens, rows, groups)


def _round_up(x: float, step: int) -> int:
    return -int(-x // step) * step
