"""Samplers: trajectories against loops in NumPy, distributions known in closed form, guidance, keyed samples."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from fractions import Fraction
from functools import partial
from pathlib import Path

import formulas
import numpy as np
import pytest
import torch

from sit.metrics.arguments import Arguments as EvaluationArguments
from sit.model import SiT
from sit.sampling.arguments import Arguments
from sit.sampling.config import ODE_METHODS, SDE_METHODS, TOLERANT_METHODS, SamplerConfig
from sit.sampling.guidance import times
from sit.sampling.likelihood import bits_per_dimension, log_likelihood, random_signs
from sit.sampling.sampler import KeyedNoise, generate, grouped, sample
from sit.sampling.sde import DIFFUSION_FORMS, LAST_STEPS, sample_sde, sde_times
from sit.transport.interpolants import expand_t_like_x, get_interpolant
from sit.transport.transport import Transport
from sit.utils.errors import UserError

SHAPE = (2, 4, 2, 3)


def network(x, t, y=None):
    """A stand-in for a network, for tensors and arrays alike; its null class is 5."""
    t = t.reshape(-1, 1, 1, 1)
    return 0.7 * x - 0.3 * t * x / (1 + x**2) + t + (0 if y is None else 0.1 * y.reshape(-1, 1, 1, 1))


network.null_label = 5


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------------- trajectories


def loop(interpolant, prediction, config, x, noises, labels):
    """The SDE with its last step as a NumPy loop over the published times."""
    x, labels = x.double().numpy(), labels.numpy()
    late = prediction != "velocity" or config.diffusion_form == "sbdm"
    start = 1e-3 if late and interpolant != "vp" else 0.0
    end = 1 - config.last_step_size
    if config.last_step == "none":
        end = 1.0 if interpolant != "vp" and prediction == "velocity" else 0.999
        if config.method == "heun":
            end = 0.999  # not at the singular end
    steps = config.steps - (config.last_step != "none")
    times = np.linspace(start, end, steps + 1).astype(np.float32).astype(np.float64)  # as published
    dt, end = np.float64(np.float32(times[1] - times[0])), times[-1]

    def fields(x, t):
        out = network(x, np.full(len(x), t), labels)
        return formulas.velocity_and_score(interpolant, prediction, out, x, t)

    def weight(t):
        with np.errstate(all="ignore"):
            return formulas.diffusion(config.diffusion_form, interpolant, config.diffusion_norm, t)

    def drift(x, t):
        velocity, score = fields(x, max(t, 1e-12))
        return velocity + weight(max(t, 1e-12)) * score

    states = []
    for t, noise in zip(times[:-1], noises, strict=False):
        kick = np.sqrt(2 * weight(t) * dt) * noise.double().numpy()
        if config.method == "heun":
            x = x + kick
            first = drift(x, t)
            x = x + dt * (first + drift(x + dt * first, t + dt)) / 2
        else:
            x = x + dt * drift(x, t) + kick
        states.append(x)
    if config.last_step != "none":
        velocity, score = fields(x, end)
        alpha, sigma, _, _ = formulas.coefficients(interpolant, end)
        x = {
            "mean": lambda: x + config.last_step_size * (velocity + weight(end) * score),
            "euler": lambda: x + config.last_step_size * velocity,
            "tweedie": lambda: (x + sigma**2 * score) / alpha,
        }[config.last_step]()
        states.append(x)
    return states


@pytest.mark.parametrize("interpolant", formulas.INTERPOLANTS)
@pytest.mark.parametrize("prediction", formulas.PREDICTIONS)
def test_sde_trajectories(interpolant, prediction):
    """Every state, for both methods, the six forms with a norm, and the four last steps."""
    transport, labels, noises = Transport(interpolant, prediction), torch.tensor([1, 3]), normal(6, *SHAPE, seed=1)
    for method in SDE_METHODS:
        for form in DIFFUSION_FORMS:
            for last_step in LAST_STEPS:
                config = SamplerConfig(
                    steps=6, method=method, diffusion_form=form, diffusion_norm=0.8, last_step=last_step,
                    last_step_size=0.05,
                )  # fmt: skip
                states, asked = [], []

                def step_noise(k, asked=asked):
                    asked.append(k)
                    return noises[k]

                def on_step(step, total, x, t, states=states):
                    assert (step, total) == (len(states) + 1, 6)
                    states.append(x.numpy())

                end = sample(network, transport, normal(*SHAPE), labels, config, step_noise=step_noise, on_step=on_step)
                assert asked == list(range(6 if last_step == "none" else 5))
                expected = loop(interpolant, prediction, config, normal(*SHAPE), noises, labels)
                assert len(states) == len(expected) and np.array_equal(states[-1], end.numpy())
                for ours, theirs in zip(states, expected, strict=True):
                    error = np.abs(ours - theirs).max() / max(1, np.abs(theirs).max())
                    assert error < 1e-5, (method, form, last_step, error)


def test_float32_and_half_precision():
    """Integration is in float32 even if the noise or the network is not, and agrees with float64."""
    seen = []

    def half(x, t, y):
        seen.append((x.dtype, t.dtype))
        return network(x.float(), t, y).to(torch.bfloat16)

    half.dtype = torch.bfloat16
    labels, noises, config = torch.tensor([1, 3]), normal(20, *SHAPE, seed=1), SamplerConfig(steps=20)
    exact = sample(network, Transport(), normal(*SHAPE), labels, config, step_noise=lambda k: noises[k])
    single = sample(
        network, Transport(), normal(*SHAPE).float(), labels, config, step_noise=lambda k: noises[k].float()
    )
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)
    rough = sample(
        half, Transport(), normal(*SHAPE).bfloat16(), labels, config, step_noise=lambda k: noises[k].bfloat16()
    )
    assert rough.dtype == torch.float32 and set(seen) == {(torch.bfloat16, torch.float32)}
    torch.testing.assert_close(rough.double(), exact, rtol=0, atol=0.1)


@pytest.mark.parametrize("sampler, method", [("sde", "euler"), ("ode", "heun2"), ("ode", "dopri5")])
def test_no_images(sampler, method):
    config = SamplerConfig(sampler=sampler, method=method, steps=3, cfg_scale=1.5)
    noise, labels = torch.randn(0, 4, 8, 8), torch.zeros(0, dtype=torch.long)
    assert sample(small_network("atconv"), Transport(), noise, labels, config).shape == (0, 4, 8, 8)


@pytest.mark.parametrize("sampler, method, last_step, evaluations", [
    ("sde", "euler", "mean", 7), ("sde", "heun", "mean", 13), ("sde", "euler", "none", 7), ("sde", "heun", "none", 14),
    ("ode", "euler", "mean", 7), ("ode", "heun2", "mean", 14), ("ode", "midpoint", "mean", 14),
    ("ode", "rk4", "mean", 28),
])  # fmt: skip
def test_what_steps_counts(sampler, method, last_step, evaluations):
    calls, steps = [], []

    def counting(x, t, y):
        calls.append(float(t[0]))
        return network(x, t, y)

    config = SamplerConfig(sampler=sampler, method=method, last_step=last_step, steps=7)
    on_step = lambda step, total, x, t: steps.append((step, total))  # noqa: E731
    sample(counting, Transport(), normal(*SHAPE), torch.tensor([1, 2]), config, on_step=on_step)
    assert len(calls) == evaluations and 0 <= min(calls) and max(calls) <= 1
    assert steps == [(step, 7) for step in range(1, 8)]


@pytest.mark.parametrize("sampler, method, reverse", [
    ("sde", "euler", False), ("ode", "heun2", False), ("ode", "heun2", True), ("ode", "dopri5", False),
    ("ode", "dopri5", True),
])  # fmt: skip
def test_the_time_of_each_state(sampler, method, reverse):
    """Under the velocity 1 + t the ODE's state at t is x + t + t²/2; the SDE without noise goes by its Euler steps."""
    states = []
    of_sde = dict(diffusion_norm=0.0, last_step_size=0.1) if sampler == "sde" else {}
    config = SamplerConfig(sampler=sampler, method=method, steps=8, **of_sde)
    on_step = lambda step, total, x, t: states.append((float(t), x.clone()))  # noqa: E731
    rise = lambda x, t, y: (1 + t).view(-1, 1, 1, 1).expand_as(x)  # noqa: E731
    start = normal(*SHAPE)
    end = sample(rise, Transport(), start, torch.tensor([1, 2]), config, on_step=on_step, reverse=reverse)
    first, last = (1.0, 0.0) if reverse else (0.0, 1.0)
    assert states[-1][0] == last and torch.equal(states[-1][1], end)
    before, rising = first, 0.0
    for t, x in states:
        rising = rising + (1 + before) * (t - before) if sampler == "sde" else t + t * t / 2 - first - first**2 / 2
        torch.testing.assert_close(x, start + rising, rtol=0, atol=1e-6)
        before = t


