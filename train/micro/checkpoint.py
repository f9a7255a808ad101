"""The embedded model before training: sizes, tokenizer texts, and the positions that its heads attend to at first."""

from collections.abc import Iterator

import numpy as np

from eval.shapes.annotations import GROUNDED_PROMPT, IMAGE_PROMPT, VIDEO_PROMPT
from eval.shapes.describe import describe, describe_frame, describe_grounded
from eval.shapes.questions import questions
from eval.shapes.script import draw_scene
from tarsier_jax.models.tarsier import Tarsier
from train.micro.attention_init import look, see_change
from train.untrained import UntrainedModel

_AROUND = (
    *((-1, 0, 0), (-1, 0, 1), (-1, 0, -1), (-1, 1, 0), (-1, -1, 0), (-2, 0, 0)),
    *((0, 0, -1), (0, -1, 0), (0, 0, 0)),
)
_NEIGHBOURS = ((0, 1), (1, 0), (0, -1), (-1, 0))
# Offsets that heads attend to at first, per layer and head: see `train.micro.attention_init`.
DECODER_OFFSETS = (_AROUND, _AROUND[:6])
VISION_OFFSETS = (_NEIGHBOURS, _NEIGHBOURS[:2])
_SCENES = 400  # whose texts train the tokenizer


def _initialize(model: Tarsier) -> None:
    look(model, DECODER_OFFSETS, VISION_OFFSETS)
    see_change(model)


def _texts() -> Iterator[str]:
    rng = np.random.default_rng(0)
    for _ in range(_SCENES):
        scene = draw_scene(rng)
        yield "system\nYou are a helpful assistant.user\nassistant\n Answer: ()\n"
        yield f"{VIDEO_PROMPT} {IMAGE_PROMPT} {GROUNDED_PROMPT}"
        yield describe(scene, rng)
        yield from (describe_frame(scene, frame) for frame in (0, scene.frames - 1))
        yield describe_grounded(scene, rng=rng)
        yield from (question.prompt() for question in questions(scene, rng))


MICRO = UntrainedModel(
    text={
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        # With Qwen2-VL's base of a million, RoPE could not separate three rows and columns of tokens. With 15, no
        # frequency would be slow enough to attend to a word of a question at any distance. Each of time, row and
        # column needs slow and fast frequencies, so the sections alternate. transformers 4 joins two copies of the
        # list and keeps counting in the second one; with nine sections the second one starts with time again.
        "rope_theta": 300.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [*[1] * 8, 0]},
    },
    vision={"depth": 2, "embed_dim": 64, "num_heads": 4},
    texts=_texts,
    # Two frames per temporal patch, as in Qwen2-VL: half as many tokens, and each one sees changes.
    preprocessor={"min_pixels": 84 * 84, "max_pixels": 84 * 112, "double_frames": False},
    initialize=_initialize,
)
