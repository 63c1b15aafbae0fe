"""Interpolants and conversions against formulas written a second time in float64, and against derivatives taken."""

from __future__ import annotations

import formulas
import numpy as np
import pytest
import torch

from sit.transport.interpolants import get_interpolant
from sit.utils.errors import UserError

TIMES = torch.tensor([1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.96, 0.99, 0.999])


@pytest.mark.parametrize("name", formulas.INTERPOLANTS)
def test_coefficients_in_float32(name):
    path = get_interpolant(name)
    ours = (path.alpha(TIMES), path.sigma(TIMES), path.d_alpha(TIMES), path.d_sigma(TIMES))
    # the reference at the very float32 times: near an end their rounding is not the formula's doing
    for value, expected in zip(ours, formulas.coefficients(name, TIMES.double().numpy()), strict=True):
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", formulas.INTERPOLANTS)
def test_rates_are_the_derivatives(name):
    path, t = get_interpolant(name), TIMES.double().requires_grad_()
    for value, rate in ((path.alpha(t), path.d_alpha(t)), (path.sigma(t), path.d_sigma(t))):
        (derivative,) = torch.autograd.grad(value.sum(), t)
        torch.testing.assert_close(rate, derivative, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(path.d_log_alpha(t), path.d_alpha(t) / path.alpha(t), rtol=1e-9, atol=0)
    alpha, sigma, d_alpha, d_sigma = formulas.coefficients(name, t.detach().numpy())
    expected = sigma * (d_alpha * sigma / alpha - d_sigma)
    np.testing.assert_allclose(path.noise_rate(t).detach().numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("name", ("linear", "gvp"))
def test_from_noise_to_data(name):
    x1, x0 = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    path = get_interpolant(name)
    torch.testing.assert_close(path.interpolate(x1, x0, torch.zeros(3)), x0)
    torch.testing.assert_close(path.interpolate(x1, x0, torch.ones(3)), x1)


def test_vp_keeps_the_variance():
    path, t = get_interpolant("vp"), torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t))
    assert path.alpha(t[:1]) < 0.01 and path.sigma(t[-1:]) == 0


@pytest.mark.parametrize("name", formulas.INTERPOLANTS)
def test_conversions(name):
    """From known data and noise: x_t, velocity, noise and score = −noise/σ, each conversion giving the next."""
    path, count = get_interpolant(name), len(TIMES)
    x1, x0 = torch.randn(2, count, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = TIMES.double()
    alpha, sigma, d_alpha, d_sigma = (
        torch.from_numpy(value)[:, None, None, None] for value in formulas.coefficients(name, t.numpy())
    )
    x, velocity, score = alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0, -x0 / sigma
    close = dict(rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(path.interpolate(x1, x0, t), x, **close)
    torch.testing.assert_close(path.velocity(x1, x0, t), velocity, **close)
    torch.testing.assert_close(path.score_from_velocity(velocity, x, t), score, **close)
    torch.testing.assert_close(path.velocity_from_score(score, x, t), velocity, **close)
    torch.testing.assert_close(path.score_from_noise(x0, x, t), score, **close)


@pytest.mark.parametrize("name", formulas.INTERPOLANTS)
def test_score_at_pure_noise(name):
    """At t = 0, where α̇/α is infinite for two of them, the score from the velocity is that of the noise: −x."""
    path, x = get_interpolant(name), torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(2))
    t = torch.zeros(2)
    velocity = path.velocity(torch.zeros_like(x), x, t)
    score = path.score_from_velocity(velocity, x, t)
    torch.testing.assert_close(score, -x, rtol=1e-3 if name == "vp" else 1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ("Linear", "cosine", ""))
def test_unknown(name):
    with pytest.raises(UserError, match=f"`interpolant={name}` is none of linear, gvp, vp"):
        get_interpolant(name)
