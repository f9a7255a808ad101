"""Serves a model with OpenAI's protocol: `python -m infer.serve --model CHECKPOINT`.

The server answers /v1/chat/completions with texts, images and videos. Without a key it listens on this machine only.
Local files and remote hosts are not read unless a flag allows them. See docs/serving.md.
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

from infer.bulk.config import mesh_sizes, start_engine
from infer.media import MediaLoader
from infer.network import KEY_VARIABLE, is_loopback, listen, read_key
from tarsier_jax.errors import InputError
from tarsier_jax.files import local_path
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.processing.processor import ProcessorOptions
from tarsier_jax.programs import add_model_flag, add_precision_flags, check_packages, prepare_process, run

_PACKAGES = ("starlette", "uvicorn", "pydantic", "prometheus_client", "httpx2")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infer.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flag(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 chooses a free one (default %(default)s)")
    parser.add_argument(
        "--api_key_file",
        type=local_path,
        help=f"file with the key that requests must have (default: the environment variable {KEY_VARIABLE})",
    )
    parser.add_argument("--media_root", type=local_path, help="directory below which file:// URLs are read")
    parser.add_argument(
        "--media_hosts", nargs="+", default=(), metavar="HOST", help="hosts whose http(s) URLs are fetched"
    )
    parser.add_argument("--slots", type=int, default=16, help="answers in progress at once (default %(default)s)")
    parser.add_argument("--queue", type=int, help="requests that wait for a slot (default: twice the slots)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode media (default %(default)s)")
    parser.add_argument("--n_frames", type=int, help="frames per request, unless it sets another number")
    parser.add_argument("--max_pixels", type=int, help="largest number of pixels of a frame or image")
    parser.add_argument(
        "--prompt_tokens", type=int, help="limit of a prompt (default: --n_frames of the largest frame)"
    )
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=SamplingOptions().max_new_tokens,
        help="limit of an answer, in tokens (default %(default)s)",
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a request (default %(default)s)")
    parser.add_argument(
        "--drain", type=float, default=60, help="seconds for requests after SIGTERM (default %(default)s)"
    )
    parser.add_argument("--mesh", default="", help="such as data=2,tensor=4 (default: all devices on the data axis)")
    add_precision_flags(parser)
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """Serves until a signal. Returns 0, and raises EngineError if the engine fails."""
    start = time.perf_counter()
    check_packages("infer.serve", "serve", *_PACKAGES)
    from infer.serve.app import make_app
    from infer.serve.connections import serve
    from infer.serve.prompts import PromptLimits
    from infer.serve.service import Service

    prepare_process()
    logger = logging.getLogger("infer.serve")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False
    _check_flags(args)
    key, options = read_key(args.api_key_file), _processor_options(args)
    sock = listen(args.host, args.port)  # before the model is loaded: it fails fast
    local = is_loopback(str(sock.getsockname()[0]))
    if key is None and not local:
        raise InputError(
            f"--host {args.host} is reachable from other machines, which needs a key. Pass --api_key_file, or set "
            f"{KEY_VARIABLE}."
        )
    _log(f"loading {args.model}")
    engine = start_engine(
        args.model,
        adapter=args.adapter,
        dtype=args.dtype,
        int8=args.int8,
        mesh=args.mesh,
        slots=args.slots,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.max_new_tokens,
        options=options,
        reuse_prefixes=True,
    )
    processor = engine.processor
    limits = PromptLimits(
        engine.config.prompt_tokens, args.max_new_tokens, processor.options, args.media_root is not None
    )
    name = Path(args.model).resolve().name if os.path.isdir(args.model) else args.model
    with MediaLoader(processor, workers=args.workers, root=args.media_root, hosts=args.media_hosts) as loader:
        service = Service(engine, loader, name, workers=args.workers, waiting=args.queue, seconds=args.timeout)
        app = make_app(service, limits, key=key, local=local)
        host, port = sock.getsockname()[:2]
        _log(
            f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1 after "
            f"{time.perf_counter() - start:.1f} s: {args.slots} slots, up to {service.frontend.capacity} requests, "
            f"prompts of {limits.prompt_tokens} tokens, answers of {limits.new_tokens}, "
            f"{'a key is required' if key else 'no key'}"
        )
        serve(service, app, sock, args.drain)
    return 0


def _check_flags(args: argparse.Namespace) -> None:
    """Raises InputError for values that would fail only after the model is loaded."""
    for name, least in (("queue", 0), ("workers", 1), ("max_new_tokens", 1), ("slots", 1), ("drain", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name} is {value}; it must be at least {least}.")
    if not args.timeout > 0:
        raise InputError(f"--timeout is {args.timeout}; it must be above 0.")
    if args.media_root is not None and not args.media_root.is_dir():
        raise InputError(f"--media_root {args.media_root} is not a directory.")
    mesh_sizes(args.mesh)


def _processor_options(args: argparse.Namespace) -> dict[str, int]:
    options = {name: value for name in ("n_frames", "max_pixels") if (value := getattr(args, name)) is not None}
    ProcessorOptions(**options)  # raises InputError
    return options


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    args = parse()
    sys.exit(run(lambda: main(args), args.traceback))
