"""What a checkpoint says about itself, and the JSON files that it says it in."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sit.checkpoint.integrity import INDEX
from sit.utils.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


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
        UserError: a file is missing or unreadable.
    """
    if (place / INDEX).is_file():
        index = read_json(place / INDEX)
        info = CheckpointInfo(**{f.name: index[f.name] for f in dataclasses.fields(CheckpointInfo) if f.name in index})
        info.image_size = tuple(info.image_size) if info.image_size else None
        return info
    pipeline = (place / "model_index.json").is_file()
    config = read_json((place / "transformer" if pipeline else place) / "config.json")
    info = CheckpointInfo(classes=config.get("num_classes", 0), mixer=config.get("mixer", ""))
    if pipeline:
        id2label = read_json(place / "model_index.json").get("id2label") or {}
        names = {int(label): name for label, name in id2label.items()}
        info.label_names = [names[label] for label in range(len(names)) if label in names]
    return info


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file can't be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path} is cut off or not JSON") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content
