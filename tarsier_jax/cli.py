"""How every program ends: a short message and an exit status instead of a traceback."""

import sys
from collections.abc import Callable

from tarsier_jax.errors import TarsierError


def run(main: Callable[[], int | None], traceback: bool = False) -> int:
    """Calls `main` and gives the exit status: its own, or 0; 1 after an error made for people; 130 after Ctrl-C.

    With `traceback` errors are raised as they are.
    """
    try:
        return main() or 0
    except TarsierError as error:
        if traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
