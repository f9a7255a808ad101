"""Asks a judge about many predictions at once, with progress."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar, cast

from tqdm import tqdm

from eval.judges.judge import Judge
from eval.predictions import Prediction

ResultT = TypeVar("ResultT")


def map_predictions(
    function: Callable[[Prediction], ResultT], predictions: Sequence[Prediction], judge: Judge, description: str
) -> list[ResultT]:
    """Applies a function that uses the judge to all predictions, `judge.concurrency` at once; returns the results.

    The first exception is raised, and no further call starts.
    """
    errors: list[BaseException] = []

    def call(prediction: Prediction) -> ResultT | None:
        if errors:
            return None
        try:
            return function(prediction)
        except BaseException as error:
            errors.append(error)
            return None

    with ThreadPoolExecutor(judge.concurrency) as executor:
        futures = [executor.submit(call, prediction) for prediction in predictions]
        is_instant = judge.concurrency == 1  # rules, or an estimate
        with tqdm(total=len(futures), desc=description, unit="sample", disable=is_instant) as bar:
            try:
                for _ in as_completed(futures):
                    bar.update()
            except BaseException as error:  # such as Ctrl-C
                errors.append(error)
    if errors:
        raise errors[0]
    return [cast(ResultT, future.result()) for future in futures]
