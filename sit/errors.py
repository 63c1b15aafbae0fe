"""How a user's mistake is reported: one line, no traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake the user can mend. The message is one line that names the file, flag or value, and the mend."""


def door(main: Callable[..., object]) -> Callable[..., None]:
    """Wrap a script's ``main``: a :class:`UserError` becomes ``error: …`` on stderr and exit status 2."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run
