"""Code shared by all programs: process settings, common flags, and errors as one line and an exit status."""

import argparse
import atexit
import contextlib
import dataclasses
import errno
import gc
import importlib.util
import io
import os
import select
import sys
import warnings
from collections.abc import Callable
from typing import Any, Self, TextIO

import jax

from tarsier_jax.errors import InputError, TarsierError
from tarsier_jax.files import cache_directory, source_text
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.weights import EMBEDDED

_PIPE_CLOSED = 141  # exit status after SIGPIPE

_REMEDIES = {
    errno.ENOSPC: "Make room on the disk, or choose another place to write to.",
    errno.EDQUOT: "Your quota is used up: remove files, or choose another place to write to.",
    errno.EACCES: "Check its permissions, or choose another path.",
    errno.EPERM: "Check its permissions, or choose another path.",
    errno.EROFS: "Choose a path on a disk that can be written.",
    errno.ENOENT: "Check the path.",
    errno.EISDIR: "Pass the path of a file.",
    errno.ENOTDIR: "A part of the path is a file: choose another path.",
    errno.EEXIST: "Remove it, or choose another path.",
    errno.ENAMETOOLONG: "Choose a shorter path.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n), or use fewer workers.",
    errno.ENFILE: "The machine has too many open files: end other programs, or use fewer workers.",
    errno.ENOMEM: "Free memory, or use a machine with more memory.",
    errno.EIO: "The disk or the network file system fails: check it, then run again.",
    errno.ESTALE: "The network file system was mounted again: start the program again.",
}


def run(main: Callable[[], int | None], traceback: bool = False) -> int:
    """Calls `main` and returns the exit status of the program.

    The status is that of `main`, or 0; 1 after a `TarsierError` or `OSError`, whose message is printed; 130 after
    Ctrl-C; 141, without a message, when the reader of stdout or stderr has exited (`| head -1`). Characters that stdout
    cannot encode are printed as escapes, and warnings are printed as one line each.

    Args:
        main: The program.
        traceback: Raise errors instead of printing their message.
    """
    warnings.formatwarning = _format_warning
    gc.freeze()  # collections would visit all of JAX, for half a second at exit
    atexit.register(gc.freeze)
    try:
        _prepare_streams()
        status = main() or 0
        sys.stdout.flush()
        return status
    except (TarsierError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _drop_closed_pipes():
            return _PIPE_CLOSED
        if traceback:
            raise
        print(f"error: {_of_a_file(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _prepare_streams() -> None:
    """Makes stdout print characters outside its encoding, such as parts of a file's name, as escapes.

    Raises:
        InputError: stdout is closed (`>&-`). Python would discard the output and reuse its descriptor for a file.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for the rest of the process
    if sys.stdout is None:
        raise InputError("The standard output is closed. Redirect it to a file or to /dev/null.")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_closed_pipes() -> bool:
    """Redirects stdout and stderr to /dev/null if their reader has exited. Returns whether one was redirected."""
    closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed_pipe(stream)]
    for stream in closed:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())  # otherwise the interpreter fails again when it flushes at exit
        os.close(null)
    return bool(closed)


def _is_closed_pipe(stream: TextIO) -> bool:
    with contextlib.suppress(OSError, ValueError):  # no descriptor
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if category is UserWarning:
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _of_a_file(error: OSError) -> str:
    if error.errno is None:  # raised by a library, with its own message
        return str(error)
    if error.errno == errno.ENOENT and error.filename is None:
        return f"{error.strerror}. The current directory may have been removed: change to one that exists."
    name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    remedy = _REMEDIES.get(error.errno, "Choose another path." if name else "Run the program again.")
    return f"{name}{error.strerror}. {remedy}"


def prepare_process() -> None:
    """Stores compiled programs in JAX_COMPILATION_CACHE_DIR, or else in the user's cache directory.

    Only the first run on a machine compiles. Small programs are stored too, since a start runs dozens of them, unless
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS sets a limit. The advice of transformers to install PyTorch is turned
    off, since the programs do not use it.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR") and (directory := cache_directory("xla")):
        jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:  # JAX's default is a second
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def check_packages(program: str, extra: str, *packages: str) -> None:
    """Raises InputError if packages that a program needs, those of an extra of setup.py, are not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(f"{program} needs {', '.join(missing)}: pip install -e '.[{extra}]'.")


def add_model_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --model and --adapter, which are the same in every program."""
    parser.add_argument(
        "--model",
        type=source_text,
        default=EMBEDDED,
        help="checkpoint directory (Hugging Face or converted) or hub id (default %(default)s, the small model in the "
        "package, which describes only moving shapes)",
    )
    parser.add_argument(
        "--adapter", type=source_text, metavar="DIR", help="LoRA adapter in PEFT's format that is merged into the model"
    )


def add_precision_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --dtype, and those of `add_int8_flags`."""
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add_int8_flags(parser)


def add_int8_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --int8 and --w8a8, whose value `args.int8` is an `Int8` of `weights.quantize`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--int8", action="store_true", help="store the weights of the decoder's layers in int8")
    group.add_argument(
        "--w8a8",
        action="store_const",
        const="w8a8",
        dest="int8",
        help="the same, and round the inputs of their products to int8: faster prefill, less exact",
    )


def add_sampling_flags(parser: argparse.ArgumentParser, seed_help: str = "seed of the random draws") -> None:
    """The flags of `SamplingOptions`, one per field."""
    options = SamplingOptions()
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max_new_tokens", type=int, default=options.max_new_tokens, help="limit of an answer, in tokens"
    )
    group.add_argument(
        "--temperature", type=float, default=options.temperature, help="0 is greedy (default %(default)s)"
    )
    group.add_argument("--top_k", type=int, default=options.top_k, help="sample from this many tokens; 0 from all")
    group.add_argument(
        "--top_p", type=float, default=options.top_p, help="sample from tokens of this total probability"
    )
    group.add_argument("--repetition_penalty", type=float, default=options.repetition_penalty, help="1 is no penalty")
    group.add_argument("--seed", type=int, default=options.seed, help=seed_help)
    group.add_argument("--stop", nargs="+", default=(), metavar="TEXT", help="an answer ends before any of these texts")


def read_sampling_flags(args: argparse.Namespace) -> SamplingOptions:
    """Returns the options of `add_sampling_flags`. Raises InputError."""
    values: dict[str, Any] = {field.name: getattr(args, field.name) for field in dataclasses.fields(SamplingOptions)}
    return SamplingOptions(**{**values, "stop": tuple(args.stop)})


def resolve_dtype(dtype: str, platform: str | None = None) -> str:
    """Returns the dtype for the value of --dtype.

    "auto" is bfloat16 on accelerators and float32 on CPUs, which compute bfloat16 slowly.

    Args:
        dtype: "auto", "float32" or "bfloat16".
        platform: "cpu", "gpu" or "tpu"; JAX's default backend when None.
    """
    if dtype != "auto":
        return dtype
    return "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"


class Compilations:
    """Counts the programs that XLA compiles in the block.

    Attributes:
        count: Number of compiled programs.
    """

    _EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self.count = 0

    def _count_event(self, event: str, *_: Any, **__: Any) -> None:
        self.count += event == self._EVENT

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._count_event)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._count_event)
