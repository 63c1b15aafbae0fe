"""That what a report compares was trained and evaluated with the same things, wherever and whenever it was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sit.study.config import Study
from sit.study.record import without_folders
from sit.utils.errors import UserError

CLOSE = 1e-3
"""Relative, between moments of one reference as two machines compute them; those of two references differ by more."""

Told = str | list[float] | None
"""What tells a thing from another of the same name: a hash, or moments; None if a JSON doesn't say"""


def agree(one: Told, other: Told) -> bool:
    """Whether both are of the same, as far as both tell."""
    if one is None or other is None or isinstance(one, str):
        return None in (one, other) or one == other
    return bool(np.allclose(one, other, rtol=CLOSE, atol=0))


def check_alike(study: Study, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse runs whose data, VAE, reference or classifier were others under the same name.

    JSONs of an earlier program don't say what theirs were, and are taken as they are.

    Args:
        study: the study.
        records: run's name → its JSON.

    Raises:
        UserError: two runs were made with different ones; the message names both files.
    """
    known: dict[tuple[str, str], tuple[str, Told]] = {}
    for name, one in records.items():
        for setting, named, told in _made_of(one):
            if told is None:
                continue
            first, begun = known.setdefault((setting, named), (name, told))
            if not agree(told, begun):
                raise UserError(
                    f"{study.out / 'runs' / name}.json and {first}.json were made with different contents of "
                    f"`{setting}`, {named}: remove the one that is out of date, and its run is made again"
                )


def check_evaluated_alike(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to add evaluations to those of another reference or classifier.

    Args:
        path: the run's JSON.
        before: what it says under ``evaluation``.
        now: the same, with more of it.

    Raises:
        UserError: it is another.
    """
    first, second = ({setting: told for setting, _, told in _evaluated_with(one)} for one in (before, now))
    for setting in sorted(first.keys() & second.keys()):
        if not agree(first[setting], second[setting]):
            raise UserError(
                f"{path} was evaluated with other contents of `{setting}` than are there now: put those back, or "
                "remove that file, and all of it is made again"
            )


def _made_of(record: Mapping[str, Any]) -> Iterator[tuple[str, str, Told]]:
    """Setting of the study's file, what it names, and what that was."""
    config, trained_on = record["config"], record.get("trained_on") or {}
    data, vae = without_folders(config["data"]), without_folders(config["vae"])
    yield "data", f"{data} at {config['image_size']} pixels", trained_on.get("images")
    yield "vae", vae, trained_on.get("vae")
    for setting, named, told in _evaluated_with(record["evaluation"] or {}):
        yield setting, f"{named} at {config['image_size']} pixels", told


def _evaluated_with(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, Told]]:
    of, settings = evaluation.get("of") or {}, evaluation.get("settings", {})
    for features, moments in of.get("reference", {}).items():
        yield "reference", f"{without_folders(settings['reference'])} on features {features}", moments
    yield "classifier", without_folders(settings.get("classifier")), of.get("classifier")
