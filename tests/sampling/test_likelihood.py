"""The likelihood of latents of other dtypes, and where no gradients are taken."""

from __future__ import annotations

import contextlib

import pytest
import torch

from sit.model import SiT
from sit.sampling.config import SamplerConfig
from sit.sampling.guidance import GuidedModel
from sit.sampling.likelihood import log_likelihood, random_signs
from sit.transport.transport import Transport

CONFIG = SamplerConfig("ode", 4, "heun2", cfg_scale=1.5)


def network() -> SiT:
    model = SiT(4, 1, 4, 16, 2, 2, num_classes=3, mixer="attention,atconv", learn_sigma=False, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("final_layer"):
                parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    return model


def likelihood(model: SiT, dtype: torch.dtype = torch.float32, mode=contextlib.nullcontext) -> torch.Tensor:
    """That of the same two latents and probes, everything besides the weights made within the mode."""
    with mode():
        source = torch.Generator().manual_seed(0)
        x = torch.randn(2, 4, 4, 4, generator=source).bfloat16().to(dtype)
        guided = GuidedModel(model, torch.tensor([0, 2]), CONFIG)
        return log_likelihood(guided, Transport(), x, CONFIG, random_signs(2, x, source))[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_latents_of_any_dtype_are_integrated_in_float32_at_least(dtype):
    """The latents can be said in all of them, so that nothing else differs."""
    model, wide = network(), torch.promote_types(dtype, torch.float32)
    found = likelihood(model, dtype)
    assert found.dtype == wide
    exact = wide == torch.float32
    torch.testing.assert_close(found.float(), likelihood(model), rtol=0 if exact else 1e-4, atol=0)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("trained", [True, False])
def test_it_takes_its_derivatives_whatever_the_mode(mode, trained):
    model = network().requires_grad_(trained)
    found = likelihood(model, mode=mode)
    assert torch.equal(found, likelihood(model)) and not found.requires_grad and not found.is_inference()
