"""The versions that the records of runs contain."""

import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("tarsier_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and of the packages that affect the numbers, and the commit of a git checkout."""
    numbers: dict[str, str | None] = {"python": sys.version.split()[0], "commit": _commit()}
    for package in _PACKAGES:
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            numbers[package] = None
    return numbers


def _commit() -> str | None:
    """Returns the commit of the checkout; None for an installed package, or without git."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = [shutil.which("git") or "git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        # Without close_fds Python spawns git; JAX, which has threads, warns of a fork.
        git = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, close_fds=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return git.stdout.strip()
