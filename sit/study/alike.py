"""That what a report compares was trained and evaluated with the same things, wherever and whenever it was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sit.study.config import Study
from sit.study.record import without_folders
from sit.utils.errors import UserError


def check_alike(study: Study, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse runs whose data, VAE, reference, features or classifier were others under the same name.

    JSONs of an earlier program don't say what theirs were, and are taken as they are.

    Args:
        study: the study.
        records: run's name → its JSON.

    Raises:
        UserError: two runs were made with different ones; the message names both files.
    """
    known: dict[tuple[str, str], tuple[str, str]] = {}
    for name, one in records.items():
        for setting, named, content in _made_of(one):
            first, begun = known.setdefault((setting, named), (name, content))
            if content != begun:
                raise UserError(
                    f"{study.out / 'runs' / name}.json and {first}.json were made with different contents of "
                    f"`{setting}`, {named}: remove the one that is out of date, and its run is made again"
                )


def check_evaluated_alike(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to add evaluations to those of another reference, classifier or kind of features.

    Args:
        path: the run's JSON.
        before: what it says under ``evaluation``.
        now: the same, with more of it.

    Raises:
        UserError: it is another.
    """
    begun = {(setting, metric): content for setting, metric, content in _evaluated_with(before)}
    for setting, metric, content in _evaluated_with(now):
        if begun.get((setting, metric), content) != content:
            raise UserError(
                f"{path} has evaluations with other contents of `{setting}` than are there now: put those back, or "
                "remove that file, and all of it is made again"
            )


def _made_of(record: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Setting of the study's file, what it names or what is measured with it, and a hash of its content."""
    config, trained_on = record["config"], record.get("trained_on") or {}
    data, vae = without_folders(config["data"]), without_folders(config["vae"])
    for setting, named, hashed in (("data", data, "images"), ("vae", vae, "vae")):
        if hashed in trained_on:
            yield setting, f"{named} at {config['image_size']} pixels", trained_on[hashed]
    for setting, metric, content in _evaluated_with(record["evaluation"] or {}):
        yield setting, f"of {metric} at {config['image_size']} pixels", content


def _evaluated_with(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for numbers in (*evaluation.get("steps", {}).values(), *evaluation.get("others", {}).values()):
        for number in numbers:
            for setting, identity in number.get("basis", {}).items():
                yield setting, number["name"], identity["content"]
