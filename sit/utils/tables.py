"""Tables as text: in Markdown, and aligned for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_RULES = {"l": "---", "r": "--:", "c": ":-:"}


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]], *, align: str = "") -> str:
    """A table in GitHub's Markdown, without a line break at its end.

    Args:
        header: the columns' names.
        rows: the cells, each written by ``str``; a ``|`` within one is escaped, a line break becomes a space.
        align: ``l``, ``r`` or ``c`` for each column, left where it ends early.

    Raises:
        ValueError: a row has more or fewer cells than the header, or ``align`` has another letter.
    """
    rules = [_RULES[_alignment(align, column)] for column in range(len(header))]
    lines = [_markdown_row(header), "|" + "|".join(rules) + "|"]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells and the header {len(header)}: {row}")
        lines.append(_markdown_row(row))
    return "\n".join(lines)


def text_table(rows: Iterable[Sequence[object]], *, align: str = "", gap: int = 2, indent: str = "") -> str:
    """A table in columns as wide as their longest cell, without a line break at its end or spaces at a line's.

    Args:
        rows: the cells, each written by ``str``; rows may end early. A header is a row like any other.
        align: ``l``, ``r`` or ``c`` for each column, left where it ends early.
        gap: spaces between columns.
        indent: what each line begins with.

    Raises:
        ValueError: ``align`` has another letter.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    columns = max(map(len, cells), default=0)
    widths = [max(len(row[column]) for row in cells if column < len(row)) for column in range(columns)]
    justify = {"l": str.ljust, "r": str.rjust, "c": str.center}
    how = [justify[_alignment(align, column)] for column in range(columns)]
    lines = []
    for row in cells:
        padded = [how[column](cell, widths[column]) for column, cell in enumerate(row)]
        lines.append((indent + (" " * gap).join(padded)).rstrip())
    return "\n".join(lines)


def _alignment(align: str, column: int) -> str:
    letter = align[column] if column < len(align) else "l"
    if letter not in _RULES:
        raise ValueError(f"`align={align}`: columns are aligned by l, r or c, not {letter}")
    return letter


def _markdown_row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(" ".join(str(cell).split("\n")).replace("|", r"\|") for cell in cells) + " |"
