"""What a run was trained on, kept with it as ``identity.json``: a run goes on with the same, or not at all."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sit.latents.vae import vae_fingerprint
from sit.training.config import TrainConfig, as_said_today, fixed_fields
from sit.training.data import Opened
from sit.training.distill import Distillation
from sit.training.objective import Objective, layers
from sit.training.recipes import differs
from sit.training.repa import Alignment
from sit.utils.checksums import sealed, unsealed
from sit.utils.errors import UserError
from sit.utils.files import atomic_write
from sit.utils.fingerprint import weights_fingerprint

FILE = "identity.json"

SINCE_BEGINNINGS = ("donor", "teacher")
"""what earlier files don't have"""


@dataclass(frozen=True)
class Identity:
    """What decides a run besides the program.

    Attributes:
        settings: those that the first step fixes, as JSON has them.
        images: :meth:`sit.latents.datasets.TrainingData.contents`.
        classes: names by label.
        vae: :func:`sit.latents.vae.vae_fingerprint`.
        encoder: of the weights of REPA's encoder; None without it.
        donor: of the weights that it began with; None without, or if they were not read, as it goes on.
        teacher: of those that it was distilled from; the same.
    """

    settings: dict[str, Any]
    images: str
    classes: list[str]
    vae: str
    encoder: str | None
    donor: str | None = None
    teacher: str | None = None

    @classmethod
    def of(cls, config: TrainConfig, opened: Opened, objective: Objective, donor: str | None = None) -> Identity:
        """That of a run about to be trained. Its cost: see :meth:`sit.data.dataset.Source.contents`.

        ``donor`` is :func:`~sit.utils.fingerprint.state_fingerprint` of what it began with, in its first start.
        """
        settings = json.loads(json.dumps({name: getattr(config, name) for name in fixed_fields()}))
        parts, data = layers(objective), opened.data
        encoders = [part.encoder.network for part in parts if isinstance(part, Alignment)]
        teachers = [part.teacher for part in parts if isinstance(part, Distillation)]
        return cls(
            settings,
            data.contents(),
            list(data.classes),
            vae_fingerprint(opened.vae),
            encoder=weights_fingerprint(encoders[0]) if encoders else None,
            donor=donor,
            teacher=weights_fingerprint(teachers[0]) if teachers else None,
        )

    def check(self, begun: Identity, config: TrainConfig, run: Path) -> None:
        """Raise UserError unless this is what the run was ``begun`` with, wherever that lies; it names what differs."""
        for name, then in begun.settings.items():
            now = self.settings.get(name, then)
            if differs(name, now, then):
                raise UserError(f"`{name}={now}` can't continue the run {run}, which was begun with {then}")
        if self.classes != begun.classes:
            raise UserError(
                f"`data={config.data}` has other classes than the run {run} was begun with "
                f"({_difference(begun.classes, self.classes)}); give the same data, or begin a new run"
            )
        for now, then, what, holds in (
            (self.images, begun.images, f"`data={config.data}`", "images"),
            (self.vae, begun.vae, f"`vae={config.vae}`", "weights"),
            (self.encoder, begun.encoder, f"`repa={config.repa}`", "weights"),
        ):
            if now != then:
                raise UserError(
                    f"{what} holds other {holds} than the run {run} was begun with; give those, or begin a new run"
                )
        for now, then, what in (
            (self.donor, begun.donor, f"`init_from={config.init_from}`"),
            (self.teacher, begun.teacher, f"`distill_from={config.distill_from}`"),
        ):
            if None not in (now, then) and now != then:
                raise UserError(f"{what} holds other weights than the run {run} was begun with; give those")


def _difference(then: list[str], now: list[str], most: int = 5) -> str:
    """Which names are gone and which are new."""
    parts = []
    for word, names in (("without", set(then) - set(now)), ("with", set(now) - set(then))):
        if names:
            parts.append(f"{word} {', '.join(sorted(names)[:most])}" + ", …" * (len(names) > most))
    return "; ".join(parts) or "in another order"


def keep_identity(run: Path, identity: Identity, config: TrainConfig) -> None:
    """Compare with what the run's folder says, or write it there: a new run has none, nor one begun by 0.1.0.

    Raises:
        UserError: the run was begun with something else, or its ``identity.json`` is damaged.
    """
    begun = read_identity(run)
    if begun is not None:
        identity.check(begun, config, run)
        return
    with atomic_write(run / FILE) as temporary:
        temporary.write_text(sealed(dataclasses.asdict(identity)), encoding="utf-8")


def read_identity(run: Path) -> Identity | None:
    """What a run's folder says that it was begun with; None if it says nothing.

    Raises:
        UserError: the file can't be read, or is not as it was written.
    """
    path = run / FILE
    try:
        content, has_checksum = unsealed(path.read_bytes())
        if not has_checksum:
            raise ValueError
        content = {name: content.get(name) for name in SINCE_BEGINNINGS} | content
        content["settings"] = as_said_today(content["settings"])
        return Identity(**{field.name: content[field.name] for field in dataclasses.fields(Identity)})
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged, so that nothing tells whether the data are the run's; remove it if you know they are"
        ) from error
