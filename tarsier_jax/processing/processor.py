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
from tarsier_jax.processing.frame_sampling import SamplingRules
from tarsier_jax.processing.image import Qwen2ImageProcessor, load_image_processor, read_json
from tarsier_jax.processing.image_files import is_animation
from tarsier_jax.processing.options import ProcessorOptions
from tarsier_jax.processing.positions import insert_separators, rope_positions
from tarsier_jax.processing.prompt_rows import is_prompt_row, messages_of_prompt
from tarsier_jax.processing.sample import read_messages
from tarsier_jax.processing.square_image import ClipImageProcessor
from tarsier_jax.processing.video import kind_of
from tarsier_jax.processing.visuals import VisualInputs, VisualStage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        messages, limits = self.read(sample)
        if training and rng is None:
            rng = np.random.default_rng()
        return self.encode(messages, self.visual_stage(messages, limits, rng if training else None), training)

    def read(self, sample: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Any]:
        """Returns the checked messages of a sample and its image_processing_config. `sample` does not change.

        Raises:
            InputError: a message or item is malformed.
        """
        if is_prompt_row(sample):
            sample = {"messages": messages_of_prompt(sample, self.keeps_complete_prompts)}
        sample = normalize_sample(sample)
        return read_messages(sample), sample.get("image_processing_config")

    @property
    def visual_stage(self) -> VisualStage:
        """The part of the processor that decodes and patchifies images and videos. It can run in another process."""
        return VisualStage(self.image, self.config.vision, self.options, self.sampling)

    def encode(self, messages: Sequence[Mapping[str, Any]], visuals: VisualInputs, training: bool = False) -> Example:
        """Tokenizes messages, the output of `read`, around their images and videos, the output of `visual_stage`.

        Raises:
            InputError: the chat template rejects the messages, or the sample is too long.
        """
        messages = _with_token_counts(messages, self.config.vision.num_tokens(visuals.grid_thw.prod(axis=1)))
        input_ids, labels = encode_messages(
            self.tokenizer, self.chat_template, messages, self._placeholder_ids, training
        )
        input_ids, labels = insert_separators(input_ids, labels, visuals.grid_thw, self.config)
        n = self._truncated_length(input_ids, training)
        return Example(
            input_ids[:n],
            labels[:n],
            visuals.pixel_values,
            visuals.grid_thw,
            rope_positions(input_ids[:n], visuals.grid_thw, self.config),
            num_truncated=len(input_ids) - n,
            frames=visuals.frames,
            selections=visuals.selections,
        )

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Pads examples to buckets; see `make_batch`."""
        return make_batch(examples, self.config, self.buckets, self.pad_token_id)

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of an answer, without special tokens and surrounding white space."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    @property
    def double_frames(self) -> bool:
        """Whether every frame of a video fills its own temporal patch."""
        return self.visual_stage.double_frames

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


def _with_token_counts(messages: Sequence[Mapping[str, Any]], counts: np.ndarray) -> list[dict[str, Any]]:
    """Returns the messages with the number of tokens of each image and video as its num_vision_tokens."""
    numbers = iter(counts.tolist())

    def counted(item: Mapping[str, Any]) -> Mapping[str, Any]:
        return item if item["type"] == "text" else {**item, "num_vision_tokens": next(numbers)}

    return [{**message, "content": [counted(item) for item in message["content"]]} for message in messages]


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
