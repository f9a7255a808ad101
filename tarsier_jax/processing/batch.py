"""Examples, and the padded batches of bucketed shape that jitted code sees."""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tarsier_jax.config import ModelConfig, VisionConfig
from tarsier_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Example:
    """One sample, unpadded.

    input_ids: int32 (S,).  labels: int32 (S,), -100 where not trained on.
    pixel_values: float32 (N, C*T*14*14), in the patch order of Hugging Face's Qwen2VLImageProcessor.
    grid_thw: int32 (visuals, 3), in patches.  position_ids: int32 (3, S), the M-RoPE ids.
    num_truncated: tokens of text that were left out at the end, being beyond max_seq_len.
    frames: frames and images shown; a temporal patch may hold two of them.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    pixel_values: np.ndarray
    grid_thw: np.ndarray
    position_ids: np.ndarray
    num_truncated: int = 0
    frames: int = 0


HostOrDeviceArray = Any  # numpy as `make_batch` gives it, jax.Array on a device and under jit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens padded to one shape, on the right, and the frames that they show.

    B rows, S tokens a row. Rows form G groups of equal size, in order, each with its own F bins of P patches (of C
    values): inference has one group, so that frames are padded least; training has a group a row, so that devices that
    split the rows exchange no frames. A bin holds up to M frames, one after the other.

    input_ids, labels: int32 (B, S).  position_ids: int32 (B, S, 3).  lengths: int32 (B,), valid tokens of each row.
    patches: float32 (G, F, P, C).  frame_hw: int32 (G, F, M, 2), each frame's height and width in patches; (0, 0) for
    none. Without visuals F is 0.
    vision_token_index: int32 (B, S), which merged patch stands at a token, counted through the padded array (F *
    P/4,) of
    the row's group; -1 for text.
    segment_ids: int32 (B, S), the sample in a row of several that a token belongs to, from 1 on; 0 for padding. None
    where every row is one sample.
    """

    input_ids: HostOrDeviceArray
    labels: HostOrDeviceArray
    position_ids: HostOrDeviceArray
    lengths: HostOrDeviceArray
    patches: HostOrDeviceArray
    frame_hw: HostOrDeviceArray
    vision_token_index: HostOrDeviceArray
    segment_ids: HostOrDeviceArray = None


def _every(*ranges: tuple[int, int, int]) -> tuple[int, ...]:
    """Sizes from ranges (first, last, step), each last included."""
    return tuple(size for first, last, step in ranges for size in range(first, last + 1, step))


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that batches are padded to, smallest first. Each combination that occurs is compiled once.

    patches: of a frame.  frames: of all samples of a batch together.  tokens: of a row.
    Neighbours differ by about an eighth, so that little is padding; sizes from 512 on are multiples of 64, those of
    full-size video of 128. 2304 patches and 9472 tokens hold 16 frames of 16:9 video at the default budget, with room
    for a prompt.
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
                raise InputError(f"Bucket sizes have to be positive and rising, but {name} are {sizes}.")


_MENDS = {
    "patches": "patches in a frame. Lower max_pixels",
    "frames": "frames in a batch. Lower n_frames, or put fewer samples into a batch",
    "tokens": "tokens in a sample. Lower n_frames, max_pixels or max_seq_len",
}


def bucket(buckets: Buckets, name: str, size: int) -> int:
    """The smallest bucket of `name` ("patches", "frames" or "tokens") that holds `size`.

    Raises:
        InputError: even the largest does not.
    """
    sizes = getattr(buckets, name)
    i = bisect.bisect_left(sizes, size)
    if i == len(sizes):
        raise InputError(f"{size} {_MENDS[name]}, or add a larger bucket than {sizes[-1]}.")
    return sizes[i]


def make_batch(
    examples: Sequence[Example], config: ModelConfig, buckets: Buckets | None = None, pad_id: int = 0
) -> Batch:
    """Pads examples to the smallest buckets that hold them all.

    Position ids count on through the padding. A batch without visuals has no frames and patches of no height, so
    that all such batches have one shape.

    Raises:
        InputError: there is no example, or one exceeds the largest bucket.
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
    # Frames and placeholders come in the same order: by row, and in a row by place.
    valid = np.arange(S) < lengths[:, None]
    placeholders = valid & np.isin(input_ids, (config.image_token_id, config.video_token_id))
    vision_token_index[placeholders] = _feature_index(frame_hw, patches.shape[1], config.vision)
    return Batch(input_ids, labels, position_ids, lengths, patches[None], frame_hw[None, :, None], vision_token_index)


def _pad_frames(examples: Sequence[Example], patch_dim: int, buckets: Buckets) -> tuple[np.ndarray, np.ndarray]:
    """Patches float32 (F, P, C) and frame_hw int32 (F, 2) of all examples."""
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
    """Height and width in patches of each of its frames, int32 (frames, 2)."""
    return np.repeat(example.grid_thw[:, 1:], example.grid_thw[:, 0], axis=0)


def _feature_index(frame_hw: np.ndarray, patches: int, vision: VisionConfig) -> np.ndarray:
    """Where the merged patches of all frames stand in the padded array, flattened: int32 (visual tokens,)."""
    features = np.arange(vision.num_tokens(patches))  # of a padded frame
    used = features < vision.num_tokens(frame_hw.prod(axis=1, keepdims=True))  # (F, features)
    return np.flatnonzero(used).astype(np.int32)
