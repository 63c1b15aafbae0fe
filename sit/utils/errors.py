"""How a user's mistake is reported: one line, no traceback.

The library names arguments in backquotes, ```batch_size` must be at least 1``, or with the value that they have,
```data=nowhere`: no such folder``. A command, whose flags they are, prints ``--batch-size`` and ``--data nowhere``.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
from collections.abc import Callable

from sit.utils.openmp import wait_briefly

_OF_THE_SYSTEM = {
    getattr(errno, name)
    for name in "EACCES EPERM EROFS ENOSPC EDQUOT EFBIG EIO ENAMETOOLONG ELOOP EMFILE ENFILE ESTALE".split()
}
"""what the operating system refuses for reasons outside of any program"""


class UserError(ValueError):
    """A mistake the user can mend. The message is one line that names the file, argument or value, and the mend.

    Attributes:
        status: what a command exits with.
    """

    status = 2


def with_flags(message: str) -> str:
    """The message as a command prints it: arguments in backquotes as flags, all on one line."""
    flags = re.sub(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`", _flag, message)
    return " ".join(flags.split())


def _flag(match: re.Match[str]) -> str:
    name, value = match.groups()
    flag = name.replace("_", "-")
    if value in ("True", "False"):
        return f"--{flag}" if value == "True" else f"--no-{flag}"
    return f"--{flag}" if value is None else f"--{flag} {value}"


def first_line(error: BaseException) -> str:
    """The first line of what a library's error says; its class where it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0].strip() if said else type(error).__name__


def entry_point(main: Callable[..., object]) -> Callable[..., None]:
    """Wrap a command's ``main``: a :class:`UserError` becomes ``error: …`` on stderr and its exit status, 2.

    So does a file that the system doesn't let it read or write, wherever that is met. Before all,
    :func:`sit.utils.openmp.wait_briefly`.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        wait_briefly()
        try:
            main(*args, **kwargs)
        except UserError as error:
            print(f"error: {with_flags(str(error))}", file=sys.stderr)
            sys.exit(error.status)
        except OSError as error:
            if error.errno not in _OF_THE_SYSTEM or not isinstance(error.filename, (str, bytes, os.PathLike)):
                raise
            print(f"error: {os.fsdecode(error.filename)}: {error.strerror}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run
