"""What training minimizes: an objective gives the loss, and other numbers worth a log, of each image of a batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import torch

from sit.latents.datasets import Batch
from sit.transport.transport import Field, Transport


class Objective(Protocol):
    """A loss of a network on a batch; additions to the plain one, such as REPA's, wrap it."""

    def __call__(self, model: Field, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The losses (b,) float32 of the images, whose mean is minimized, and metrics by name, each (b,).

        Args:
            model: the network, called as ``model(x_t, t, y=labels)``.
            batch: what :func:`~sit.training.loader.training_batches` yields, on the network's device.
        """
        ...


def layers(objective: Objective) -> list[Objective]:
    """An objective and all that it wraps, each the ``base`` of the one before."""
    found = [objective]
    while (base := getattr(found[-1], "base", None)) is not None:
        found.append(base)
    return found


def at_step(objective: Objective, step: int) -> Objective:
    """What is minimized at a step, counted from 1: additions that last ``until`` an earlier one are left out."""
    base, until = getattr(objective, "base", None), getattr(objective, "until", None)
    if base is None:
        return objective
    inside = at_step(base, step)
    if until is not None and step > until:
        return inside
    return objective if inside is base else dataclasses.replace(objective, base=inside)  # type: ignore[type-var]


@dataclass(frozen=True)
class TransportObjective:
    """The loss of a :class:`Transport`, with everything random taken from the batch.

    Attributes:
        transport: interpolant, prediction and the weight of the loss.
        class_dropout: the probability of training an image without its label.
        null_label: the label that stands for none.
    """

    transport: Transport
    class_dropout: float
    null_label: int

    def __call__(self, model: Field, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = self.transport.training_loss(
            model,
            batch["latents"],
            batch["labels"],
            u=batch["t_uniform"],
            x0=batch["noise"],
            drop=batch["drop"],
            class_dropout=self.class_dropout,
            null_label=self.null_label,
        )
        return loss, {}
