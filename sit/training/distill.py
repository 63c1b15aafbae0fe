"""Distillation: for the first steps, a network is also drawn towards a trained one, its teacher.

What a network with other mixers needs to take over from one with attention (LiT, arXiv 2501.12976, distills the
prediction of a DiT into one with linear attention; the outputs of attention layers as targets of those that replace
them are LoLCATs', arXiv 2410.10254, section 3.1). The teacher sees the same x_t, t and labels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from sit.checkpoint.load import load_for_sampling
from sit.latents.datasets import Batch
from sit.latents.likeness import difference
from sit.model import SiT, mixer_specs
from sit.training.config import TrainConfig
from sit.training.objective import Objective
from sit.transport.transport import Field, Transport
from sit.utils.errors import UserError


@dataclass(frozen=True)
class Distillation:
    """The loss of another objective plus ``weight`` times how far the network is from its teacher, which is logged.

    For each image that is the mean squared difference of the predictions; and over the blocks that are new, the mean
    of the squared difference of the mixers' outputs as a share of the teacher's mean square.

    Attributes:
        base: the objective that the distance is added to.
        network: the one that is trained, itself and not its wrapper.
        teacher: in evaluation mode and without gradients.
        blocks: the numbers of the blocks whose mixers are new, from 0.
        weight: of the distance.
        until: the last step that it belongs to (:func:`sit.training.objective.at_step`).
        autocast: what the teacher runs in, made anew for each batch.
    """

    base: Objective
    network: SiT
    teacher: SiT
    blocks: tuple[int, ...]
    weight: float
    until: int
    autocast: Callable[[], AbstractContextManager]

    def __call__(self, model: Field, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Losses (b,) and the metrics ``distillation`` and, with new blocks, ``mixer_distillation``, each (b,)."""
        calls = []

        def network(x: torch.Tensor, t: torch.Tensor, **conditions) -> torch.Tensor:
            out = model(x, t, **conditions)
            calls.append((x, t, conditions, out))
            return out

        with outputs_of(self.network, self.blocks) as own:
            loss, metrics = self.base(network, batch)
        ((x, t, conditions, out),) = calls
        with torch.no_grad(), self.autocast(), outputs_of(self.teacher, self.blocks) as given:
            target = self.teacher(x, t, **conditions)
        distance = (out.float() - target.float()).square().flatten(1).mean(1)
        metrics = metrics | {"distillation": distance}
        if self.blocks:
            shares = [relative_error(mine, theirs) for mine, theirs in zip(own, given, strict=True)]
            metrics["mixer_distillation"] = torch.stack(shares).mean(0)
            distance = distance + metrics["mixer_distillation"]
        return loss + self.weight * distance, metrics


def relative_error(found: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of each image, the mean square of ``found − target`` over that of ``target``: (B, N, C) twice to (B,) float32."""
    found, target = found.float().flatten(1), target.float().flatten(1)
    return (found - target).square().mean(1) / target.square().mean(1).clamp_min(1e-12)


@contextlib.contextmanager
def outputs_of(network: SiT, blocks: Sequence[int]) -> Iterator[list[torch.Tensor]]:
    """Within the block, the list gets the mixers' outputs (B, N, C) of these blocks as the network computes them."""
    outputs: list[torch.Tensor] = []
    with contextlib.ExitStack() as stack:
        for number in blocks:
            hook = network.blocks[number].attn.register_forward_hook(
                lambda mixer, inputs, output: outputs.append(output)
            )
            stack.callback(hook.remove)
        yield outputs


def new_blocks(network: SiT, teacher: SiT) -> tuple[int, ...]:
    """The numbers of the blocks, from 0, whose mixer is another than the teacher's in the same place."""
    own, given = mixer_specs(network.config), mixer_specs(teacher.config)
    count = min(len(network.blocks), len(teacher.blocks))
    return tuple(n for n in range(count) if own[n % len(own)] != given[n % len(given)])


def distill(
    base: Objective,
    network: SiT,
    config: TrainConfig,
    *,
    transport: Transport,
    classes: Sequence[str],
    vae: str,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> Distillation:
    """Add the distillation that ``config`` asks for to an objective.

    Raises:
        UserError: the teacher can't be read, or its prediction is not one of the network's: of other latents, as far as
            the files here tell, classes, or another transport.
    """
    name = f"`distill_from={config.distill_from}`"
    loaded = load_for_sampling(config.distill_from, device=device)
    teacher = nn.Module.to(loaded.model, torch.float32)
    for what, then, now in (
        ("channels", teacher.config.in_channels, network.config.in_channels),
        ("classes", teacher.config.num_classes, network.config.num_classes),
        ("interpolant", loaded.transport.config.interpolant, transport.config.interpolant),
        ("prediction", loaded.transport.prediction, transport.prediction),
    ):
        if then != now:
            raise UserError(f"{name} can't teach this network: {what} {then}, not {now}")
    if network.config.null_class and not teacher.config.null_class:
        raise UserError(f"{name} knows no images without a label: give `class_dropout=0`")
    names = loaded.info.label_names
    if names and classes and list(names) != list(classes):
        raise UserError(f"{name} can't teach this network: its classes have other names, or another order")
    if loaded.vae_source is not None and (found := difference(vae, loaded.vae_source)) is not None:
        raise UserError(f"{name} can't teach this network: its latents are {found}, not of `vae={vae}`")
    blocks = new_blocks(network, teacher)
    same_tokens = ("patch_size", "hidden_size")
    if blocks and any(teacher.config[key] != network.config[key] for key in same_tokens):
        blocks = ()  # the predictions alone can be compared
    return Distillation(base, network, teacher, blocks, config.distill_weight, config.distill_steps, autocast)
