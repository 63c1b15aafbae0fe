"""Tables in Markdown and as text."""

from __future__ import annotations

import pytest

from sit.utils.tables import markdown_table, text_table


def test_a_markdown_table_is_written_as_github_reads_it():
    table = markdown_table(["", "FID", "time"], [("a|b", 3.5, "1\n2"), ("c", "", 0)], align="lr")
    assert table == "|  | FID | time |\n|---|--:|---|\n| a\\|b | 3.5 | 1 2 |\n| c |  | 0 |"


def test_a_row_of_other_length_and_an_unknown_alignment_are_refused():
    with pytest.raises(ValueError, match="1 cells and the header 2"):
        markdown_table(["a", "b"], [("only one",)])
    for make in (lambda: markdown_table(["a"], [], align="x"), lambda: text_table([("a",)], align="x")):
        with pytest.raises(ValueError, match="`align=x`: .* not x"):
            make()


def test_columns_of_a_text_table_are_aligned_and_lines_end_with_what_they_say():
    rows = [("name", "count", "note"), ("long name", 7, ""), ("x",), ("y", 12345678, "last")]
    assert text_table(rows, align="lrc", indent="> ") == (
        "> name          count  note\n> long name         7\n> x\n> y          12345678  last"
    )
    assert text_table([("centered",), ("a",)], align="c", gap=1) == "centered\n   a"
    assert text_table([("a", "b"), ("ccc", "d")], gap=1) == "a   b\nccc d"
    assert text_table([]) == ""
