"""Command lines: tyro's parsing, with its mistakes told in one line as all others are."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from sit.utils.errors import UserError
from sit.utils.flags import command_of, put_plainly
from sit.utils.help_groups import in_groups
from sit.utils.signals import Signalled


def parse(
    kind: Any, program: str, words: Sequence[str] | None = None, *, default: Any = None, description: str | None = None
) -> Any:
    """The arguments of a command.

    Args:
        kind: the dataclass of its flags, or a union of those of its subcommands.
        program: what the help calls the command.
        words: the command line; None: this program's.
        default: an instance whose values are those of flags that are not given.
        description: what the help says first; None: the dataclass's docstring.

    Raises:
        UserError: the command line has a mistake.
        SystemExit: it asks for help, which is printed.
    """
    words = sys.argv[1:] if words is None else words
    plain = put_plainly(words, command_of(kind, words))
    if {"-h", "--help"} & set(words):
        description = kind.__doc__ if description is None else description
        kind, default = in_groups(kind, default)
    given = {} if default is None else {"default": default}
    with one_line_errors():
        return tyro.cli(kind, args=plain, prog=program, description=description, **given)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Within the block, what tyro says in a box of several lines before it exits becomes a :class:`UserError`.

    A UserError of a dataclass's ``__post_init__``, which tyro takes for a mistake in parsing as it does any ValueError,
    is raised as it was.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stop:
        if not stop.code or isinstance(stop, Signalled):
            raise
        raise _own_error(stop) or UserError(_essence(said.getvalue())) from None


def _own_error(error: BaseException | None) -> UserError | None:
    """The UserError that led to ``error``, if one did."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _essence(box: str) -> str:
    """The message of tyro's box on one line: what stands between its title and its first rule."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip("│ ")
        if line.startswith("╭") or (len(text) > 2 and set(text) <= set("─-")):
            parts.append([])  # the title is part of the frame, or, without box characters, a line with a rule below it
        elif text and not line.startswith("╰"):
            parts[-1].append(text)
    return " ".join(parts[1] if len(parts) > 1 else parts[0]) + "; --help lists the flags"
