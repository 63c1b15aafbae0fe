"""``python -m sit.checkpoint``: tell what a checkpoint is, and convert between ours and the published layouts."""

from __future__ import annotations

from typing import Annotated

import tyro

from sit.checkpoint.arguments import Convert, ConvertVAE, Inspect
from sit.utils.cli import parse
from sit.utils.errors import entry_point

COMMANDS = (
    Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[ConvertVAE, tyro.conf.subcommand("convert-vae")]
)


@entry_point
def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = parse(COMMANDS, "python -m sit.checkpoint", arguments, description=__doc__)
    # heavy imports come once the flags are parsed
    if isinstance(options, ConvertVAE):
        from sit.checkpoint.ldm_vae import convert_vae

        print(f"wrote {convert_vae(options)}")
        return
    from sit.checkpoint.convert import convert, inspect

    print(f"wrote {convert(options)}" if isinstance(options, Convert) else inspect(options))
