"""Muon for the matrices inside the blocks, with AdamW for all else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

CONDITIONING = "adaLN_modulation"
"""Layers of a block whose outputs are shifts, scales and gates: what is a norm's affine parameter elsewhere."""


def hidden_matrices(network: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of the linear layers in a network's blocks that map tokens to tokens, if they are trained.

    Muon is for hidden matrices, and embeddings, heads, biases and norms are AdamW's (Keller Jordan, "Muon: an optimizer
    for hidden layers in neural networks", 2024). So the mixers' and the MLPs' linear layers are Muon's, each weight as
    it is stored, queries, keys and values in one. adaLN's are not, as they make norms' parameters, nor are kernels of
    convolutions, which mix no channels.
    """
    for name, module in network.named_modules():
        inside = name.startswith("blocks.") and CONDITIONING not in name.split(".")
        if inside and isinstance(module, nn.Linear) and module.weight.requires_grad:
            yield module.weight


class MuonWithAdamW(torch.optim.Optimizer):
    """PyTorch's Muon for some parameters and its AdamW for others, with one learning rate.

    Muon's steps are as large as AdamW's are wont to be: their root mean square is 0.2 times the learning rate
    ("Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2; PyTorch's ``match_rms_adamw``). Its momentum is
    Nesterov's of 0.95, the published one.

    Like fused AdamW it has the attribute ``found_inf`` while a step may have to be left out: a tensor () that is 1 if
    so, which the host doesn't read.

    Args:
        matrices: of two dimensions; at least one.
        others: may be empty.
        lr: the learning rate of both.
        betas: AdamW's.
        weight_decay: decoupled, of both.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        both: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **both),
        ]
        if others:
            self.parts.append(torch.optim.AdamW(others, betas=betas, fused=True, **both))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step with each; ``closure`` is not for it."""
        if closure is not None:
            raise TypeError("this optimizer evaluates no closure")
        skip = getattr(self, "found_inf", None)
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.state = self.state  # both are other objects once a state was loaded
            if isinstance(part, torch.optim.Muon):
                for matrix in group["params"]:
                    part.param_groups = [group | {"params": [matrix]}]
                    self._step_of_one(part, matrix, skip)
            else:
                part.param_groups = [group]
                part.found_inf = skip  # type: ignore[attr-defined]
                part.step()

    def _step_of_one(self, part: torch.optim.Optimizer, matrix: nn.Parameter, skip: torch.Tensor | None) -> None:
        """Muon's step of one matrix, which is taken back where ``skip`` is 1: Muon itself knows no ``found_inf``."""
        if skip is None or matrix.grad is None:
            part.step()
            return
        momentum = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix.grad))
        changed = (matrix, momentum)
        before = [tensor.clone() for tensor in changed]
        part.step()
        for tensor, as_it_was in zip(changed, before, strict=True):
            tensor.copy_(torch.where(skip.bool(), as_it_was, tensor))
