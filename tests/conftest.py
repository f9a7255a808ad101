"""Tests run on the CPU, in float32 at the highest precision; accelerators are not used.

All test processes and the programs that tests start share compiled programs in JAX_COMPILATION_CACHE_DIR. The Makefile
sets it to a directory that later sessions read again. Without it, the directory is temporary.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Each test process computes. More threads of PyTorch than cores wait for each other in loops that use the CPU.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # set in pytest's first process, which starts the workers
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tarsier_jax-xla-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import fsspec
import jax
import pytest
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  # the hook takes the checker by name and does not import its module

# The shapes and types in the annotations of the model code are checked at run time.
install_import_hook(["tarsier_jax.models", "tarsier_jax.generation"], "tests.typecheck.check")

from tarsier_jax.files import warn
from tests.devices import QUICK_CODEGEN

jax.config.update("jax_default_matmul_precision", "highest")
# Tests run a program for moments. The programs that they start as processes compile as users' programs do.
jax.config.update("jax_disable_most_optimizations", True)
with pytest.MonkeyPatch.context() as environment:
    environment.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {QUICK_CODEGEN}")
    jax.jit(lambda x: x + 1)(0)  # XLA reads the flags once, when it compiles the first program


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of programs go into a temporary home."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))


@pytest.fixture
def store() -> Iterator[Any]:
    """The object store of memory:// URLs."""
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()


@pytest.fixture(autouse=True)
def warnings_of_this_test() -> None:
    """`warn` issues a warning once per process; a test must not depend on the tests before it."""
    warn.cache_clear()
