"""Help in groups: a dataclass of many flags shown as one of several dataclasses, which tyro gives a frame each."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro


def in_groups(kind: Any, default: Any) -> tuple[Any, Any]:
    """A dataclass with the same flags, help and defaults as ``kind``, and its fields in groups.

    A field whose metadata have a ``group`` begins one, and those after it belong to it.

    Args:
        kind: the dataclass.
        default: an instance of it; None: the fields' defaults.

    Returns:
        (the dataclass to show, an instance of it or None); what was given, where nothing is in groups.
    """
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)) or default is None:
        return kind, default
    shown: list[tuple[str, Any, Any]] = []
    for field, hint in _hinted(kind):
        value = getattr(default, field.name)
        within = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if dataclasses.is_dataclass(within) and (groups := _groups(within)):
            for name, fields in groups.items():
                group = _dataclass(name, [(part, told, getattr(value, part)) for part, told in fields], "")
                shown.append((name, Annotated[group, tyro.conf.OmitArgPrefixes], group()))
        else:
            shown.append((field.name, hint, value))
    made = _dataclass(kind.__name__, shown, kind.__doc__ or "")
    return made, made()


def _groups(kind: Any) -> dict[str, list[tuple[str, Any]]]:
    """The fields of a dataclass with their types, by the group that they are in; nothing if it has no groups."""
    groups: dict[str, list[tuple[str, Any]]] = {}
    fields: list[tuple[str, Any]] = []
    for field, hint in _hinted(kind):
        if name := field.metadata.get("group"):
            fields = groups[name] = []
        fields.append((field.name, hint))
    return groups


def _hinted(kind: Any) -> list[tuple[dataclasses.Field, Any]]:
    """The fields with their types, into which their docstrings are written as help."""
    hints, told = get_type_hints(kind, include_extras=True), _docstrings(kind)
    return [
        (field, Annotated[hints[field.name], tyro.conf.arg(help=told[field.name])])
        if field.name in told
        else (field, hints[field.name])
        for field in dataclasses.fields(kind)
    ]


def _docstrings(kind: Any) -> dict[str, str]:
    """What stands below each field in the source of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    told = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            told[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return told


def _dataclass(name: str, fields: list[tuple[str, Any, Any]], doc: str) -> Any:
    """A dataclass of (name, type, default) fields."""

    def always(value: Any) -> Any:
        return dataclasses.field(default_factory=lambda: value)

    made = dataclasses.make_dataclass(name, [(part, hint, always(value)) for part, hint, value in fields])
    made.__doc__ = doc
    return made
