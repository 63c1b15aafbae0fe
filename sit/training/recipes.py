"""Recipes: YAML files that fill a :class:`~sit.training.config.TrainConfig`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

from sit.training.config import ALWAYS_FIXED, TrainConfig, as_said_today, fixed_fields, without_idle
from sit.utils.choices import choices, understood
from sit.utils.errors import UserError
from sit.utils.reading import read_yaml, typed

MOST_BASES = 16
"""recipes that may be each the base of the next"""
RECIPES = Path(__file__).parents[1] / "recipes"

FIRST_LINE, LAST_LINE = "# the settings of a run; the last line says that all are here", "# all settings"
"""of a run's ``config.yaml``, which cut off at the end of a line is YAML like any other"""

ALWAYS_WRITTEN = (*ALWAYS_FIXED, "keep_every")
"""settings in the ``config.yaml`` of every version: what fixes a run, and what 0.1.0 put last"""


def known_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def from_mapping(values: dict[str, Any], source: str, base: TrainConfig | None = None) -> TrainConfig:
    """A config from a YAML mapping of field names, over the values of ``base``.

    Names may have hyphens, as flags have, and values the spellings that flags may have (:mod:`sit.utils.choices`).

    Raises:
        UserError: an unknown field, or a value of the wrong type or that can't be; the message begins with ``source``.
    """
    checked = typed(as_said_today(_as_fields(values, source)), get_type_hints(TrainConfig), source)
    base = base or TrainConfig()
    try:
        return without_idle(dataclasses.replace(base, **checked), base)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _as_fields(values: dict[str, Any], source: str) -> dict[str, Any]:
    """The settings under their fields' names, words of a list in the spelling that the field has."""
    hints = get_type_hints(TrainConfig)
    fields: dict[str, Any] = {}
    for spelled, value in values.items():
        name = spelled.replace("-", "_") if isinstance(spelled, str) else spelled
        if name in fields:
            raise UserError(f"{source}: {name} is there twice, as {spelled} too")
        fields[name] = understood(value, choices(hints[name])) if isinstance(value, str) and name in hints else value
    return fields


def load_recipe(name: str, above: tuple[str, ...] = ()) -> TrainConfig:
    """Read a recipe: a name of :func:`known_recipes`, or a YAML file. Its ``base``, if any, is a recipe to start from.

    Args:
        name: which.
        above: the recipes that this one is a base of.

    Raises:
        UserError: there is no such recipe, the file is not a YAML mapping of settings, or bases go round in a circle.
    """
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        raise UserError(f"`recipe={name}`: neither a file nor a recipe; the recipes are {', '.join(known_recipes())}")
    here = str(path.resolve())
    if here in above:
        raise UserError(f"`recipe={path}` is its own base, by way of {len(above)} recipes: name another `base` in it")
    if len(above) == MOST_BASES:
        raise UserError(f"`recipe={path}` is the base of {MOST_BASES} recipes above each other: that is too deep")
    values = read_yaml(path, f"`recipe={path}`")
    base = typed({"base": values.pop("base", None)}, {"base": str | None}, f"`recipe={path}`")["base"]
    return from_mapping(values, f"`recipe={path}`", load_recipe(base, (*above, here)) if base else None)


def run_settings(config: TrainConfig) -> str:
    """The text of a run's ``config.yaml``, which shows where it was cut off."""
    return f"{FIRST_LINE}\n{config.to_yaml()}{LAST_LINE}\n"


def load_run_settings(folder: Path) -> TrainConfig:
    """The config that the run in ``folder`` was begun with.

    Raises:
        UserError: it can't be read, or was cut off.
    """
    path = folder / "config.yaml"
    try:
        lines = path.read_bytes().decode(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from error
    if FIRST_LINE in lines[:1] and lines[-1] != LAST_LINE:
        raise UserError(f"{path} is cut off: its last line is not {LAST_LINE!r}; put a whole copy there")
    written = {line.partition(":")[0] for line in lines}
    if missing := [name for name in ALWAYS_WRITTEN if name not in written]:
        raise UserError(f"{path} is cut off: it has no {missing[0]!r}; put a whole copy there")
    return load_recipe(str(path))


KNOWN_BY_CONTENT = ("data", "vae", "repa")
"""fixed settings that name files, which may be moved: a run's identity tells whether they are its own"""


def differs(name: str, now: Any, then: Any) -> bool:
    """Whether a fixed setting is another than a run was begun with, whose identity is known."""
    return now != then and not (name in KNOWN_BY_CONTENT and None not in (now, then))


def check_same_run(config: TrainConfig, folder: Path, has_identity: bool = False) -> None:
    """Refuse to continue the run in ``folder`` with settings that its first step has fixed at other values.

    Args:
        config: the settings.
        folder: the run's.
        has_identity: the run knows its data, VAE and encoder by what they hold, so that they may have other names.

    Raises:
        UserError: unless ``config`` has those that the run was begun with; the message names both values.
    """
    begun = load_run_settings(folder)
    for name in fixed_fields():
        now, then = getattr(config, name), getattr(begun, name)
        if differs(name, now, then) if has_identity else now != then:
            raise UserError(f"`{name}={now}` can't continue the run {folder}, which was begun with {then}")


def run_folder(path: str) -> Path:
    """The folder of a run, given that or one of the run's checkpoints.

    Raises:
        UserError: ``path`` is neither.
    """
    folder = Path(path).resolve()
    for candidate in (folder, *folder.parents[:2]):
        try:
            if (candidate / "config.yaml").is_file():
                return candidate
        except OSError as error:
            raise UserError(f"`resume={path}`: {candidate} can't be read ({error.strerror})") from error
    raise UserError(f"`resume={path}`: neither a run's folder nor a checkpoint in one (there is no config.yaml)")
