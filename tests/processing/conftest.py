"""Small inputs: a checkpoint's processor files, and videos whose frames encode their number."""

import json
from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tarsier_jax.config import ModelConfig, Qwen2VisionConfig, TextConfig
from tarsier_jax.processing.processor import Processor, load_processor

DATA = Path(__file__).parent.parent / "data"
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


@pytest.fixture(scope="session")
def tables() -> dict:
    """The outputs of the original processor; see `frame_formula` and `prompt_format` in the file."""
    return json.loads((DATA / "upstream_tables.json").read_text())


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    ids = {token: 256 + i for i, token in enumerate(SPECIAL)}
    return ModelConfig(
        text=TextConfig(vocab_size=263),
        vision=Qwen2VisionConfig(),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory with the processor's files of a Tarsier2 checkpoint and a byte tokenizer of 263 tokens."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    )
    auto_map = {"AutoConfig": "modeling_tarsier.LlavaConfig", "AutoTokenizer": "tokenization.Evil"}
    write_json(directory / "config.json", {"model_type": "llava", "auto_map": auto_map, "image_token_index": 261})
    sizes = {"min_pixels": 3136, "max_pixels": 12845056}
    write_json(
        directory / "preprocessor_config.json",
        {"size": sizes, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "resample": 3},
    )
    return directory


@pytest.fixture
def processor(checkpoint: Path, config: ModelConfig) -> Processor:
    return load_processor(checkpoint, config)


@pytest.fixture(scope="session")
def render(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a video of 40 frames of 64 x 48 pixels, 8 per second. Frame i is grey with the brightness 20 + 5 i."""
    directory = tmp_path_factory.mktemp("videos")

    def write(name: str, *arguments: str) -> Path:
        path = directory / name
        if not path.exists():
            writer = imageio_ffmpeg.write_frames(
                str(path), (64, 48), fps=8, macro_block_size=1, output_params=list(arguments), quality=9
            )
            writer.send(None)
            for i in range(40):
                writer.send(np.full((48, 64, 3), 20 + 5 * i, np.uint8).tobytes())
            writer.close()
        return path

    return write


@pytest.fixture
def mp4(render: Callable[..., Path]) -> Path:
    return render("clip.mp4", "-movflags", "faststart", "-g", "10")


def frame_numbers(frames: list[Image.Image]) -> list[int]:
    """Which frames of a video from `render` these are."""
    return [round((float(np.asarray(frame).mean()) - 20) / 5) for frame in frames]


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


def formula_frame(width: int, height: int, t: int) -> Image.Image:
    """Frame t of the tables' `frame_formula`."""
    y, x, c = np.mgrid[:height, :width, :3]
    return Image.fromarray(((3 * x + 5 * y + 70 * c + 11 * t + (x * y) // 64) % 256).astype(np.uint8))


def user(*items: dict | str) -> dict:
    """A sample of one user message. Strings become text items."""
    content = [{"type": "text", "text": item} if isinstance(item, str) else item for item in items]
    return {"messages": [{"role": "user", "content": content}]}


def video_item(*frames: Image.Image, **keys: object) -> dict:
    return {"type": "video", "video": {"frames": list(frames), **keys}}
