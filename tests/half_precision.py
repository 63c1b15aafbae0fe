"""How near a network of half-precision weights is to one of the same weights in float32."""

from __future__ import annotations

import torch
from torch import nn


def assert_near(networks: tuple[nn.Module, nn.Module], losses: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The first's losses (B,), in float32, and its gradients, in the dtype of its weights, are near the second's."""
    found, expected = losses
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0)
    for loss in losses:
        loss.mean().backward()
    for one, other in zip(*(network.parameters() for network in networks), strict=True):
        assert one.grad.dtype == one.dtype != torch.float32
        assert (one.grad - other.grad).norm() <= 0.05 * other.grad.norm()
