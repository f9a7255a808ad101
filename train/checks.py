"""Checks of configuration values. Messages start with the field's name; `train.config` adds the prefix of its key."""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tarsier_jax.errors import InputError

_FLOAT16 = re.compile(r"(f|fp|float)16|half")


def check(options: Any, names: Sequence[str], accepts: Callable[[Any], bool], accepted: str) -> None:
    """Checks the fields `names` of a dataclass. `accepted` describes the values for which `accepts` is true.

    Raises:
        InputError: names the first field whose value is not accepted.
    """
    for name in names:
        value = getattr(options, name)
        if not accepts(value):
            raise InputError(f"{name} is {value!r}, but must be {accepted}.")


def check_at_least(options: Any, least: int, *names: str) -> None:
    """Checks that numbers are finite and not below `least`. Raises InputError."""
    check(options, names, lambda value: least <= value < math.inf, f"at least {least}")


def check_choice(options: Any, name: str, choices: Sequence[str]) -> None:
    """Checks that a field is one of `choices`. Raises InputError, which names the nearest choice."""
    value = getattr(options, name)
    if value not in choices:
        close = difflib.get_close_matches(value.lower(), choices, 1, cutoff=0.5)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise InputError(f"{name} is {value!r}, but must be one of {', '.join(choices)}.{hint}")


def check_dtype(options: Any, name: str, *more: str) -> None:
    """Checks that a field is float32, bfloat16 or one of `more`. Raises InputError."""
    value = getattr(options, name)
    if _FLOAT16.fullmatch(value.lower()):
        raise InputError(
            f"{name} is {value!r}, but float16 is not supported: small values vanish in it without loss scaling. "
            "Choose bfloat16."
        )
    check_choice(options, name, (*more, "float32", "bfloat16"))


def first_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Returns the first key whose values differ, or that only one of the mappings has; None if they are equal."""
    return next((key for key in {**before, **after} if before.get(key) != after.get(key)), None)
