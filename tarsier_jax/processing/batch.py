"""Examples, and padded batches of bucketed shapes for jitted code."""

import bisect
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from tarsier_jax.config import ModelConfig, VisionConfig
from tarsier_jax.errors import InputError
from tarsier_jax.processing.frame_sampling import FrameSelection
from tarsier_jax.typing import HostOrDeviceArray


@dataclasses.dataclass(frozen=True)
class Example:
    """One sample, unpadded.

    Attributes:
        input_ids: int32 (S,).
        labels: int32 (S,), -100 for tokens without loss.
        pixel_values: float32 (patches, C), in the order of `Processor.image`.
        grid_thw: int32 (visuals, 3), time, height and width in patches.
        position_ids: int32 (3, S), the M-RoPE ids; three equal rows for RoPE with one axis.
        num_truncated: Number of text tokens beyond max_seq_len that were dropped.
        frames: Number of frames and images. A temporal patch may contain two of them.
        selections: The frames of each image and video, in the order of `grid_thw`.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    pixel_values: np.ndarray
    grid_thw: np.ndarray
    position_ids: np.ndarray
    num_truncated: int = 0
    frames: int = 0
    selections: tuple[FrameSelection, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens, padded on the right to one shape, and their frames.

    There are B rows of S tokens. Rows form G groups of equal size, in order, each with its own F bins of P patches (of
    C values). Inference has one group, which minimises the padding of frames. Training has one group per row: devices
    that split the rows exchange no frames. A bin contains up to M frames, one after the other.

    Attributes:
        input_ids: int32 (B, S).
        labels: int32 (B, S), -100 for tokens without loss.
        position_ids: int32 (B, S, 3), the M-RoPE ids: time, height and width.
        lengths: int32 (B,), valid tokens of each row.
        patches: float32 (G, F, P, C). Without visuals F is 0.
        frame_hw: int32 (G, F, M, 2), height and width of each frame in patches; (0, 0) for none.
        vision_token_index: int32 (B, S), the index of a token's merged patch in the flattened padded array
            (F * P/4,) of the row's group; -1 for text and separators.
        segment_ids: int32 (B, S), the number of a token's sample in a packed row, from 1; 0 for padding. None if every
            row is one sample.
    """

    input_ids: Int[HostOrDeviceArray, "B S"]
    labels: Int[HostOrDeviceArray, "B S"]
    position_ids: Int[HostOrDeviceArray, "B S 3"]
    lengths: Int[HostOrDeviceArray, " B"]
    patches: Float[HostOrDeviceArray, "G F P C"]
    frame_hw: Int[HostOrDeviceArray, "G F M 2"]
    vision_token_index: Int[HostOrDeviceArray, "B S"]
    segment_ids: Int[HostOrDeviceArray, "B S"] = None


