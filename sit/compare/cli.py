"""``python -m sit.compare RUN RUN … --out FOLDER``, and ``python -m sit.compare curves …``."""

from __future__ import annotations

import shlex
import sys

from sit.compare.arguments import Arguments, CurvesArguments
from sit.utils.cli import parse
from sit.utils.errors import entry_point


@entry_point
def main() -> None:
    """Draw curves if the first word is ``curves``, else compare."""
    if sys.argv[1:2] == ["curves"]:
        wanted = parse(CurvesArguments, "python -m sit.compare curves", sys.argv[2:])
        from sit.compare.curves import write_curves  # heavy imports come once the flags are parsed

        folder = write_curves(wanted, "python -m sit.compare " + shlex.join(sys.argv[1:]))
        print(f"curves: {folder / 'README.md'}")
        return
    arguments = parse(Arguments, "python -m sit.compare")
    from sit.compare.compare import compare
    from sit.utils.device import leave_processes

    arguments.threads.use()
    try:
        folder = compare(arguments)
    finally:
        leave_processes()
    if folder is not None:
        print(f"report: {folder / 'README.md'}")