# ---------------------------------------------------------------------- known distributions

MEAN, DEVIATION = 0.8, 0.6


def within(interpolant, t):
    """Adaptive solvers look beyond the end; a network can be asked for t > 1, but VP's formulas can't."""
    return t.clamp(max=1 - 1e-6) if interpolant == "vp" else t


def gaussian(interpolant):
    """Exact velocity field of data N(MEAN, DEVIATION²), of float64 tensors."""
    path = get_interpolant(interpolant)

    def velocity(x, t, y=None):
        t = within(interpolant, torch.as_tensor(t).double()).reshape(-1, *[1] * (x.ndim - 1))
        alpha, sigma, d_alpha, d_sigma = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
        variance = (alpha * DEVIATION) ** 2 + sigma**2
        rate = alpha * d_alpha * DEVIATION**2 + sigma * d_sigma
        return d_alpha * MEAN + rate / variance * (x - alpha * MEAN)

    def moved(x, start, end):
        """Where the flow takes x from time start to time end."""
        (a0, s0, _, _), (a1, s1, _, _) = (formulas.coefficients(interpolant, t) for t in (start, end))
        ratio = math.hypot(a1 * DEVIATION, s1) / math.hypot(a0 * DEVIATION, s0)
        return a1 * MEAN + ratio * (x - a0 * MEAN)

    return velocity, moved


