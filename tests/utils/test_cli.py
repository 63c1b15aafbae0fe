"""Mistakes on the command line are told in one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
import tyro

from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError


@dataclass
class Arguments:
    needed: str
    number: int = 1
    choice: Literal["this one", "that one"] = "this one"

    def __post_init__(self) -> None:
        if self.number < 0:
            raise UserError(f"`number={self.number}` is negative")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "Missing from .*--needed"),
        (
            ["--needed", "a", "--number", "many"],
            "^Error parsing --number: invalid literal [^;]*'many'; --help lists the flags$",
        ),
        (["--needed", "a", "--choice", "none"], r"invalid choice 'none' for argument '--choice'. Expected one of"),
        (["--needed", "a", "--unknown", "3"], "Unrecognized options: --unknown, 3"),
    ],
)
def test_one_line(arguments, words, capsys):
    with pytest.raises(UserError, match=words) as told, one_line_errors():
        tyro.cli(Arguments, args=arguments)
    message = str(told.value)
    assert "\n" not in message and not set(message) & set("│╭╰─") and capsys.readouterr().err == ""


def test_the_errors_of_a_dataclass_are_raised_as_they_are():
    with pytest.raises(UserError, match="^`number=-1` is negative$"), one_line_errors():
        tyro.cli(Arguments, args=["--needed", "a", "--number", "-1"])


def test_what_is_right_and_what_is_help_pass_through(capsys):
    with one_line_errors():
        assert tyro.cli(Arguments, args=["--needed", "a"]).needed == "a"
    with pytest.raises(SystemExit) as stop, one_line_errors():
        tyro.cli(Arguments, args=["--help"])
    assert not stop.value.code and "--needed" in capsys.readouterr().out
