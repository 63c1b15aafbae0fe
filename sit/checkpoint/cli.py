"""``python -m sit.checkpoint``: tell what a checkpoint is, and convert between ours and the published layouts."""

from __future__ import annotations

from typing import Annotated

import tyro

from sit.checkpoint.arguments import Convert, Inspect
from sit.utils.cli import parse
from sit.utils.errors import entry_point

COMMANDS = Annotated[Convert, tyro.conf.subcommand("convert")] | Annotated[Inspect, tyro.conf.subcommand("inspect")]


@entry_point
def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = parse(COMMANDS, "python -m sit.checkpoint", arguments, description=__doc__)
    from sit.checkpoint.convert import convert, inspect  # heavy imports come once the flags are parsed

    print(f"wrote {convert(options)}" if isinstance(options, Convert) else inspect(options))
