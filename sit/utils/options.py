"""Names with options on the command line: ``name:option=value:option=value``, as mixers and ``none`` (pixels) have."""

from __future__ import annotations

from collections.abc import Callable, Collection
from inspect import Parameter, signature
from typing import Any

from sit.utils.errors import UserError
from sit.utils.reading import yaml_scalar

_KINDS = {
    bool: ("true or false", (bool,)),
    int: ("an integer", (int,)),
    float: ("a number", (int, float)),
    str: ("a word", (str,)),
}
"""what an option may be, in words and as types of YAML, by the type of its default"""


def parse_entry(entry: str, what: str) -> tuple[str, dict[str, Any]]:
    """Read ``name[:option=value…]``; values are YAML scalars, so ``5`` is an int and ``false`` a bool.

    Args:
        entry: the text.
        what: how messages begin.

    Raises:
        UserError: a part that is not ``option=value``, an option that stands there twice, or a value that is no scalar.
    """
    name, *pairs = entry.strip().split(":")
    options = {}
    for pair in pairs:
        option, equals, value = pair.partition("=")
        if not (option and equals and value):
            raise UserError(f"{what}: {pair!r} is not option=value")
        if option in options:
            raise UserError(f"{what}: {option} stands there twice")
        try:
            options[option] = yaml_scalar(value)
        except ValueError as error:
            raise UserError(f"{what}: {option}: {value!r} is not a YAML scalar") from error
    return name, options


def check_options(
    options: dict[str, Any], factory: Callable[..., Any], what: str, *, reserved: Collection[str] = ()
) -> None:
    """Raise UserError unless ``factory`` takes all the options, each of the type that its default has.

    Args:
        options: by name.
        factory: its parameters but the ``reserved`` ones are the options; one with ``**options`` takes any.
        what: how messages begin.
        reserved: parameters that are no options.
    """
    parameters = signature(factory).parameters
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    allowed = sorted(set(parameters) - set(reserved))
    for option, value in options.items():
        if option not in allowed:
            has = f"its options are {', '.join(allowed)}" if allowed else "it has none"
            raise UserError(f"{what} has no option {option!r}; {has}")
        default = type(parameters[option].default)
        if default in _KINDS and type(value) not in _KINDS[default][1]:
            raise UserError(f"{what}: {option} must be {_KINDS[default][0]}, not {value!r}")