@pytest.mark.parametrize("method", ODE_METHODS)
def test_every_ode_method(method):
    """To the exact flow of a Gaussian, forward; and back to where it came from."""
    for interpolant in ("linear", "gvp"):
        velocity, moved = gaussian(interpolant)
        config = SamplerConfig(sampler="ode", method=method, steps=60, atol=1e-7, rtol=1e-6)
        noise = normal(*SHAPE)
        data = sample(velocity, Transport(interpolant), noise, None, config)
        tolerance = 0.08 if method in ("euler", "implicit_euler") else 5e-3
        torch.testing.assert_close(data, moved(noise, 0, 1), rtol=0, atol=tolerance)
        back = sample(velocity, Transport(interpolant), data, None, config, reverse=True)
        torch.testing.assert_close(back, noise, rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize("interpolant", formulas.INTERPOLANTS)
def test_forward_and_back(interpolant):
    """Image to noise and back by dopri5, for the published intervals of every prediction."""
    for prediction in formulas.PREDICTIONS:
        transport = Transport(interpolant, prediction)
        velocity, moved = gaussian(interpolant)

        def model(x, t, y=None, velocity=velocity, transport=transport, prediction=prediction):
            out, path, t = velocity(x, t), transport.interpolant, within(transport.config.interpolant, t)
            if prediction == "velocity":
                return out
            score = path.score_from_velocity(out, x, t)
            return score if prediction == "score" else -score * path.sigma(expand_t_like_x(t, x))

        config, image = SamplerConfig(sampler="ode", rtol=1e-6, atol=1e-7), normal(*SHAPE)
        noise = sample(model, transport, image, None, config, reverse=True)
        start, end = transport.ode_interval()
        torch.testing.assert_close(noise, moved(image, end, start), rtol=0, atol=1e-4)
        torch.testing.assert_close(sample(model, transport, noise, None, config), image, rtol=0, atol=1e-4)


MEANS, DEVIATIONS, WEIGHTS = np.array([-1.0, 0.2, 1.4]), np.array([0.3, 0.4, 0.25]), np.array([0.4, 0.25, 0.35])


def mixture(interpolant, evaluations=None):
    def velocity(x, t, y=None):
        if evaluations is not None:
            evaluations.append(1)
        time = float(within(interpolant, t[0]))
        return torch.from_numpy(formulas.mixture_velocity(interpolant, x.numpy(), time, MEANS, DEVIATIONS, WEIGHTS))

    return velocity


def mixture_moments(interpolant, time):
    """Mean and second moment of x_t."""
    alpha, sigma, _, _ = formulas.coefficients(interpolant, time)
    means, variances = alpha * MEANS, (alpha * DEVIATIONS) ** 2 + sigma**2
    return np.array([(WEIGHTS * means).sum(), (WEIGHTS * (means**2 + variances)).sum()])


def quantiles(count):
    """Noise whose empirical distribution is the normal's: no Monte-Carlo error, only that of the sum (~1e-5)."""
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (math.sqrt(2) * torch.erfinv(2 * levels - 1)).reshape(1, 1, 1, count)


@functools.cache
def exactly(interpolant):
    """Where 4000 quantiles go, by many steps of high order."""
    return sample(mixture(interpolant), Transport(interpolant), quantiles(4000), None, SamplerConfig("ode", 400, "rk4"))


@pytest.mark.parametrize("interpolant", formulas.INTERPOLANTS)
@pytest.mark.parametrize("method, order", [("euler", 1), ("heun2", 2), ("midpoint", 2)])
def test_order_of_ode_solvers_on_a_mixture(interpolant, method, order):
    transport, noise = Transport(interpolant), quantiles(4000)
    start, end = transport.ode_interval()
    exact = exactly(interpolant)
    reached = np.array([exact.mean(), exact.square().mean()])
    # the VP's noise is not quite standard at t = 0, which no solver can mend
    np.testing.assert_allclose(reached, mixture_moments(interpolant, end), atol=0.02 if interpolant == "vp" else 5e-4)
    counts = (80, 160, 320) if interpolant == "vp" else (40, 80, 160)
    errors = []
    for steps in counts:
        x = sample(mixture(interpolant), transport, noise, None, SamplerConfig("ode", steps, method))
        errors.append((x - exact).abs().mean().item())
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert errors[-1] < 0.05 and np.all(np.abs(slopes - order) < 0.3), (errors, slopes)


@pytest.mark.parametrize("interpolant", formulas.INTERPOLANTS)
def test_dopri5_to_its_tolerance_on_a_mixture(interpolant):
    transport, noise = Transport(interpolant), quantiles(1000)
    exact = sample(mixture(interpolant), transport, noise, None, SamplerConfig("ode", rtol=1e-10, atol=1e-11))
    errors, costs = [], []
    for rtol in (1e-3, 1e-5, 1e-7):
        evaluations = []
        config = SamplerConfig("ode", rtol=rtol, atol=rtol / 10)
        x = sample(mixture(interpolant, evaluations), transport, noise, None, config)
        errors.append((x - exact).square().mean().sqrt().item())
        costs.append(len(evaluations))
        assert errors[-1] < 100 * rtol, (rtol, errors)  # the tolerance is one step's
    assert costs[0] < costs[1] < costs[2] < 1000


@pytest.mark.parametrize("interpolant", formulas.INTERPOLANTS)
@pytest.mark.parametrize("method", SDE_METHODS)
def test_weak_order_of_sde_solvers(interpolant, method):
    """Order 1 in distribution. On a Gaussian the sampler is affine in its noises: moments are had without chance.

    Row k of the batch gets only the noise of step k; the variance is the sum of the squares of what comes out.
    """
    velocity, _ = gaussian(interpolant)
    transport = Transport(interpolant)
    errors = []
    for steps in (40, 80, 160):
        config = SamplerConfig(steps=steps, method=method, last_step="none", diffusion_form="linear")
        impulse = lambda k, steps=steps: torch.eye(steps + 2, dtype=torch.float64)[:, k + 1].reshape(-1, 1, 1, 1)  # noqa: E731
        alpha, sigma, _, _ = formulas.coefficients(interpolant, sde_times(transport, config)[0])
        start = torch.full((steps + 2, 1, 1, 1), float(alpha * MEAN), dtype=torch.float64)
        start[0] += math.hypot(alpha * DEVIATION, sigma)
        out = sample(velocity, transport, start, None, config, step_noise=impulse).flatten()
        mean, spread = out[-1], out[:-1] - out[-1]
        alpha, sigma, _, _ = formulas.coefficients(interpolant, sde_times(transport, config)[-1])
        variance = spread.square().sum().item()
        errors.append(math.hypot(variance - (alpha * DEVIATION) ** 2 - sigma**2, mean.item() - alpha * MEAN))
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert errors[-1] < 0.01 and np.all(slopes > 0.75), (errors, slopes)


@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize("interpolant", formulas.INTERPOLANTS)
def test_sde_reaches_the_mixture(interpolant, form):
    """All forms have the same marginals: moments within the error of 10,000 samples and 200 steps."""
    source, transport = torch.Generator().manual_seed(4), Transport(interpolant)
    draw = lambda step=0: torch.randn(1, 1, 1, 10_000, generator=source, dtype=torch.float64)  # noqa: E731
    config = SamplerConfig(steps=200, diffusion_form=form, last_step="mean", last_step_size=0.005)
    x = sample(mixture(interpolant), transport, draw(), None, config, step_noise=draw)
    moments = np.array([x.mean(), x.square().mean()])
    np.testing.assert_allclose(moments, mixture_moments(interpolant, 1 - 1e-6), atol=0.05)


# ---------------------------------------------------------------------- guidance


def test_guidance():
    """Scale, channels, and the interval outside which the network is not run on the null class at all."""
    labels, x, batches = torch.tensor([1, 3]), normal(*SHAPE), []

    def watched(x, t, y):
        batches.append((float(t[0]), len(x)))
        return network(x, t, y)

    watched.null_label = 5
    for channels in (3, 0):
        config = SamplerConfig("ode", 1, "euler", cfg_scale=2.5, cfg_channels=channels)
        ours = sample(watched, Transport(), x, labels, config) - x
        null, with_label = network(x, torch.zeros(2), torch.tensor([5, 5])), network(x, torch.zeros(2), labels)
        expected = null + 2.5 * (with_label - null)
        if channels:
            expected[:, 3:] = with_label[:, 3:]
        torch.testing.assert_close(ours, expected)
    assert [size for _, size in batches] == [4, 4]

    batches.clear()
    config = SamplerConfig(steps=11, last_step_size=0.1, cfg_scale=2.0, cfg_interval=(0.25, 0.65))
    guided = sample(watched, Transport(), x, labels, config, step_noise=lambda k: torch.zeros_like(x))
    assert [size for _, size in batches] == [4 if 0.25 <= 1 - t <= 0.65 else 2 for t, _ in batches]
    assert {size for _, size in batches} == {2, 4}
    batches.clear()
    config = SamplerConfig(steps=11, last_step_size=0.1)
    plain = sample(watched, Transport(), x, labels, config, step_noise=lambda k: torch.zeros_like(x))
    assert {size for _, size in batches} == {2} and not torch.allclose(plain, guided)


@pytest.mark.parametrize(
    "interval, guided",
    [
        ((0.25, 0.5), [0.5, 0.75]),
        ((0.5, 0.75), [0.25, 0.5]),
        ((0.5, 0.5), [0.5]),
        ((0.3, 0.45), []),
        ((0.0, 0.25), [0.75]),
        ((1.0, 1.0), [0.0]),
        ((0.0, 0.99), [0.25, 0.5, 0.75]),
        ((0.26, 1.0), [0.0, 0.25, 0.5]),
        ((0.0, 1.0), [0.0, 0.25, 0.5, 0.75]),
    ],
)
def test_the_bounds_of_the_guided_interval_belong_to_it(interval, guided):
    """Four steps at times t = 0, 1/4, 1/2, 3/4, which are noise levels 1, 3/4, 1/2, 1/4: exact in binary."""
    found = []

    def watched(x, t, y):
        found.append((float(t[0]), len(x)))
        return network(x, t, y)

    watched.null_label = 5
    config = SamplerConfig("ode", 4, "euler", cfg_scale=2.0, cfg_interval=interval)
    sample(watched, Transport(), normal(*SHAPE), torch.tensor([1, 3]), config)
    assert found == [(t, 4 if t in guided else 2) for t in (0.0, 0.25, 0.5, 0.75)]


def guided_steps(config: SamplerConfig) -> list[bool]:
    """Of each network evaluation, whether it was guided."""
    sizes = []

    def watched(x, t, y):
        sizes.append(len(x))
        return x

    watched.null_label = 5
    sample(watched, Transport(), torch.zeros(1, 1, 1, 1), torch.tensor([1]), config)
    return [size == 2 for size in sizes]


@pytest.mark.parametrize("steps", [10, 50, 250])
def test_a_bound_on_the_time_grid_is_where_exact_fractions_have_it(steps):
    """Bounds in tenths, on grids whose times no floating-point number has: compared as fractions."""
    tenths = [Fraction(n, 10) for n in range(11)]
    for low, high in ((a, b) for a in tenths[::3] for b in tenths if a <= b):
        interval = (float(low), float(high))
        ode = [low <= 1 - Fraction(k, steps) <= high for k in range(steps)]
        assert guided_steps(SamplerConfig("ode", steps, "euler", cfg_scale=2.0, cfg_interval=interval)) == ode, interval
        levels = [1 - Fraction(96, 100) * k / (steps - 1) for k in range(steps)]  # the last step is from 0.04
        sde = [low <= level <= high for level in levels]
        assert guided_steps(SamplerConfig(steps=steps, cfg_scale=2.0, cfg_interval=interval)) == sde, interval
    at_last = SamplerConfig(steps=steps, cfg_scale=2.0, cfg_interval=(0.0, 0.04))
    assert guided_steps(at_last) == [False] * (steps - 1) + [True]


def test_an_upper_bound_above_one_is_always():
    """As REPA's ``--guidance-high 3.0``."""
    always = SamplerConfig(cfg_scale=2.0, cfg_interval=(0.2, 3.0))
    assert always == SamplerConfig(cfg_scale=2.0, cfg_interval=(0.2, 1.0))
    assert guided_steps(dataclasses.replace(always, steps=7, cfg_interval=(0, 3.0))) == [True] * 7


def test_guidance_needs_a_null_class():
    model = SiT(4, 2, 4, 16, 1, 2, num_classes=3, null_class=False)
    with pytest.raises(UserError, match="no null class"):
        sample(model, Transport(), torch.zeros(1, 4, 4, 4), torch.tensor([0]), SamplerConfig(cfg_scale=2.0))


# ---------------------------------------------------------------------- likelihood


@pytest.mark.parametrize("interpolant", ("linear", "gvp", "vp"))
def test_likelihood_of_a_gaussian(interpolant):
    """The velocity's Jacobian is diagonal, so that one probe of signs gives the divergence exactly."""
    velocity, _ = gaussian(interpolant)
    x = MEAN + DEVIATION * normal(5, 3, 4, 4, seed=6)
    config = SamplerConfig("ode", rtol=1e-6, atol=1e-8)
    probes = random_signs(1, x, torch.Generator().manual_seed(7))
    found, noise = log_likelihood(lambda x, t: velocity(x, times(t, x)), Transport(interpolant), x, config, probes)
    density = -0.5 * ((x - MEAN) / DEVIATION) ** 2 - math.log(DEVIATION * math.sqrt(2 * math.pi))
    tolerance = 0.05 if interpolant == "vp" else 1e-3  # at t = 1 - 1e-3, VP's data are still slightly noisy
    torch.testing.assert_close(found, density.flatten(1).sum(1), rtol=0, atol=tolerance * 48)
    fixed, _ = log_likelihood(
        lambda x, t: velocity(x, times(t, x)), Transport(interpolant), x, SamplerConfig("ode", 200, "rk4"), probes
    )
    torch.testing.assert_close(fixed, found, rtol=1e-3, atol=1e-2)
    bits = bits_per_dimension(torch.tensor([-48 * math.log(2) * 3.5]), 48)
    torch.testing.assert_close(bits, torch.tensor([3.5]))


def test_hutchinson_estimate():
    """With a full Jacobian the estimate is right on average: data N(0, Σ) with correlated coordinates."""
    mixing = torch.tensor([[1.0, 0.0], [0.6, 0.5]], dtype=torch.float64)
    covariance = mixing @ mixing.T

    def velocity(x, t):
        variance = t**2 * covariance + (1 - t) ** 2 * torch.eye(2, dtype=x.dtype)
        return x @ torch.linalg.solve(variance, t * covariance - (1 - t) * torch.eye(2, dtype=x.dtype))

    x = normal(6, 2, seed=8) @ mixing.T
    probes = random_signs(400, x, torch.Generator().manual_seed(9))
    found, _ = log_likelihood(velocity, Transport(), x, SamplerConfig("ode", 20, "rk4"), probes)
    exact = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=x.dtype), covariance).log_prob(x)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.1)
    with pytest.raises(UserError, match="`sampler=ode`"):
        log_likelihood(velocity, Transport(), x, SamplerConfig(), probes)


