"""The processor: converts samples in the annotation format to arrays for the model."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tarsier_jax.config import ModelConfig
from tarsier_jax.errors import CheckpointError, InputError
from tarsier_jax.processing.batch import Batch, Buckets, Example, make_batch
from tarsier_jax.processing.chat import CHATML, VICUNA, encode_messages, load_chat_template, load_tokenizer
from tarsier_jax.processing.formats import normalize_sample
from tarsier_jax.processing.frame_sampling import SAMPLERS, SamplingRules
from tarsier_jax.processing.image import Qwen2ImageProcessor, load_image_processor, read_json
from tarsier_jax.processing.image_files import is_animation
from tarsier_jax.processing.positions import insert_separators, rope_positions
from tarsier_jax.processing.prompt_rows import is_prompt_row, messages_of_prompt
from tarsier_jax.processing.sample import Visual, is_number, open_visuals, read_messages
from tarsier_jax.processing.square_image import ClipImageProcessor
from tarsier_jax.processing.video import kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNSUPPORTED_STEPS = ("do_crop", "do_padding", "do_resize")


@dataclasses.dataclass(frozen=True)
class ProcessorOptions:
    """Options of the user. The defaults are those of Tarsier2's default configuration.

    Attributes:
        n_frames: Frames per sample, shared by its videos.
        max_n_frames: Largest number of frames per sample if `fps` selects more than n_frames.
        max_pixels: Largest number of pixels of a frame or image, before rounding to whole patches.
        min_pixels: Smallest number of pixels of a frame or image, before rounding to whole patches.
        max_pixels_per_sample: Largest number of pixels of all frames together. A doubled frame counts twice.
        max_seq_len: Largest number of tokens per sample, including visual tokens.
        video_sampler: "v1" samples evenly with both ends, "v2" samples the middle of equal segments.
        force_frames_n_divisible: Divisor of the number of frames per video; black frames are added.
        double_frames: Whether every frame fills its own temporal patch, unless the checkpoint pairs frames
            (`Qwen2ImageProcessor`).
    """

    n_frames: int = 16
    max_n_frames: int = 256
    max_pixels: int = 460_800
    min_pixels: int = 0
    max_pixels_per_sample: int = 128 * 384 * 384
    max_seq_len: int = 16_384
    video_sampler: str = "v1"
    force_frames_n_divisible: int = 1
    double_frames: bool = True

    def __post_init__(self) -> None:
        for name in ("n_frames", "max_pixels", "max_pixels_per_sample", "max_seq_len", "force_frames_n_divisible"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.n_frames > self.max_n_frames:
            raise InputError(f"n_frames {self.n_frames} is above max_n_frames {self.max_n_frames}. Raise max_n_frames.")
        if not 0 <= self.min_pixels <= self.max_pixels:
            raise InputError(f"min_pixels {self.min_pixels} must be between 0 and max_pixels {self.max_pixels}.")
        if self.video_sampler not in SAMPLERS:
            raise InputError(f"video_sampler is {self.video_sampler!r}, but must be one of {', '.join(SAMPLERS)}.")


@dataclasses.dataclass(frozen=True)
class Processor:
    """Converts samples to examples, and examples to batches. The `load_processor` of a family creates one.

    Attributes:
        tokenizer: Tokenizer of the checkpoint.
        config: Configuration of the model.
        chat_template: Jinja template of the prompt.
        image: Converts frames to patches.
        eos_token_ids: Tokens that end an answer.
        options: Options of the user.
        buckets: Shapes that batches are padded to.
        sampling: Rules of the videos that the model was trained on.
    """

    tokenizer: "PreTrainedTokenizerBase"
    config: ModelConfig
    chat_template: str = CHATML
    image: Qwen2ImageProcessor | ClipImageProcessor = dataclasses.field(default_factory=Qwen2ImageProcessor)
    eos_token_ids: tuple[int, ...] = ()
    options: ProcessorOptions = ProcessorOptions()
    buckets: Buckets = dataclasses.field(default_factory=Buckets)
    sampling: SamplingRules = SamplingRules()

    def replace(self, **options: Any) -> "Processor":
        """Returns a processor with other options, such as n_frames=8.

        Raises:
            InputError: an option is unknown or invalid.
        """
        unknown = options.keys() - {field.name for field in dataclasses.fields(self.options)}
        if unknown:
            names = ", ".join(field.name for field in dataclasses.fields(self.options))
            raise InputError(f"The option {', '.join(sorted(unknown))} does not exist. The options are {names}.")
        return dataclasses.replace(self, options=dataclasses.replace(self.options, **options))

    def __call__(
        self, sample: Mapping[str, Any], training: bool = False, rng: np.random.Generator | None = None
    ) -> Example:
        """Decodes, resizes and tokenizes a sample, which does not change.

        Args:
            sample: A sample in the annotation format, in one that `normalize_sample` converts, or a row of the first
                Tarsier's annotation files (see `processing.prompt_rows`).
            training: Ends the last answer with its end-of-turn token, truncates text beyond max_seq_len, and makes
                sampler v2 random.
            rng: Random generator of sampler v2. Without it, every call draws other frames.

        Raises:
            InputError: the sample or one of its files cannot be used, or the sample is too long.
        """
        if is_prompt_row(sample):
            sample = {"messages": messages_of_prompt(sample, self.keeps_complete_prompts)}
        sample = normalize_sample(sample)
        messages, options = read_messages(sample), self.options
        if training and rng is None:
            rng = np.random.default_rng()
        visuals = open_visuals(
            messages,
            options.n_frames,
            options.max_n_frames,
            options.video_sampler,
            options.force_frames_n_divisible,
            rng if training else None,
            self.sampling,
        )
        pixel_values, grid_thw = self._patches(visuals, self._pixel_limits(sample, visuals))
        counts = iter(self.config.vision.num_tokens(grid_thw.prod(axis=1)))
        for item in (item for m in messages for item in m["content"] if item["type"] != "text"):
            item["num_vision_tokens"] = int(next(counts))
        input_ids, labels = encode_messages(
            self.tokenizer, self.chat_template, messages, self._placeholder_ids, training
        )
        input_ids, labels = insert_separators(input_ids, labels, grid_thw, self.config)
        n = self._truncated_length(input_ids, training)
        position_ids = rope_positions(input_ids[:n], grid_thw, self.config)
        frames = sum(visual.count for visual in visuals)
        cut = len(input_ids) - n
        selections = tuple(visual.selection for visual in visuals)
        return Example(input_ids[:n], labels[:n], pixel_values, grid_thw, position_ids, cut, frames, selections)

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Pads examples to buckets; see `make_batch`."""
        return make_batch(examples, self.config, self.buckets, self.pad_token_id)

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of an answer, without special tokens and surrounding white space."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    @property
    def double_frames(self) -> bool:
        """Whether every frame of a video fills its own temporal patch."""
        return self.options.double_frames and self.image.double_frames

    @property
    def keeps_complete_prompts(self) -> bool:
        """Whether the chat template leaves a question such as "USER: ... ASSISTANT: Answer: (" as it is."""
        return self.chat_template == VICUNA

    @property
    def largest_frame(self) -> int:
        """Number of patches of the largest frame."""
        vision = self.config.vision
        return max(min(vision.largest_frame(self.options.max_pixels), self.image.largest_frame), vision.smallest_frame)

    @property
    def pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad) if isinstance(pad, int) else next(iter(self.eos_token_ids), 0)

    @property
    def _placeholder_ids(self) -> tuple[int, int]:
        return self.config.image_token_id, self.config.video_token_id

    @property
    def _visual_ids(self) -> list[int]:
        separators = self.config.image_newline_id, self.config.image_new_id
        return [*self._placeholder_ids, *(id_ for id_ in separators if id_ is not None)]

    def _pixel_limits(self, sample: Mapping[str, Any], visuals: Sequence[Visual]) -> tuple[int, int]:
        """Returns min_pixels and max_pixels per frame, from the sample or the options, within the sample's budget."""
        own = sample.get("image_processing_config")
        own = _check_pixel_limits({} if own is None else own)
        low, high = own.get("min_pixels", self.options.min_pixels), own.get("max_pixels", self.options.max_pixels)
        if not 0 <= low <= high:
            raise InputError(f"image_processing_config: min_pixels {low} is not between 0 and max_pixels {high}.")
        T = self.config.vision.temporal_patch_size
        times = {"image": T, "video": T if self.double_frames else 1}
        num_frames = sum(visual.count * times[visual.kind] for visual in visuals)
        high = min(int(high), self.options.max_pixels_per_sample // max(num_frames, 1))
        return min(int(low), high), high

    def _patches(self, visuals: Sequence[Visual], limits: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns pixel_values and grid_thw of all visuals."""
        if not visuals:
            return np.zeros((0, self.config.vision.patch_dim), np.float32), np.zeros((0, 3), np.int32)
        parts, grids = [], []
        for visual in visuals:
            double = self.double_frames or visual.kind == "image"
            patches, grid = self.image.patch(visual.frames(), visual.count, limits, double, visual.clip.name)
            parts.append(patches)
            grids.append(grid)
        return parts[0] if len(parts) == 1 else np.concatenate(parts), np.stack(grids)

    def _truncated_length(self, input_ids: np.ndarray, training: bool) -> int:
        """Returns the number of tokens of a prompt after truncation to max_seq_len."""
        limit, visual = self.options.max_seq_len, np.isin(input_ids, self._visual_ids)
        if len(input_ids) <= limit:
            return len(input_ids)
        if training and not visual[limit:].any():
            return limit
        raise InputError(
            f"The sample has {len(input_ids)} tokens, {visual.sum()} of them visual, but max_seq_len is {limit}. Use "
            "fewer frames (n_frames) or smaller ones (max_pixels), or raise max_seq_len."
        )


def _check_pixel_limits(config: Any) -> dict[str, Any]:
    """Returns the limits in an image_processing_config.

    Raises:
        InputError: a value is invalid, or a step is not supported.
    """
    if not isinstance(config, Mapping):
        raise InputError(f'image_processing_config must be like {{"max_pixels": 100000}}, not {config!r:.200}.')
    unsupported = [key for key in _UNSUPPORTED_STEPS if config.get(key)]
    if unsupported:
        raise InputError(f"image_processing_config: {', '.join(unsupported)} is not supported. Remove it.")
    limits = {key: config[key] for key in ("min_pixels", "max_pixels") if config.get(key) is not None}
    for key, limit in limits.items():
        if not is_number(limit):
            raise InputError(f"image_processing_config: {key} must be a number, not {limit!r:.200}.")
    if limits.get("max_pixels", 1) < 1:
        raise InputError(f"image_processing_config: max_pixels must be at least 1, not {limits['max_pixels']}.")
    return limits


def media_sample(path: str | Path, prompt: str | None = None) -> dict[str, Any]:
    """Returns a sample with one media file and a prompt. An animation is a video.

    Args:
        path: A video, animation or image.
        prompt: The prompt; by default, it requests a detailed description.

    Raises:
        InputError: the ending of the name is not accepted.
    """
    kind = "image" if kind_of(path) == "image" and not is_animation(path) else "video"
    content = [
        {"type": kind, kind: {f"{kind}_file": str(path)}},
        {"type": "text", "text": prompt or f"Describe the {kind} in detail."},
    ]
    return {"messages": [{"role": "user", "content": content}], "task": f"{kind}/QA"}


def load_processor(directory: str | Path, config: ModelConfig) -> Processor:
    """Loads the processor of a Hugging Face directory of Tarsier2 or Qwen2-VL, with default options.

    Raises:
        CheckpointError: a file is missing or unreadable, or files contradict each other.
    """
    directory = Path(directory)
    tokenizer = load_tokenizer(directory)
    template = load_chat_template(directory)
    if template == CHATML:
        check_image_token(directory, tokenizer, "<|image_pad|>", config)
    image = load_image_processor(directory, config.vision)
    return Processor(tokenizer, config, template, image, eos_token_ids(directory, tokenizer))


def check_image_token(
    directory: Path, tokenizer: "PreTrainedTokenizerBase", image_token: str, config: ModelConfig
) -> None:
    """Raises CheckpointError if the tokenizer has another id for the placeholder of images than the configuration."""
    id_ = tokenizer.convert_tokens_to_ids(image_token)
    if id_ != config.image_token_id:
        raise CheckpointError(
            f"{directory / 'config.json'} has image token {config.image_token_id}, but the tokenizer beside it has "
            f"{image_token} as {id_}. The two come from different models: copy both from one."
        )


def eos_token_ids(directory: Path, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Returns the tokens that end an answer, from the first file that names some, else the tokenizer's."""
    config = read_json(directory / "config.json") or {}
    sources = (read_json(directory / "generation_config.json") or {}, config, config.get("text_config") or {})
    own: Any = tokenizer.eos_token_id
    ids = next((s["eos_token_id"] for s in sources if s.get("eos_token_id") is not None), own)
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (int(ids),)
