"""MeanFlow as an objective of training: its draws keyed by the images' positions, and what it does not go with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from sit.latents.datasets import Batch
from sit.training.config import TrainConfig
from sit.transport.meanflow import MeanFlow
from sit.transport.transport import Field, Transport
from sit.utils.errors import UserError
from sit.utils.random import generator

SET_ASIDE = (
    "MeanFlow takes derivatives in forward mode, which fused kernels lack: for these attention takes its slow path and "
    "ATConv plain operations, and the network is not compiled"
)


@dataclass(frozen=True)
class MeanFlowObjective:
    """The loss of :class:`MeanFlow`, with everything random taken from the batch or keyed by its positions.

    Attributes:
        meanflow: the objective.
        class_dropout: the probability of training an image without its label.
        null_label: the label that stands for none.
        seed: of the noise; keys the second of an image's two times.
    """

    meanflow: MeanFlow
    class_dropout: float
    null_label: int
    seed: int

    def __call__(self, model: Field, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Losses (b,), and the metric ``squared_error`` (b,): of an element, before the weight, which hides it."""
        first, positions = batch["t_uniform"], batch["positions"]
        second = [torch.rand((), generator=generator(self.seed, "end of the step", int(j))) for j in positions.cpu()]
        squared = self.meanflow.training_error(
            model,
            batch["latents"],
            batch["labels"],
            u=torch.stack([first, torch.stack(second).to(first)], dim=1),
            positions=positions,
            x0=batch["noise"],
            drop=batch["drop"],
            class_dropout=self.class_dropout,
            null_label=self.null_label,
        )
        return self.meanflow.weighted(squared), {"squared_error": squared / batch["latents"][0].numel()}


def make_meanflow(config: TrainConfig, transport: Transport, null_label: int) -> MeanFlowObjective:
    """The objective that ``config`` describes."""
    meanflow = MeanFlow(transport, **config.meanflow_options())
    return MeanFlowObjective(meanflow, config.class_dropout, null_label, config.seed_of("noise"))


def check_meanflow(config: TrainConfig) -> None:
    """Raise UserError unless the settings of MeanFlow go with the others."""
    if not config.averages:
        for field in dataclasses.fields(config):
            if field.name.startswith("meanflow_") and getattr(config, field.name) != field.default:
                raise UserError(f"`{field.name}` serves `prediction=average-velocity`, not {config.prediction}")
        return
    meanflow = MeanFlow(Transport(**config.transport_options()), **config.meanflow_options())
    if meanflow.guides and not config.class_dropout:
        raise UserError("`meanflow_omega` and `meanflow_kappa` guide away from no label: they need `class_dropout`")
    if config.preview_cfg_scale != TrainConfig().preview_cfg_scale:
        raise UserError("`preview_cfg_scale`: guidance is part of what MeanFlow trains: set `meanflow_omega` instead")
    if config.repa is not None:
        raise UserError("`repa` can't be added to `prediction=average-velocity`: leave one of them")
    if config.distill_from is not None:
        raise UserError("`distill_from` can't be added to `prediction=average-velocity`: leave one of them")
    if config.compile:
        raise UserError("`prediction=average-velocity` takes forward-mode derivatives, which `compile` has none of")
