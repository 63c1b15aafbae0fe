"""Reading what a file says. It may say anything: whatever goes wrong becomes one line that names the file.

:func:`reading` is around every place that builds something from a file's contents, :func:`typed` checks single values.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import typeguard
import yaml

from sit.utils.choices import choices
from sit.utils.errors import UserError, first_line

YAML_BOOLEANS = {True: ("on", "yes"), False: ("off", "no")}
"""words that YAML 1.1 reads so, and YAML 1.2 does not"""

LARGEST_TEXT = 1 << 28
"""bytes of a configuration or manifest at most; the manifest of ImageNet's cache has some 100 KB"""

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


@contextlib.contextmanager
def reading(place: str | Path, mend: str = "") -> Iterator[None]:
    """Whatever fails within the block, which makes something of the file or folder ``place``, becomes a UserError.

    Only what a caller must see as it is goes through: ``KeyboardInterrupt`` and its kin.

    Args:
        place: what the line names.
        mend: what to do about it.
    """
    end = f"; {mend}" if mend else ""
    try:
        yield
    except UserError as error:
        if str(place) in str(error):
            raise
        # what the library calls an argument is here what the file says, and no flag
        raise UserError(f"{place}: {str(error).replace('`', '')}{end}") from error
    except FileNotFoundError as error:
        missing = error.filename if error.filename and str(error.filename) != str(place) else ""
        what = f"{place} can't be read: there is no {missing}" if missing else f"{place}: no such file"
        raise UserError(what + end) from error
    except RecursionError as error:
        raise UserError(f"{place} can't be read: it is nested too deep{end}") from error
    except MemoryError as error:
        raise UserError(f"{place} can't be read: it asks for more memory than there is{end}") from error
    except OSError as error:
        raise UserError(f"{place} can't be read ({error.strerror or first_line(error)}){end}") from error
    except Exception as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{place} can't be read: it is cut off or damaged ({reason[:200]}){end}") from error


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        UserError: it can't be read, is longer than :data:`LARGEST_TEXT`, or no such text.
    """
    with reading(path):
        if path.stat().st_size > LARGEST_TEXT:
            raise UserError(f"{path} is larger than any file of its kind")
        return path.read_text(encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file can't be read, or holds something else.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is cut off or not JSON") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


class _Loader(yaml.SafeLoader):
    """PyYAML's, which reads ``2e-3`` as a number as YAML 1.2 does, and refuses a key that stands there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), [*"-+.0123456789"]
)


def yaml_scalar(text: str) -> Any:
    """What a word means in YAML, where it is no list and no mapping.

    Raises:
        ValueError: it is one, or no YAML.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, OverflowError) as error:
        raise ValueError(f"{text!r} is no YAML") from error
    if isinstance(value, list | dict):
        raise ValueError(f"{text!r} is no scalar")
    return value


def read_yaml(path: Path, name: str) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file holds an empty one.

    Args:
        name: what messages call it.

    Raises:
        UserError: the file can't be read, or holds something else.
    """
    try:
        with reading(path):
            text = read_text(path)
        values = yaml.load(text, Loader=_Loader)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        reason = f"{problem} in line {mark.line + 1}" if mark and problem else " ".join(str(error).split())[:200]
        reason = "it is nested too deep" if isinstance(error, RecursionError) else reason
        raise UserError(f"{name}: not readable YAML: {reason}") from error
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{name}: must be a mapping of settings")
    return values


def _meant(name: Any, known: Iterable[str]) -> str:
    """The setting that a wrong name is most like, else the settings, of many only some."""
    if near := difflib.get_close_matches(str(name), known, n=1):
        return f"did you mean {near[0]}?"
    shown = list(known)
    return f"the settings are {', '.join(shown[:20])}" + (", …" if len(shown) > 20 else "")


def typed(values: Mapping[Any, Any], hints: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    """The values as keyword arguments: each has a hint and is of its type; lists stand for tuples.

    Other than in Python, true and false are no numbers.

    Raises:
        UserError: an unknown name or a value of another type; the message begins with ``source``.
    """
    checked = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{source}: unknown setting {_short(name)}; {_meant(name, hints)}")
        if isinstance(value, list) and not _has(list, hints[name]):
            value = tuple(value)
        if isinstance(value, bool):  # YAML 1.1 reads a bare on, off, yes or no as a boolean
            value = next((word for word in YAML_BOOLEANS[value] if word in choices(hints[name])), value)
        try:
            if _has_truth_value(value) and not _has(bool, hints[name]):
                raise typeguard.TypeCheckError("is true or false")
            every = typeguard.CollectionCheckStrategy.ALL_ITEMS
            checked[name] = typeguard.check_type(value, hints[name], collection_check_strategy=every)
        except typeguard.TypeCheckError as error:
            raise UserError(f"{source}: {name}: {_short(value)} is not {in_words(hints[name])}") from error
    return checked


def in_words(hint: Any) -> str:
    """A type as a message says it: ``int | None`` is "a whole number or null"."""
    if hint in _WORDS:
        return _WORDS[hint]
    origin = getattr(hint, "__origin__", None)
    inner = [argument for argument in get_args(hint) if argument is not Ellipsis]
    if origin in (list, tuple):
        return f"a list of {' and '.join(map(in_words, dict.fromkeys(inner)))}"
    if origin is dict:
        return f"a mapping from {in_words(inner[0])} to {in_words(inner[1])}"
    if inner:
        return " or ".join(in_words(argument) if isinstance(argument, type) or get_args(argument) else str(argument)
                           for argument in inner)  # fmt: skip
    return str(getattr(hint, "__name__", hint))


def _short(value: object) -> str:
    """A value for a message: on one line, however long or deep it is."""
    return " ".join(reprlib.repr(value).split())


def _has(kind: type, hint: Any) -> bool:
    return hint is kind or getattr(hint, "__origin__", None) is kind or any(_has(kind, part) for part in get_args(hint))


def _has_truth_value(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, (list, tuple)) and any(map(_has_truth_value, value)))
