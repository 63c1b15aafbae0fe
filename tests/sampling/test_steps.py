"""The tables of steps: complete, torchdiffeq's own numbers, and near to the command that takes them."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import get_args, get_type_hints

import pytest
import torch
from torchdiffeq import odeint

from sit.sampling import ode, run
from sit.sampling.arguments import Arguments
from sit.sampling.config import (
    ADAPTIVE_METHODS,
    FIXED_METHODS,
    METHODS,
    ODE_METHODS,
    SDE_METHODS,
    DiffusionForm,
    LastStep,
    SamplerConfig,
)
from sit.sampling.ode import ODE_STEPS, sample_ode, solve
from sit.sampling.sampler import SAMPLERS
from sit.sampling.sde import DIFFUSION_FORMS, LAST_STEPS, SDE_STEPS
from sit.transport.transport import Transport
from sit.utils.errors import UserError


def test_the_tables_have_what_the_config_names():
    assert tuple(SDE_STEPS) == SDE_METHODS
    assert tuple(LAST_STEPS) == get_args(LastStep)
    assert tuple(DIFFUSION_FORMS) == get_args(DiffusionForm)
    assert tuple(SAMPLERS) == get_args(get_args(get_type_hints(SamplerConfig)["sampler"])[0]) == tuple(METHODS)
    assert set(ODE_STEPS) < set(FIXED_METHODS)


def test_the_methods_are_those_of_torchdiffeq():
    from torchdiffeq._impl.odeint import SOLVERS
    from torchdiffeq._impl.solvers import FixedGridODESolver

    assert set(ODE_METHODS) == set(SOLVERS) and len(ODE_METHODS) == len(set(ODE_METHODS))
    for name in ODE_METHODS:
        assert issubclass(SOLVERS[name], FixedGridODESolver) == (name in FIXED_METHODS) != (name in ADAPTIVE_METHODS)


def pendulum(t, x):
    """Not linear, and explicit in time."""
    angle, speed = x.unbind(-1)
    push = torch.sin(3 * torch.as_tensor(t, dtype=x.dtype))
    return torch.stack([speed, push - 9 * torch.sin(angle) - 0.3 * torch.tanh(speed)], -1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("method", ODE_STEPS)
def test_a_step_is_that_of_torchdiffeq(method, reverse, dtype, tolerance):
    """Few and large steps, so that another rule of the same order would be far away."""
    start = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)
    grid = torch.linspace(*((1.5, 0) if reverse else (0, 1.5)), 9, dtype=dtype)
    expected, x = odeint(pendulum, start, grid, method=method), start
    for number, (t, end) in enumerate(pairwise(grid.tolist())):
        x = ODE_STEPS[method](pendulum, x, t, end)
        torch.testing.assert_close(x, expected[number + 1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("method", FIXED_METHODS)
def test_fixed_grids_of_torchdiffeq(method, reverse):
    """The whole solution by odeint has the same grid: all its times, states and steps."""
    transport, x = Transport("linear", "noise"), torch.randn(2, 1, 2, 2, dtype=torch.float64)
    model = lambda x, t: torch.tanh(x) + t  # noqa: E731
    velocity = lambda t, x: transport.to_velocity(model(x, t), x, torch.as_tensor(t).expand(2))  # noqa: E731
    config, told = SamplerConfig("ode", 12, method), []
    on_step = lambda step, total, x, t: told.append((step, total, float(t)))  # noqa: E731
    found = sample_ode(model, transport, x, config, reverse=reverse, on_step=on_step)
    by_odeint = solve(velocity, x, transport, config, reverse=reverse)
    torch.testing.assert_close(found, by_odeint, rtol=1e-9, atol=1e-9)
    first, last = (0.999, 1e-3) if reverse else (1e-3, 0.999)
    times = torch.linspace(first, last, 13, dtype=torch.float64)[1:].tolist()
    assert told == [(number + 1, 12, pytest.approx(t)) for number, t in enumerate(times)]


@pytest.mark.parametrize("sampler, table, method", [("sde", SDE_STEPS, "euler"), ("ode", ODE_STEPS, "euler")])
def test_a_step_is_three_calls_below_the_command(checkpoint, tmp_path, monkeypatch, sampler, table, method):
    step, chains = table[method], []

    def watched(*arguments):
        frame, chain = sys._getframe(1), []
        while frame.f_code is not run.sample.__code__:
            chain += [frame.f_code.co_name] if "torch" not in frame.f_code.co_filename else []
            frame = frame.f_back
        chains.append([*chain[::-1], step.__name__])
        return step(*arguments)

    monkeypatch.setitem(table, method, watched)
    config = SamplerConfig(sampler, 2, method)
    run.sample(Arguments(str(checkpoint), out=str(tmp_path / "a"), labels=("1",), sampler=config, device="cpu"))
    assert chains and all(len(chain) <= 3 for chain in chains), chains[0]


ADAPTIVE = [method for method in ADAPTIVE_METHODS if method != "dopri8"]  # the slowest is bounded as the others are


@pytest.mark.parametrize("method", ADAPTIVE)
def test_an_adaptive_solver_that_finds_no_end_says_so(method, monkeypatch):
    """A field that can't be integrated to the tolerance, and one that is NaN: one line, not hours or an assertion."""
    monkeypatch.setattr(ode, "MOST_EVALUATIONS", 300)
    config = SamplerConfig(sampler="ode", method=method, rtol=1e-12, atol=1e-12)
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    fields = {
        "wild": lambda x, t: torch.sin(1e9 * x),
        "not a number": lambda x, t: x * float("nan"),
    }
    for field in fields.values():
        with pytest.raises(UserError, match=f"`method={method}` doesn't come to the end with `atol=1e-12` and"):
            ode.sample_ode(field, Transport(), x, config)
    assert ode.sample_ode(lambda x, t: x, Transport(), x, SamplerConfig(sampler="ode", method=method)).isfinite().all()
