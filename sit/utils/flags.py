"""A command's flags as its dataclass has them, and a command line put into the words that the parser reads.

tyro parses. Before it does, a flag that there is not is told with the one that was meant, and values that have several
spellings get the one that the setting has.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from sit.utils.choices import choices, understood
from sit.utils.errors import UserError
from sit.utils.habits import HABITS

OF_THE_PARSER = ("help", "h", "tyro-print-completion", "tyro-write-completion")


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        name: with hyphens, without those before it.
        switch: it takes no value, and has a ``no-`` form.
        most: values that it takes at most; None if there is no limit.
        choices: the values, where they are words of a list.
    """

    name: str
    switch: bool
    most: int | None
    choices: tuple[str, ...]

    @property
    def three_ways(self) -> bool:
        """Whether it may be true, false or left open."""
        return not self.switch and {"True", "False"} <= set(self.choices)


@dataclass(frozen=True)
class Command:
    """The flags of a command by their names, and whether it takes words without a flag too."""

    flags: dict[str, Flag]
    positional: bool

    def flag_of(self, name: str) -> Flag | None:
        """The flag that ``name`` sets, with or without ``no-`` before it."""
        plain = name.removeprefix("no-")
        if name not in self.flags and plain in self.flags:
            flag = self.flags[plain]
            return flag if flag.switch or flag.three_ways else None
        return self.flags.get(name)


def command_of(kind: Any, words: Sequence[str]) -> Command:
    """What a dataclass, or the one of several subcommands that ``words`` name, takes on the command line."""
    if get_origin(kind) in (Union, types.UnionType):
        named = {meta.name: member for member in get_args(kind) for meta in member.__metadata__}
        chosen = next((named[word] for word in words if word in named), None)
        return Command({}, True) if chosen is None else Command(command_of(chosen, ()).flags, True)
    flags = {flag.name: flag for flag, _ in _fields(kind)}
    positional = [name for name, is_positional in ((flag.name, at) for flag, at in _fields(kind)) if is_positional]
    return Command({name: flag for name, flag in flags.items() if name not in positional}, bool(positional))


def _fields(kind: Any) -> Iterator[tuple[Flag, bool]]:
    """The flags of a dataclass and of those within it, each with whether it stands without its name."""
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint: Any = hints[field.name]
        marks: list[Any] = []
        if get_origin(hint) is Annotated:
            hint, *marks = get_args(hint)
        if dataclasses.is_dataclass(hint):
            yield from _fields(hint)
            continue
        switch = hint is bool
        yield (
            Flag(field.name.replace("_", "-"), switch, 0 if switch else _most(hint), tuple(choices(hint))),
            any("Positional" in repr(mark) for mark in marks),
        )


def _most(hint: Any) -> int | None:
    """How many words a value of this type has at most; None if there is no limit."""
    if get_origin(hint) in (Union, types.UnionType):
        counts = [_most(member) for member in get_args(hint)]
        return None if None in counts else max(count for count in counts if count is not None)
    if get_origin(hint) is tuple:
        members = get_args(hint)
        return None if Ellipsis in members else len(members)
    return 1


def put_plainly(words: Sequence[str], command: Command) -> list[str]:
    """The words of a command line as the parser reads them.

    Raises:
        UserError: a flag that the command has not, more values than a flag takes, or one of many values twice.
    """
    plain: list[str] = []
    groups = list(_grouped(words))
    if unknown := [name for name, _ in groups if name and not _known(name, command)]:
        raise UserError("; ".join(dict.fromkeys(_what_was_meant(name, command) for name in unknown)))
    seen: set[str] = set()
    for name, values in groups:
        flag = command.flag_of(name)
        if flag is not None and flag.most is None and flag.name in seen:
            raise UserError(f"--{name} is there twice: give all its values after one")
        seen |= {flag.name} if flag is not None else set()
        if flag is None:
            _check_stray(values if not name else values[1:], command)
            plain += values
            continue
        head, values = values[0], values[1:]
        if "=" in head:
            head, _, value = head.partition("=")
            values = [value, *values]
        if flag.three_ways and name.startswith("no-") and name not in command.flags:
            head, values = f"--{flag.name}", ["False", *values]
        elif flag.three_ways and not (values and understood(values[0], flag.choices) in flag.choices):
            values = ["True", *values]
        if flag.most is not None and len(values) > flag.most and not command.positional:
            takes = "no value" if flag.switch else f"{flag.most} value{'s' * (flag.most > 1)}"
            raise UserError(f"--{name} takes {takes}, not: {' '.join(values)}")
        plain += [head, *(understood(value, flag.choices) for value in values)]
    return plain


def _grouped(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag's name, "" for what stands before the first, with the flag and the words up to the next one."""
    name = ""
    group: list[str] = []
    for word in words:
        if word.startswith("-") and word.strip("-") and not _is_number(word):
            if group:
                yield name, group
            name, group = word.lstrip("-").partition("=")[0].replace("_", "-"), []
        group.append(word)
    if group:
        yield name, group


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _known(name: str, command: Command) -> bool:
    return command.flag_of(name) is not None or name in OF_THE_PARSER


def _check_stray(values: Sequence[str], command: Command) -> None:
    """Raise UserError for words that no flag stands before, unless the command takes such."""
    if values and not command.positional:
        sampler = command.flags.get("sampler")
        if sampler is not None and values[0].lower() in sampler.choices:  # the published sample.py has the mode so
            raise UserError(f"{values[0]}: write --sampler {values[0].lower()}")
        raise UserError(f"{values[0]}: no flag stands before it; --help lists the flags")


def _what_was_meant(name: str, command: Command) -> str:
    """A sentence about a flag that there is not."""
    given = f"-{name}" if len(name) == 1 else f"--{name}"
    for meant in HABITS.get(name, ()):
        known = [word for word in meant.flags if _takes(command, *word.split())]
        if known:
            here = " and ".join(f"--{word}" for word in known)
            return f"there is no {given} here: use {here}{f' ({meant.note})' if meant.note else ''}"
    if name in HABITS and (notes := [meant.note for meant in HABITS[name] if not meant.flags]):
        return f"there is no {given} here: {notes[0]}"
    if near := difflib.get_close_matches(name, _spellings(command), n=1, cutoff=0.7):
        return f"there is no {given}; did you mean --{near[0]}?"
    return f"there is no {given}; --help lists the flags"


def _takes(command: Command, name: str, *values: str) -> bool:
    flag = command.flag_of(name)
    return flag is not None and (not flag.choices or set(values) <= set(flag.choices))


def _spellings(command: Command) -> list[str]:
    return [*command.flags, *(f"no-{flag.name}" for flag in command.flags.values() if flag.switch or flag.three_ways)]
