"""What a checkpoint says about itself, in the files of its folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

from sit.checkpoint.integrity import INDEX, read_index
from sit.utils.errors import UserError
from sit.utils.reading import read_json, typed


@dataclass
class CheckpointInfo:
    """What a checkpoint is, beyond its network.

    Attributes:
        step: optimizer steps taken.
        images_seen: training images shown, counted with repetition.
        image_size: height and width of the images in pixels; None if unknown.
        classes: number of classes.
        label_names: their names by label; empty if unknown.
        data: the data set it was trained on, as :func:`sit.data.factory.open_images` takes it.
        mixer: the mixer pattern.
    """

    step: int = 0
    images_seen: int = 0
    image_size: tuple[int, int] | None = None
    classes: int = 0
    label_names: list[str] = field(default_factory=list)
    data: str = ""
    mixer: str = ""


def read_info(place: Path) -> CheckpointInfo:
    """What a folder says about itself: in ``sit.json``, else in diffusers' own files.

    Raises:
        UserError: a file is missing or unreadable, or says nonsense.
    """
    hints = get_type_hints(CheckpointInfo)
    if (place / INDEX).is_file():
        index = read_index(place)
        return CheckpointInfo(**typed({name: index[name] for name in hints if name in index}, hints, place / INDEX))
    pipeline = (place / "model_index.json").is_file()
    path = (place / "transformer" if pipeline else place) / "config.json"
    config = read_json(path)
    said = {"classes": config.get("num_classes", 0), "mixer": config.get("mixer", "")}
    info = CheckpointInfo(**typed(said, hints, path))
    if pipeline:
        info.label_names = _label_names(place / "model_index.json")
    return info


def read_vae_name(place: Path) -> str | None:
    """The VAE on the Hub that a pipeline's folder names; None if it names none.

    Raises:
        UserError: its ``model_index.json`` is damaged.
    """
    path = place / "model_index.json"
    if not path.is_file():
        return None
    return typed({"vae_name": read_json(path).get("vae_name")}, {"vae_name": str | None}, path)["vae_name"]


def _label_names(path: Path) -> list[str]:
    """The names of the labels 0, 1, … in a ``model_index.json``; none if it has none."""
    told = read_json(path).get("id2label") or {}
    names = typed({"id2label": told}, {"id2label": dict[str, str]}, path)["id2label"]
    if sorted(names) != sorted(map(str, range(len(names)))):
        raise UserError(f"{path}: id2label must name the labels from 0 on, each once")
    return [names[str(label)] for label in range(len(names))]
