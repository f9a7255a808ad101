"""Benchmarks. A benchmark is one record in `BENCHMARKS`."""

import argparse
import difflib
from collections.abc import Sequence

from eval.benchmarks.benchmark import Benchmark
from eval.benchmarks.captions import DREAM, MSR_VTT_CAPTION, MSVD_CAPTION, VATEX_CAPTION
from eval.benchmarks.multiple_choice import EGOSCHEMA, FAVOR_BENCH, MVBENCH, NEXT_QA, TVBENCH, VIDEO_MME
from eval.benchmarks.open_questions import ANET_QA, MSR_VTT_QA, MSVD_QA, TGIF_QA
from eval.benchmarks.shapes import SHAPES, SHAPES_QA
from tarsier_jax.errors import InputError

_CAPTION = (MSVD_CAPTION, MSR_VTT_CAPTION, VATEX_CAPTION)
_MC_QA = (NEXT_QA, EGOSCHEMA, MVBENCH, VIDEO_MME)
_OE_QA = (MSVD_QA, MSR_VTT_QA, TGIF_QA, ANET_QA)
BENCHMARKS = (DREAM, *_CAPTION, *_MC_QA, *_OE_QA, TVBENCH, FAVOR_BENCH, SHAPES, SHAPES_QA)
# The original's groups. The last four benchmarks are in no group of the original, not even in `all`.
GROUPS: dict[str, tuple[Benchmark, ...]] = {
    "dream": (DREAM,),
    "caption": _CAPTION,
    "mc_qa": _MC_QA,
    "oe_qa": _OE_QA,
    "all": (DREAM, *_CAPTION, *_MC_QA, *_OE_QA),
}
_BY_NAME = {**{benchmark.name: (benchmark,) for benchmark in BENCHMARKS}, **GROUPS}

__all__ = ["BENCHMARKS", "GROUPS", "Benchmark", "add_benchmarks_flag", "select"]


def select(names: Sequence[str]) -> list[Benchmark]:
    """Returns the benchmarks of names and groups, each once, in the order of their first mention.

    Raises:
        InputError: a name is unknown.
    """
    return list({benchmark.name: benchmark for name in names for benchmark in _lookup(name)}.values())


def add_benchmarks_flag(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds --benchmarks, a list of names for `select`. An unknown name ends the program with exit status 2."""
    parser.add_argument(
        "--benchmarks", nargs="+", required=required, type=_known_name, metavar="NAME", help=", ".join(_BY_NAME)
    )


def _lookup(name: str) -> tuple[Benchmark, ...]:
    if benchmarks := _BY_NAME.get(name.lower()):
        return benchmarks
    close = difflib.get_close_matches(name.lower(), _BY_NAME)
    remedy = f"Use {' or '.join(close)} if you mean that" if close else f"The names are {', '.join(_BY_NAME)}"
    raise InputError(f"There is no benchmark {name}. {remedy}.")


def _known_name(name: str) -> str:
    try:
        _lookup(name)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name
