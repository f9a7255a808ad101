"""Command-line flags of judges."""

import argparse
from pathlib import Path

from eval.judges.cache import ReplyCache
from eval.judges.judge import Judge
from eval.judges.prompts import DEFAULT_PROMPTS, read_prompts
from eval.judges.usage import Prices
from eval.shapes.judge import RulesJudge
from tarsier_jax.errors import InputError
from tarsier_jax.files import cache_directory, local_path, source_text
from tarsier_jax.storage import local_source


def add_judge_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --judge and the flags of a judge."""
    parser.add_argument(
        "--judge", metavar="URL", help="endpoint with OpenAI's chat completions, such as http://localhost:8000/v1"
    )
    add_endpoint_flags(parser)


def add_endpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a language model as judge. Its key is in OPENAI_API_KEY or AZURE_OPENAI_API_KEY."""
    group = parser.add_argument_group("judge")
    group.add_argument(
        "--judge_model",
        metavar="NAME",
        help="default: the only model that the server lists, or else gpt-3.5-turbo-0125, the original's",
    )
    group.add_argument("--judge_api_version", metavar="VERSION", help="of Azure's API, for an endpoint of Azure")
    group.add_argument("--judge_temperature", type=float, metavar="T", help="default: the server's, as in the original")
    group.add_argument(
        "--judge_retries",
        type=int,
        metavar="N",
        help="how often a task is sent again after a reply that cannot be read (default: as the original, 9 for events "
        "and 0 for answers to questions)",
    )
    group.add_argument(
        "--judge_prompts", type=source_text, metavar="FILE", help="JSON file with other prompts; see docs/evaluation.md"
    )
    group.add_argument(
        "--judge_cache",
        type=local_path,
        metavar="FILE",
        help="local file for replies (default: in the user's cache directory)",
    )
    group.add_argument("--judge_concurrency", type=int, default=64, metavar="N", help="requests at once (%(default)s)")
    group.add_argument("--judge_timeout", type=float, default=60.0, metavar="SECONDS", help="per request (%(default)s)")
    group.add_argument(
        "--judge_prices",
        type=float,
        nargs=2,
        metavar=("IN", "OUT"),
        help="dollars per million tokens of requests and replies, to compute the cost",
    )


def judge_of(args: argparse.Namespace) -> Judge | None:
    """Returns the judge of `add_judge_flags`, or None without --judge.

    Raises:
        InputError: a flag is wrong, or the judge cannot be reached.
    """
    return None if args.judge is None else make_judge(args.judge, args)


def make_judge(name: str, args: argparse.Namespace) -> Judge:
    """Returns a judge.

    Args:
        name: "rules", a URL, or URL#MODEL, which takes precedence over --judge_model.
        args: The flags of `add_endpoint_flags`.

    Raises:
        InputError: a flag is wrong, or the judge cannot be reached.
    """
    if name == RulesJudge.name:
        return RulesJudge()
    try:
        from eval.judges.endpoint import EndpointJudge, EndpointOptions
    except ImportError as error:
        raise InputError(
            f"A language model as judge needs the package {error.name}: pip install -e '.[eval]'."
        ) from None
    url, _, model = name.partition("#")
    options = EndpointOptions(
        url=url,
        model=model or args.judge_model,
        api_version=args.judge_api_version,
        temperature=args.judge_temperature,
        retries=args.judge_retries,
        concurrency=args.judge_concurrency,
        timeout=args.judge_timeout,
        prices=None if args.judge_prices is None else Prices(*args.judge_prices),
    )
    prompts = read_prompts(Path(local_source(args.judge_prompts))) if args.judge_prompts else DEFAULT_PROMPTS
    return EndpointJudge(options, prompts, ReplyCache(args.judge_cache or _default_cache()))


def _default_cache() -> Path:
    if directory := cache_directory("judge"):
        return directory / "replies.sqlite"
    raise InputError("The user's cache directory is not writable. Pass --judge_cache FILE.")
