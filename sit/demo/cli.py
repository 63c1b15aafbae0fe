"""The command line of ``python -m sit.demo``."""

from __future__ import annotations

from sit.demo.arguments import Arguments
from sit.utils.cli import parse
from sit.utils.errors import entry_point


@entry_point
def main() -> None:
    arguments = parse(Arguments, "python -m sit.demo")
    from sit.demo.page import main as open_page  # heavy imports come once the flags are parsed

    arguments.threads.use()
    open_page(arguments)
