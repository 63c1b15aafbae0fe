"""Command lines: tyro's parsing, with its mistakes told in one line as all others are."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

from sit.errors import UserError


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Within the block, what tyro says in a box of several lines before it exits becomes a :class:`UserError`."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_essence(said.getvalue())) from None


def _essence(box: str) -> str:
    """The message of tyro's box: what stands above its first rule, on one line."""
    lines = []
    for line in box.splitlines():
        text = line.strip("│╭╮╰╯ ")
        if line.startswith(("╭", "╰")):
            continue
        if set(text) == {"─"}:
            break
        lines.append(text.strip())
    return " ".join(lines) + "; --help lists the flags"
