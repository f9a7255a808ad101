"""Prefix reuse: the content of slots, and the prompts that continue it.

The keys and values of an answer and its prompt remain in their slot until another prompt takes it. A prompt that
begins with the content of a slot continues it: the next turn of a conversation, or another question about a video. Only
its other tokens run, and its frames are not encoded again.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from tarsier_jax.config import ModelConfig
from tarsier_jax.processing.batch import Example

_SHORTEST = 64  # tokens of a text worth reusing
_UNKNOWN = -(2**63)  # not a content id


def content_ids(example: Example, config: ModelConfig) -> np.ndarray:
    """Returns one number per token, int64 (S,), equal for two prompts where their tokens and visuals are equal.

    The number of a text token is its id. That of a visual token is a digest of its image or video.
    """
    ids = example.input_ids.astype(np.int64)
    visual = np.flatnonzero(np.isin(ids, (config.image_token_id, config.video_token_id)))
    sizes = example.grid_thw.prod(axis=1)
    ends = np.cumsum(sizes)
    digests = [
        _digest(grid, example.pixel_values[end - size : end])
        for grid, size, end in zip(example.grid_thw, sizes, ends, strict=True)
    ]
    ids[visual] = np.repeat(np.array(digests, np.int64), config.vision.num_tokens(sizes))
    return ids


def reusable_length(content: np.ndarray) -> int:
    """Returns the number of tokens that a stored prefix must share with a prompt.

    The part that runs must be without visuals. A text must share half of its tokens, because fewer save little.
    """
    visual = np.flatnonzero(content < 0)
    return int(visual[-1]) + 1 if len(visual) else max(_SHORTEST, len(content) // 2)


def visual_prefix(content: np.ndarray) -> bytes | None:
    """Returns a digest of a prompt up to its last visual, or None for a text."""
    return hashlib.sha256(content[: reusable_length(content)].tobytes()).digest() if (content < 0).any() else None


class StoredPrefixes:
    """The content ids of the tokens whose keys and values are in slots."""

    def __init__(self, slots: int, size: int):
        self._ids = np.full((slots, size), _UNKNOWN, np.int64)

    def store(self, slot: int, content: np.ndarray) -> None:
        self._ids[slot, : len(content)] = content
        self._ids[slot, len(content) :] = _UNKNOWN

    def remove(self, slot: int) -> None:
        self._ids[slot] = _UNKNOWN

    def clear(self) -> None:
        self._ids[:] = _UNKNOWN

    def find(self, content: np.ndarray, among: Sequence[int] | None = None) -> tuple[int, int] | None:
        """Returns the slot that shares the longest prefix with a prompt, and the number of shared tokens.

        The last token of the prompt is not counted: decoding runs it. None if no prefix has its `reusable_length`.

        Args:
            content: The `content_ids` of the prompt.
            among: Slots; None for all.
        """
        required, prompt = reusable_length(content), content[:-1]
        if required > len(prompt):
            return None
        slots = np.arange(len(self._ids)) if among is None else np.array(among, int)
        slots = slots[self._ids[slots, required - 1] == prompt[required - 1]]
        lengths = [_common_length(self._ids[slot, : len(prompt)], prompt) for slot in slots]
        if max(lengths, default=0) < required:
            return None
        best = int(np.argmax(lengths))
        return int(slots[best]), lengths[best]


def _digest(grid: np.ndarray, patches: np.ndarray) -> int:
    """Returns a negative number: the ids of text tokens are not."""
    digest = hashlib.sha256(grid.tobytes())
    digest.update(np.ascontiguousarray(patches).data)
    return -1 - (int.from_bytes(digest.digest()[:8]) >> 2)


def _common_length(a: np.ndarray, b: np.ndarray) -> int:
    """Returns the number of equal elements at the start of two arrays of one length."""
    different = a != b
    return int(np.argmax(different)) if different.any() else len(a)
