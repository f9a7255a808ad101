"""Asks a judge about many predictions at once, with progress."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

from eval.judges.judge import Judge
from eval.predictions import Prediction

ResultT = TypeVar("ResultT")


def map_predictions(
    function: Callable[[Prediction], ResultT], predictions: Sequence[Prediction], judge: Judge, description: str
) -> list[ResultT]:
    """Applies a function that uses the judge to all predictions, `judge.concurrency` at once; returns the results.

    The first exception ends the calls that have not started, and is raised.
    """
    executor = ThreadPoolExecutor(judge.concurrency)
    try:
        futures = [executor.submit(function, prediction) for prediction in predictions]
        with tqdm(total=len(futures), desc=description, unit="sample", disable=not futures) as bar:
            for future in futures:
                future.add_done_callback(lambda _: bar.update())
            return [future.result() for future in futures]
    finally:
        executor.shutdown(cancel_futures=True)
