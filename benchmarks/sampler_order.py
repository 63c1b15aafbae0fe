"""Error of every sampler against its steps, on data whose exact velocity is known: a mixture of three Gaussians.

``python benchmarks/sampler_order.py`` writes ``docs/images/sampler-order-ode.png`` and ``-sde.png`` and prints the
tables. About a minute on one core.

The error is the 1-Wasserstein distance between the samples and the exact distribution at the time where the sampler
ends. The ODE starts from the quantiles of the exact distribution at its start, so that only the solver errs. The SDE
draws its noises, and its gray line is what as many exact samples would get.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import tyro
from checks import at_least_one
from matplotlib.figure import Figure

from sit.sampling.config import ODE_METHODS, SamplerConfig
from sit.sampling.sampler import sample
from sit.sampling.sde import DIFFUSION_FORMS, sde_times
from sit.transport.interpolants import INTERPOLANTS, Interpolant, get_interpolant
from sit.transport.transport import Transport
from sit.utils.cli import one_line_errors
from sit.utils.errors import entry_point
from sit.utils.record import write_record
from sit.utils.tables import markdown_table

MEANS = torch.tensor([-1.0, 0.2, 1.4], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.3, 0.4, 0.25], dtype=torch.float64)
WEIGHTS = torch.tensor([0.4, 0.25, 0.35], dtype=torch.float64)
COLORS = matplotlib.colormaps["tab20"].colors


@dataclass
class Arguments:
    """Measure the error of every sampler."""

    out: Path = Path(__file__).parent.parent / "docs" / "images"
    """folder of the plots"""
    particles: int = 10_000
    """samples of an SDE run"""
    counts: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    """steps"""
    methods: tuple[str, ...] = ODE_METHODS
    """ODE solvers"""
    json: Path | None = None
    """file for all numbers"""

    def __post_init__(self) -> None:
        at_least_one(self, "particles")
        for method in self.methods:
            SamplerConfig("ode", method=method)  # raises UserError if there is none of that name


def spread(path: Interpolant, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and variances (3,) of the mixture's parts at a time."""
    return path.alpha(t) * MEANS, (path.alpha(t) * DEVIATIONS) ** 2 + path.sigma(t) ** 2


class ExactVelocity:
    """The velocity of the mixture, called as a network; counts its calls."""

    def __init__(self, interpolant: str) -> None:
        self.path, self.calls = get_interpolant(interpolant), 0
        self.limit = 1 - 1e-6 if interpolant == "vp" else 2.0  # adaptive solvers look past the end

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        t, path = t[0].double().clamp(max=self.limit), self.path
        means, variances = spread(path, t)
        away = (x[..., None] - means) / variances
        share = torch.softmax(WEIGHTS.log() - 0.5 * variances.log() - 0.5 * away**2 * variances, dim=-1)
        data, noise = MEANS + path.alpha(t) * DEVIATIONS**2 * away, path.sigma(t) * away
        return (share * (path.d_alpha(t) * data + path.d_sigma(t) * noise)).sum(-1)


def quantiles(path: Interpolant, t: float, count: int) -> torch.Tensor:
    """The exact quantiles (count,) of the mixture at a time, by bisection."""
    means, variances = spread(path, torch.tensor(t, dtype=torch.float64))
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    low, high = torch.full_like(levels, -8), torch.full_like(levels, 8)
    for _ in range(60):
        middle = (low + high) / 2
        below = (WEIGHTS * torch.special.ndtr((middle[:, None] - means) / variances.sqrt())).sum(1) < levels
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def distance(x: torch.Tensor, exact: torch.Tensor) -> float:
    """1-Wasserstein distance of samples from as many exact quantiles."""
    return (x.flatten().sort().values - exact).abs().mean().item()


def ode_errors(interpolant: str, method: str, counts: tuple[int, ...]) -> tuple[list[int], list[float]]:
    """Network evaluations and errors; adaptive solvers go through tolerances instead of step counts."""
    transport, particles = Transport(interpolant), 1000
    path = transport.interpolant
    start, end = transport.ode_interval()
    begin = quantiles(path, start, particles).reshape(1, 1, 1, -1)
    exact = quantiles(path, end, particles)
    if SamplerConfig("ode", method=method).adaptive:
        tolerances = (1e-2, 1e-3, 1e-4, 1e-5)
        configs = [SamplerConfig("ode", method=method, rtol=rtol, atol=rtol / 1000) for rtol in tolerances]
    else:
        configs = [SamplerConfig("ode", steps=steps, method=method) for steps in counts]
    evaluations, errors = [], []
    for config in configs:
        velocity = ExactVelocity(interpolant)
        errors.append(distance(sample(velocity, transport, begin, None, config), exact))
        evaluations.append(velocity.calls)
    return evaluations, errors


