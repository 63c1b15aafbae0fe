"""Recipes: YAML files that fill a :class:`~sit.training.config.TrainConfig`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import typeguard
import yaml

from sit.training.config import TrainConfig, fixed_fields
from sit.utils.errors import UserError

RECIPES = Path(__file__).parents[1] / "recipes"


def known_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def from_mapping(values: dict[str, Any], source: str, base: TrainConfig | None = None) -> TrainConfig:
    """A config from a YAML mapping of field names, over the values of ``base``.

    Raises:
        UserError: an unknown field or a value of the wrong type; the message begins with ``source``.
    """
    hints = get_type_hints(TrainConfig)
    checked = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{source}: unknown setting {name!r}; the settings are {', '.join(hints)}")
        if isinstance(value, list):
            value = tuple(value)
        try:
            checked[name] = typeguard.check_type(value, hints[name])
        except typeguard.TypeCheckError as error:
            reason = str(error).split(" ", 1)[1]
            raise UserError(f"{source}: {name}: {value!r} {reason}") from error
    return dataclasses.replace(base or TrainConfig(), **checked)


def load_recipe(name: str) -> TrainConfig:
    """Read a recipe: a name of :func:`known_recipes`, or a YAML file. Its ``base``, if any, is a recipe to start from.

    Raises:
        UserError: there is no such recipe, or the file is not a YAML mapping of settings.
    """
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        raise UserError(f"`recipe={name}`: neither a file nor a recipe; the recipes are {', '.join(known_recipes())}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"`recipe={path}`: not readable YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"`recipe={path}`: must be a mapping of settings")
    base = values.pop("base", None)
    return from_mapping(values, f"`recipe={path}`", load_recipe(str(base)) if base else None)


def check_same_run(config: TrainConfig, folder: Path) -> None:
    """Refuse to continue the run in ``folder`` with settings that its first step has fixed at other values.

    Raises:
        UserError: unless ``config`` has those that the run was begun with; the message names both values.
    """
    begun = load_recipe(str(folder / "config.yaml"))
    for name in fixed_fields():
        now, then = getattr(config, name), getattr(begun, name)
        if now != then:
            raise UserError(f"`{name}={now}` can't continue the run {folder}, which was begun with {then}")


def run_folder(path: str) -> Path:
    """The folder of a run, given that or one of the run's checkpoints.

    Raises:
        UserError: ``path`` is neither.
    """
    folder = Path(path).resolve()
    for candidate in (folder, *folder.parents[:2]):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise UserError(f"`resume={path}`: neither a run's folder nor a checkpoint in one (there is no config.yaml)")
