"""How every program ends: a short message and an exit status instead of a traceback."""

import io
import sys
import warnings
from collections.abc import Callable

from tarsier_jax.errors import TarsierError


def run(main: Callable[[], int | None], traceback: bool = False) -> int:
    """Calls `main` and gives the exit status: its own, or 0; 1 after an error made for people, or about a file (not
    there, not ours, no room left on the disk); 130 after Ctrl-C.

    With `traceback` errors are raised as they are. Characters that stdout cannot encode are printed as escapes. Warnings
    about inputs are one line each.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _format_warning
    try:
        return main() or 0
    except (TarsierError, OSError) as error:
        if traceback:
            raise
        print(f"error: {_of_a_file(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if category is UserWarning:
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _of_a_file(error: OSError) -> str:
    if error.filename is None:
        return f"{error.strerror or error}. Make room on the disk, or choose another place to write to."
    return f"{error.filename}: {error.strerror}. Mend that, or choose another path."