def sde_errors(interpolant: str, method: str, form: str, counts: tuple[int, ...], particles: int) -> list[float]:
    """Errors with no last step, at the time where the sampler ends."""
    transport, errors = Transport(interpolant), []
    for steps in counts:
        source = torch.Generator().manual_seed(steps)
        draw = lambda step, source=source: torch.randn(1, 1, 1, particles, generator=source, dtype=torch.float64)  # noqa: E731
        config = SamplerConfig(steps=steps, method=method, diffusion_form=form, last_step="none")
        times = sde_times(transport, config)
        begin = quantiles(transport.interpolant, times[0], particles).reshape(1, 1, 1, -1)
        x = sample(ExactVelocity(interpolant), transport, begin, None, config, step_noise=draw)
        errors.append(distance(x, quantiles(transport.interpolant, times[-1], particles)))
    return errors


Errors = dict[str, dict[str, dict[int, float]]]
"""by interpolant, then sampler, then steps or evaluations"""


def table(errors: Errors, unit: str) -> str:
    """All errors, a row for each sampler of each interpolant."""
    rows = []
    for interpolant, samplers in errors.items():
        for name, points in samplers.items():
            rows.append([interpolant, name, ", ".join(f"{count}: {error:.1e}" for count, error in points.items())])
    return markdown_table(["interpolant", "sampler", f"{unit}: error"], rows)


def plot_ode(arguments: Arguments) -> Errors:
    """Error of every ODE solver against network evaluations."""
    found: Errors = {interpolant: {} for interpolant in INTERPOLANTS}
    figure = Figure(figsize=(16, 5.5), layout="constrained")
    axes = figure.subplots(1, len(INTERPOLANTS), sharey=True)
    for axis, interpolant in zip(axes, INTERPOLANTS, strict=True):
        for number, method in enumerate(arguments.methods):
            evaluations, errors = ode_errors(interpolant, method, arguments.counts)
            style = "o:" if SamplerConfig("ode", method=method).adaptive else ".-"
            axis.loglog(evaluations, errors, style, label=method, color=COLORS[number % 20], linewidth=1)
            found[interpolant][method] = dict(zip(evaluations, errors, strict=True))
        axis.set(title=interpolant, xlabel="network evaluations")
    axes[0].set_ylabel("Wasserstein distance to the exact distribution")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle("ODE: fixed steps (solid, by steps) and adaptive solvers (dotted, by tolerance)")
    figure.savefig(arguments.out / "sampler-order-ode.png", dpi=80)
    return found


def plot_sde(arguments: Arguments) -> Errors:
    """Error of the SDE's methods and diffusion forms against steps."""
    found: Errors = {interpolant: {} for interpolant in INTERPOLANTS}
    figure = Figure(figsize=(16, 5.5), layout="constrained")
    axes = figure.subplots(1, len(INTERPOLANTS), sharey=True)
    for axis, interpolant in zip(axes, INTERPOLANTS, strict=True):
        for number, form in enumerate(DIFFUSION_FORMS):
            for method, style in (("euler", ".-"), ("heun", "x--")):
                errors = sde_errors(interpolant, method, form, arguments.counts, arguments.particles)
                color, label = COLORS[2 * number], f"{method}, {form}"
                axis.loglog(arguments.counts, errors, style, label=label, color=color, linewidth=1)
                found[interpolant][label] = dict(zip(arguments.counts, errors, strict=True))
        exact = quantiles(get_interpolant(interpolant), 0.999, arguments.particles)
        parts = torch.multinomial(WEIGHTS, arguments.particles, True, generator=torch.Generator().manual_seed(0))
        drawn = MEANS[parts] + DEVIATIONS[parts] * torch.randn(
            arguments.particles, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        axis.axhline(distance(drawn, exact), color="gray", label="as many exact samples")
        axis.set(title=interpolant, xlabel="steps (Heun: two evaluations each)")
    axes[0].set_ylabel("Wasserstein distance to the exact distribution")
    axes[0].set_ylim(top=2)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle("SDE without a last step: Euler-Maruyama (solid) and Heun (dashed), six diffusion forms")
    figure.savefig(arguments.out / "sampler-order-sde.png", dpi=80)
    return found


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/sampler_order.py")
    arguments.out.mkdir(parents=True, exist_ok=True)
    ode = plot_ode(arguments)
    print(f"ODE\n\n{table(ode, 'evaluations')}\n", flush=True)
    sde = plot_sde(arguments)
    print(f"SDE\n\n{table(sde, 'steps')}")
    if arguments.json:
        write_record(arguments.json, "cpu", {"ode": ode, "sde": sde})


if __name__ == "__main__":
    main()
