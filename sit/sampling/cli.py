"""sample.py's command line."""

from __future__ import annotations

from sit.sampling.arguments import Arguments
from sit.utils.cli import parse
from sit.utils.errors import entry_point
from sit.utils.program import program


@entry_point
def main() -> None:
    arguments = parse(Arguments, program("sample"))
    from sit.sampling.run import sample  # the heavy imports come once the flags are parsed
    from sit.utils.device import leave_processes

    arguments.threads.use()
    try:
        sample(arguments)
    finally:
        leave_processes()