def test_the_example_of_the_docs():
    """Inversion comes back to the latents, and the likelihood is a number."""
    page = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    latents, labels = normal(*SHAPE), torch.tensor([1, 3])
    names = dict(torch=torch, model=network, transport=Transport(), latents=latents, labels=labels)
    exec(compile(block, "docs/sampling.md", "exec"), names)
    torch.testing.assert_close(names["again"], latents, rtol=0, atol=1e-3)
    assert not torch.allclose(names["noise"], latents, atol=0.1)
    assert names["bits"].shape == (2,) and names["bits"].isfinite().all()


# ---------------------------------------------------------------------- samples by number


def small_network(mixer):
    torch.manual_seed(0)
    model = SiT(8, 1, 4, 96, 2, 3, num_classes=10, mixer=mixer).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def made(model, indices, batch_size, config):
    parts = list(
        generate(
            model, Transport(), torch.tensor(indices), torch.tensor(indices) % 10, seed=3, config=config,
            latent_shape=(4, 8, 8), device="cpu", batch_size=batch_size,
        )
    )  # fmt: skip
    assert torch.cat([part[0] for part in parts]).tolist() == list(indices)
    assert all(len(part[0]) == len(part[1]) <= batch_size for part in parts)
    return torch.cat([part[1] for part in parts])


