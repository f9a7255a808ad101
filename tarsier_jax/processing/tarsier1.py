"""The processor of the first Tarsier."""

from pathlib import Path
from typing import cast

from tarsier_jax.config import ClipVisionConfig, ModelConfig
from tarsier_jax.processing.batch import Buckets
from tarsier_jax.processing.chat import VICUNA, load_tokenizer, template_files
from tarsier_jax.processing.frame_sampling import SamplingRules
from tarsier_jax.processing.processor import Processor, ProcessorOptions, check_image_token, eos_token_ids
from tarsier_jax.processing.square_image import load_square_processor


def load_processor(directory: str | Path, config: ModelConfig) -> Processor:
    """Loads the processor of a Hugging Face directory, with the options of the original: 8 frames.

    The chat template is a file with the ending .jinja, if there is one, or `VICUNA`. A template in
    tokenizer_config.json is that of the model from which the decoder was trained, which the original ignores.

    Raises:
        CheckpointError: a file is missing or unreadable, or files contradict each other.
    """
    directory, vision = Path(directory), cast(ClipVisionConfig, config.vision)
    tokenizer = load_tokenizer(directory)
    check_image_token(directory, tokenizer, "<image>", config)
    return Processor(
        tokenizer=tokenizer,
        config=config,
        chat_template=next(template_files(directory), VICUNA),
        image=load_square_processor(directory, vision),
        eos_token_ids=eos_token_ids(directory, tokenizer),
        options=ProcessorOptions(n_frames=8),
        buckets=Buckets(patches=(vision.num_patches,)),  # all frames have this size
        sampling=SamplingRules(repeat_frames=True, floor_times=True),
    )
