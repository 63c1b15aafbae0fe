"""The moving average of the weights: which parameters have one, and a network that computes with it for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sit.model import SiT

PIECE = 2**16
"""Weights that are averaged at a time on a CPU: what lies between average and weights then stays in its cache."""


class MovingAverage(EMAModel):
    """diffusers' moving average, to the bit, whose step on a CPU makes no copy of all weights between."""

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Move on by one step, towards the parameters that it was made of."""
        parameters = list(parameters)
        pairs = list(zip(self.shadow_params, parameters, strict=True))
        if not all(_is_in_one_place_on_a_cpu(one) for pair in pairs for one in pair):
            super().step(parameters)
            return
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        weight = 1 - self.cur_decay_value
        for average, now in pairs:
            if average.numel() <= PIECE:
                average.sub_(average - now, alpha=weight)
                continue
            for part, its in zip(average.view(-1).split(PIECE), now.view(-1).split(PIECE), strict=True):
                part.sub_(part - its, alpha=weight)


def _is_in_one_place_on_a_cpu(tensor: torch.Tensor) -> bool:
    """Whether it can be cut into pieces: FSDP's tensors are shards on several processes."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not isinstance(tensor, DTensor)


def moving_average(parameters: Iterable[nn.Parameter], decay: float, warmup: bool) -> MovingAverage:
    """The exponential moving average of the parameters, which begins at their initial values.

    Args:
        parameters: what is averaged.
        decay: what the average keeps of itself at each step.
        warmup: begin with the first step's weights and let the decay rise to ``decay`` as (1 + step) / (10 + step).
            Without it the decay is the same from the first step on, as in the published training program.
    """
    options = {} if warmup else {"min_decay": decay, "update_after_step": -1}
    return MovingAverage(parameters, decay=decay, foreach=True, **options)


@torch.no_grad()
def step_average(ema: EMAModel, parameters: Sequence[nn.Parameter], weight: torch.Tensor) -> None:
    """Move the average by the share ``weight`` () of the way to the parameters, as ``ema.step`` does by 1 − decay.

    For a weight that only the device knows. It is not counted as one of the average's steps.
    """
    gaps = torch._foreach_sub(ema.shadow_params, parameters)
    torch._foreach_mul_(gaps, weight)
    torch._foreach_sub_(ema.shadow_params, gaps)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def averaged_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that have a moving average: those that sampling needs, not a projector's.

    A frozen one needs none, being its own average.
    """
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith(SiT.PROJECTOR)
    ]


def reshard(model: nn.Module) -> None:
    """Free the unsharded parameters that FSDP2 may hold, so that ``model`` has its shards again.

    After a forward pass the root module keeps them until a backward pass, which sampling never makes; other modules do
    if they are configured so.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # not recursive


@contextlib.contextmanager
def ema_weights(model: nn.Module, ema: EMAModel) -> Iterator[None]:
    """Within the block, ``model`` has the moving average's weights."""
    reshard(model)
    parameters = averaged_parameters(model)
    foreach, ema.foreach = ema.foreach, False  # sharded tensors know no foreach copy
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        reshard(model)
        ema.restore(parameters)
        ema.foreach = foreach