@pytest.mark.parametrize("mixer", ("attention", "atconv"))
@pytest.mark.parametrize(
    "config",
    [
        SamplerConfig(steps=3, cfg_scale=2.0),
        SamplerConfig("ode", 2, "euler"),
        SamplerConfig("ode", atol=0.1, rtol=0.1),
    ],
    ids=("sde", "ode-euler", "dopri5"),
)
def test_same_sample_whatever_the_batch(mixer, config):
    model = small_network(mixer)
    whole = made(model, range(17), 16, config)
    for batch_size in (3, 7):
        assert torch.equal(made(model, range(17), batch_size, config), whole), batch_size
    assert torch.equal(made(model, [0, 7, 16], 1, config), whole[[0, 7, 16]])
    some = [16, 2, 18, 5, 9]  # two of them of the same row
    assert torch.equal(made(model, some, 5, config)[[0, 1, 3, 4]], whole[[16, 2, 5, 9]])
    assert not torch.equal(whole[0], whole[10])  # of the same class


def test_groups():
    assert list(grouped(range(3, 8), 4)) == [([0, 1, 2, 3], [3, 0, 1, 2]), ([4], [3])]
    assert list(grouped([0, 4, 1], 4)) == [([0], [0]), ([1, 2], [0, 1])]


def test_an_accelerator_sees_one_batch_size():
    """A compiled network is compiled for it; the meta device stands for an accelerator."""
    with torch.device("meta"):
        model = SiT(8, 1, 4, 32, 1, 2, num_classes=10).eval()
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    options = dict(seed=0, config=SamplerConfig("ode", 2, "euler"), latent_shape=(4, 8, 8), device="meta")
    made = list(generate(model, Transport(), torch.arange(10), torch.arange(10), batch_size=4, **options))
    assert [(indices.tolist(), len(latents)) for indices, latents in made] == [
        ([0, 1, 2, 3], 4), ([4, 5, 6, 7], 4), ([8, 9], 2),
    ]  # fmt: skip
    assert set(seen) == {4}
    next(generate(model, Transport(), torch.arange(3), torch.arange(3), batch_size=4, **options))
    assert seen[-1] == 3  # few samples are not filled up


