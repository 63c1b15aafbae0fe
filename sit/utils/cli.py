"""Command lines: tyro's parsing, with its mistakes told in one line as all others are."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

from sit.utils.errors import UserError


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
    """The message of tyro's box on one line: what stands between its title and its first rule."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip("│ ")
        if line.startswith("╭") or (len(text) > 2 and set(text) <= set("─-")):
            parts.append([])  # the title is part of the frame, or, without box characters, a line with a rule below it
        elif text and not line.startswith("╰"):
            parts[-1].append(text)
    return " ".join(parts[1] if len(parts) > 1 else parts[0]) + "; --help lists the flags"
