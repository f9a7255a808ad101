"""Installs the library, `tarsier_jax`. The programs in convert, infer and their neighbours run from a checkout."""

from setuptools import find_packages, setup

EVAL = ["imageio[ffmpeg]>=2.34"]  # writes clips
INT8 = ["qwix>=0.1.8,<0.2"]
RAY = ["ray[data]>=2.53,<2.64"]  # 2.64 takes away the flag that bounds retries
TRAIN = [*EVAL, "optax>=0.2.5", "ml-collections>=1.0", "absl-py>=2", "tensorboardX>=2.6"]

setup(
    name="tarsier_jax",
    version="0.1.0",
    description="Tarsier video-description models in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["tarsier_jax", "tarsier_jax.*"]),
    package_data={"tarsier_jax": ["embedded/*", "embedded/tarsier2-micro/*"]},
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
        "demo": [],  # the library is enough
        "eval": EVAL,
        "int8": INT8,
        "ray": RAY,
        "train": TRAIN,
        # jax[tpu] brings the TPU compiler, which needs no TPU.
        "test": [
            *TRAIN,
            *INT8,
            *RAY,
            "pyarrow>=15",
            "decord2>=3.4",  # the original's reader, in benchmarks
            "jax[tpu]",
            "torch==2.13.0",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "pyright>=1.1.400",
        ],
    },
)