def test_keyed_noise():
    first, second = KeyedNoise(5, [0, 1, 2], (4, 2, 2), "cpu"), KeyedNoise(5, [2], (4, 2, 2), "cpu")
    for step in range(3):
        assert torch.equal(first(step)[2], second(step)[0])
    many = KeyedNoise(5, range(2000), (4, 2, 2), "cpu")()
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03
    assert len(many.flatten(1).unique(dim=0)) == 2000
    assert not torch.equal(KeyedNoise(6, [2], (4, 2, 2), "cpu")(), KeyedNoise(5, [2], (4, 2, 2), "cpu")())


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(sampler="ddim"), "`sampler=ddim` is none of sde, ode"),
        (dict(sampler="ode", last_step="none"), "`last_step` is of `sampler=sde`, and ode has none: leave it out"),
        (dict(sampler="meanflow", diffusion_norm=3.0), "`diffusion_norm` is of `sampler=sde`, and meanflow has none"),
        (dict(sampler="sde", atol=1e-3), "`atol` is of `sampler=ode`, and sde has none"),
        (dict(method="dopri5"), "euler, heun"),
        (dict(sampler="ode", method="heun"), "dopri5"),
        (dict(diffusion_form="cubic"), "constant, sbdm, sigma"),
        (dict(last_step="twice"), "mean, tweedie, euler, none"),
        (dict(steps=0), "`steps`"),
        (dict(steps=-3), "`steps`"),
        (dict(sampler="sde", steps=1), "`steps=1`"),
        (dict(diffusion_norm=-1.0), "`diffusion_norm`"),
        (dict(diffusion_norm=math.nan), "`diffusion_norm`"),
        (dict(last_step_size=0.0), "`last_step_size`"),
        (dict(last_step_size=1.5), "`last_step_size`"),
        (dict(atol=0.0), "`atol`"),
        (dict(rtol=math.nan), "`rtol`"),
        (dict(cfg_scale=-1.0), "`cfg_scale`"),
        (dict(cfg_channels=-1), "`cfg_channels`"),
        (dict(cfg_interval=(0.6, 0.3)), "`cfg_interval=0.6 0.3`"),
        (dict(cfg_interval=(1.1, 1.2)), "`cfg_interval=1.1 1.2`"),
        (dict(cfg_interval=(0.0, math.inf)), "`cfg_interval=0.0 inf`"),
        (dict(cfg_interval=(0.0, math.nan)), "`cfg_interval=0.0 nan`"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        SamplerConfig(**arguments)


GUIDED = dict(cfg_scale=2.0)
ODE = dict(sampler="ode")


@pytest.mark.parametrize(
    "settings, idle_with, heeded_with, cause",
    [
        (dict(last_step_size=0.1), dict(last_step="none"), dict(last_step="tweedie"), "`last_step=none`"),
        (dict(atol=1e-3), ODE | dict(method="heun2"), ODE, "`method=heun2`"),
        (dict(rtol=1e-5), ODE | dict(method="explicit_adams"), ODE | dict(method="fixed_adams"), "explicit_adams"),
        (dict(cfg_channels=0), {}, GUIDED, "`cfg_scale=1`"),
        (dict(cfg_interval=(0.0, 0.7)), ODE, GUIDED, "`cfg_scale=1`"),
        (dict(cfg_channels=4), dict(sampler="meanflow"), GUIDED, "`cfg_scale=1`"),
    ],
)
def test_a_setting_that_another_leaves_without_a_part_is_refused_where_users_give_it(
    settings, idle_with, heeded_with, cause
):
    """By sample.py and eval_fid.py; it stands in a configuration that is stored, or guided later on."""
    (name,) = settings
    for arguments in (Arguments, partial(EvaluationArguments, "digits")):
        with pytest.raises(UserError, match=f"`{name}` plays no part with .*{cause}"):
            arguments(ckpt="x", sampler=SamplerConfig(**settings, **idle_with))
        arguments(ckpt="x", sampler=SamplerConfig(**settings, **heeded_with))
        arguments(ckpt="x", sampler=SamplerConfig(**idle_with))


@pytest.mark.parametrize("method", ODE_METHODS)
def test_the_methods_that_heed_tolerances_are_those_whose_samples_they_change(method):
    velocity, _ = gaussian("linear")
    made = [
        sample(velocity, Transport(), normal(*SHAPE), None, SamplerConfig("ode", 8, method, atol=error, rtol=error))
        for error in (1e-2, 1e-6)
    ]
    assert torch.equal(*made) == (method not in TOLERANT_METHODS)


def test_the_sampler_is_left_to_the_network():
    assert SamplerConfig().resolve(False) == SamplerConfig(sampler="sde")
    assert SamplerConfig(steps=1).resolve(True) == SamplerConfig(sampler="meanflow", steps=1)
    assert SamplerConfig(sampler="ode").resolve(True) == SamplerConfig(sampler="ode")
    with pytest.raises(UserError, match="`steps=1` leaves the SDE"):
        SamplerConfig(steps=1).resolve(False)


def test_more_mistakes():
    with pytest.raises(UserError, match="`sampler=ode`"):
        sample(network, Transport(), normal(*SHAPE), None, SamplerConfig(), reverse=True)
    config = SamplerConfig(diffusion_form="sbdm", last_step_size=0.9995)
    with pytest.raises(UserError, match="`last_step_size=0.9995`"):
        sample_sde(network, Transport(), normal(*SHAPE), config, step_noise=lambda k: 0)
    with pytest.raises(UserError, match="`batch_size`"):
        made(small_network("attention"), [0], 0, SamplerConfig(steps=2))
