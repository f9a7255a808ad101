"""Run by `make wheel` where only the wheel is installed: the package has its data files and works without a clone."""

from importlib.metadata import version
from importlib.resources import files

import tarsier_jax
from tarsier_jax.weights import EMBEDDED, EMBEDDED_CLIP

assert version("tarsier_jax") == tarsier_jax.__version__
assert files("tarsier_jax").joinpath("py.typed").is_file()
assert "site-packages" in str(EMBEDDED_CLIP)
video = {"type": "video", "video": {"video_file": str(EMBEDDED_CLIP)}}
question = {"type": "text", "text": "Describe the video in detail."}
model, processor = tarsier_jax.load(EMBEDDED)
sample = {"messages": [{"role": "user", "content": [video, question]}]}
(caption,) = tarsier_jax.generate(model, processor, [sample], max_new_tokens=96)
assert caption.startswith("The blue cross and the orange triangle collide."), caption
print(caption)