def _every(*ranges: tuple[int, int, int]) -> tuple[int, ...]:
    """Returns the sizes in inclusive ranges (first, last, step)."""
    return tuple(size for first, last, step in ranges for size in range(first, last + 1, step))


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that batches are padded to, in increasing order. Each combination that occurs is compiled once.

    Adjacent sizes differ by about an eighth, which limits padding. Sizes from 512 on are multiples of 64, those of
    full-size video of 128. 2304 patches and 9472 tokens fit 16 frames of 16:9 video at the default budget, with a
    prompt.

    Attributes:
        patches: Numbers of patches per frame.
        frames: Numbers of frames per batch.
        tokens: Numbers of tokens per row.
    """

    patches: tuple[int, ...] = (
        *_every((16, 320, 16), (352, 512, 32), (576, 1024, 64), (1152, 2560, 128), (3072, 4096, 512)),
        *(6144, 8192, 16384),
    )
    frames: tuple[int, ...] = (
        *_every((1, 8, 1), (10, 16, 2), (20, 32, 4), (40, 64, 8), (80, 128, 16), (160, 256, 32), (320, 512, 64)),
    )
    tokens: tuple[int, ...] = (
        *_every((16, 512, 16), (576, 1024, 64), (1152, 2048, 128), (2304, 4096, 256), (4608, 9216, 512)),
        *(9472, 9984, 10240, *_every((11264, 16384, 1024)), 20480, 24576, 32768),
    )

    def __post_init__(self) -> None:
        for name, sizes in dataclasses.asdict(self).items():
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise InputError(f"Bucket sizes must be positive and increasing, but {name} are {sizes}.")


_REMEDIES = {
    "patches": "patches in a frame. Lower max_pixels",
    "frames": "frames in a batch. Lower n_frames, or put fewer samples into a batch",
    "tokens": "tokens in a sample. Lower n_frames, max_pixels or max_seq_len",
}


def bucket(buckets: Buckets, name: str, size: int) -> int:
    """Returns the smallest bucket of `name` ("patches", "frames" or "tokens") that is at least `size`.

    Raises:
        InputError: `size` exceeds the largest bucket.
    """
    sizes = getattr(buckets, name)
    i = bisect.bisect_left(sizes, size)
    if i == len(sizes):
        raise InputError(f"{size} {_REMEDIES[name]}, or add a larger bucket than {sizes[-1]}.")
    return sizes[i]


def make_batch(
    examples: Sequence[Example], config: ModelConfig, buckets: Buckets | None = None, pad_id: int = 0
) -> Batch:
    """Pads examples to the smallest buckets that fit them all.

    Position ids continue through the padding. All batches without visuals have the same shape, with F = P = 0.

    Raises:
        InputError: `examples` is empty, or an example exceeds the largest bucket.
    """
    if not examples:
        raise InputError("A batch needs at least one example.")
    buckets = buckets or Buckets()
    lengths = np.array([len(e.input_ids) for e in examples], np.int32)
    S = bucket(buckets, "tokens", int(lengths.max()))
    input_ids = np.full((len(examples), S), pad_id, np.int32)
    labels = np.full((len(examples), S), -100, np.int32)
    position_ids = np.zeros((len(examples), S, 3), np.int32)
    for row, (example, n) in enumerate(zip(examples, lengths, strict=True)):
        input_ids[row, :n], labels[row, :n] = example.input_ids, example.labels
        position_ids[row, :n] = example.position_ids.T
        position_ids[row, n:] = example.position_ids.max(initial=-1) + 1 + np.arange(S - n)[:, None]
    patches, frame_hw = _pad_frames(examples, config.vision.patch_dim, buckets)
    vision_token_index = np.full((len(examples), S), -1, np.int32)
    # Frames and placeholders have the same order: by row, and by position in a row.
    valid = np.arange(S) < lengths[:, None]
    placeholders = valid & np.isin(input_ids, (config.image_token_id, config.video_token_id))
    vision_token_index[placeholders] = _feature_index(frame_hw, patches.shape[1], config.vision)
    return Batch(input_ids, labels, position_ids, lengths, patches[None], frame_hw[None, :, None], vision_token_index)


def _pad_frames(examples: Sequence[Example], patch_dim: int, buckets: Buckets) -> tuple[np.ndarray, np.ndarray]:
    """Returns patches float32 (F, P, C) and frame_hw int32 (F, 2) of all examples."""
    frame_hw = np.concatenate([frame_sizes(e) for e in examples])
    if not len(frame_hw):
        return np.zeros((0, 0, patch_dim), np.float32), np.zeros((0, 2), np.int32)
    F = bucket(buckets, "frames", len(frame_hw))
    P = bucket(buckets, "patches", int(frame_hw.prod(axis=1).max()))
    patches = np.zeros((F, P, patch_dim), np.float32)
    frame = 0
    for example in examples:
        row = 0
        for t, h, w in example.grid_thw.tolist():
            values = example.pixel_values[row : row + t * h * w]
            patches[frame : frame + t, : h * w] = values.reshape(t, h * w, patch_dim)
            frame, row = frame + t, row + t * h * w
    return patches, np.pad(frame_hw, ((0, F - len(frame_hw)), (0, 0))).astype(np.int32)


def frame_sizes(example: Example) -> np.ndarray:
    """Returns height and width in patches of each frame of an example, int32 (frames, 2)."""
    return np.repeat(example.grid_thw[:, 1:], example.grid_thw[:, 0], axis=0)


def _feature_index(frame_hw: np.ndarray, patches: int, vision: VisionConfig) -> np.ndarray:
    """Returns the indices of the merged patches of all frames in the flattened padded array, int32 (visual tokens,)."""
    features = np.arange(vision.num_tokens(patches))  # of a padded frame
    valid = features < vision.num_tokens(frame_hw.prod(axis=1, keepdims=True))  # (F, features)
    return np.flatnonzero(valid).astype(np.int32)
