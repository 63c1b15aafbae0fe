"""MeanFlow against the known average velocity of a mixture of Gaussians, finite differences, and its formulas."""

from __future__ import annotations

import math

import formulas
import numpy as np
import pytest
import scipy.stats
import torch
from half_precision import assert_near

from sit.model import SiT
from sit.sampling.config import SamplerConfig
from sit.sampling.sampler import sample
from sit.transport.meanflow import MeanFlow, derivative
from sit.transport.transport import Transport
from sit.utils.errors import UserError

MEANS, DEVIATIONS, WEIGHTS = np.array([-1.5, 0.5, 2.0]), np.array([0.3, 0.2, 0.5]), np.array([0.3, 0.5, 0.2])
"""the mixture that all of this file's data are of, each element on its own"""

SQRT2, NORM = 2**0.5, (2 * np.pi) ** 0.5


def transport(interpolant: str = "linear", **options) -> Transport:
    return Transport(interpolant, "average-velocity", **options)


class Exact:
    """The average velocity of the mixture's flow, in float64, with forward-mode derivatives.

    In one dimension a flow keeps the order of the points, so x_r is where the distribution function at time r is what
    that at time t is at x_t. It is inverted by bisection; one step of Newton's method then makes it differentiable.
    """

    def __init__(self, interpolant: str = "linear", wrong: float = 0.0) -> None:
        self.path, self.wrong = Transport(interpolant).interpolant, wrong

    def parts(self, t: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Distance from each component in deviations, and the deviations, on a last dimension."""
        alpha, sigma = self.path.alpha(t)[..., None], self.path.sigma(t)[..., None]
        scale = ((alpha * torch.from_numpy(DEVIATIONS)) ** 2 + sigma**2).sqrt()
        return (x[..., None] - alpha * torch.from_numpy(MEANS)) / scale, scale

    def below(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The distribution function at time t."""
        return ((1 + torch.erf(self.parts(t, x)[0] / SQRT2)) / 2 * torch.from_numpy(WEIGHTS)).sum(-1)

    def density(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        away, scale = self.parts(t, x)
        return (torch.exp(-(away**2) / 2) / (NORM * scale) * torch.from_numpy(WEIGHTS)).sum(-1)

    def flow(self, x: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        part = self.below(t, x)
        low, high = torch.full_like(x, -12.0), torch.full_like(x, 12.0)
        with torch.no_grad():
            for _ in range(60):
                middle = (low + high) / 2
                under = self.below(r, middle) < part
                low, high = torch.where(under, middle, low), torch.where(under, high, middle)
        return low - (self.below(r, low) - part) / self.density(r, low)

    def __call__(self, x: torch.Tensor, t: torch.Tensor, end: torch.Tensor | None = None) -> torch.Tensor:
        t, end = (
            time.double().reshape(-1, *[1] * (x.ndim - 1)).expand(x.shape) for time in (t, t if end is None else end)
        )
        length = (end - t).clamp(min=1e-4)  # a short step for none
        found = (self.flow(x.double(), t, t + length) - x.double()) / length
        return (found + self.wrong * (end - t)).to(x.dtype)


def states(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (n, 1), t and r > t (n,), float64, off the far tails."""
    source = torch.Generator().manual_seed(0)
    t, r = torch.rand(count, 2, generator=source, dtype=torch.float64).sort(dim=1).values.unbind(1)
    x = 1.5 * torch.randn(count, 1, generator=source, dtype=torch.float64)
    return x, 0.02 + 0.9 * t, 0.07 + 0.9 * r


@pytest.mark.parametrize("interpolant", ["linear", "gvp"])
def test_the_identity_holds_for_the_known_average_velocity(interpolant):
    """u = v + (r − t)·du/dt along the exact velocity, which formulas.py has in closed form."""
    x, t, r = states(200)
    exact = Exact(interpolant)
    v = formulas.mixture_velocity(interpolant, x.numpy(), t[:, None, None].numpy(), MEANS, DEVIATIONS, WEIGHTS)
    slope = derivative(exact, x, t, r, torch.from_numpy(v))
    torch.testing.assert_close(torch.from_numpy(v) + (r - t)[:, None] * slope, exact(x, t, r), rtol=1e-6, atol=1e-6)


def mixture(count: int, seed: int) -> torch.Tensor:
    """Data (n, 1), float64."""
    draws = np.random.default_rng(seed)
    part = draws.choice(3, count, p=WEIGHTS)
    return torch.from_numpy(MEANS[part] + DEVIATIONS[part] * draws.standard_normal(count))[:, None]


@pytest.mark.parametrize("wrong, stationary", [(0.0, True), (0.2, False)])
def test_the_minimum_is_the_known_average_velocity(wrong, stationary):
    """The loss's derivative along any change of u is zero there, to its standard error over 20,000 images.

    And away from there, by 0.2·(r − t), it is not.
    """
    count, exact = 20_000, Exact(wrong=wrong)
    changes = torch.ones_like, torch.sin, lambda x: torch.cos(2 * x)
    source = torch.Generator().manual_seed(1)
    x1, x0 = mixture(count, 2), torch.randn(count, 1, generator=source, dtype=torch.float64)
    times = torch.rand(count, 2, generator=source, dtype=torch.float64) * 0.96 + 0.02
    t, r = times.sort(dim=1).values.unbind(1)
    along = torch.zeros(3, count, 1, dtype=torch.float64, requires_grad=True)

    def model(x, t, end):
        moved = sum(step * change(x) for step, change in zip(along, changes, strict=True))
        return exact(x, t, end) + moved

    loss = MeanFlow(transport(), share=1.0).squared_error(model, x1, t, r, x0)
    (each,) = torch.autograd.grad(loss.sum(), along)
    scores = (each.mean((1, 2)) / (each.std((1, 2)) / count**0.5)).abs()
    assert (scores.max() < 3.5) == stationary, scores


@pytest.mark.parametrize("interpolant, steps", [("linear", 1), ("linear", 4), ("gvp", 2)])
def test_samples_of_the_known_average_velocity_have_the_distribution_of_the_data(interpolant, steps):
    """Kolmogorov-Smirnov with 20,000 samples of each, at a level of 1 %; Euler steps of the velocity fail it."""
    noise = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    data = mixture(20_000, 4).flatten().numpy()
    config, of = SamplerConfig(steps=steps), transport(interpolant)
    made = sample(Exact(interpolant), of, noise, None, config).flatten().numpy()
    assert scipy.stats.ks_2samp(made, data).pvalue > 0.01
    euler = SamplerConfig(sampler="ode", method="euler", steps=steps)
    made = sample(Exact(interpolant), of, noise, None, euler).flatten().numpy()
    assert scipy.stats.ks_2samp(made, data).pvalue < 1e-6


# ---------------------------------------------------------------------- the objective's parts


class Levels:
    """A network whose output depends on the label alone, so that no derivative is in the way; its calls are kept."""

    null_label = 3

    def __init__(self) -> None:
        self.levels, self.calls = torch.tensor([1.0, -2.0, 0.5, 4.0]), []

    def __call__(self, x, t, y=None, end=None):
        self.calls.append((t, y, end))
        return torch.zeros_like(x) + self.levels[y].reshape(-1, 1, 1, 1) + 0 * t.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("omega, kappa", [(1.0, 0.0), (2.5, 0.0), (0.2, 0.7)])
def test_the_derivative_goes_along_the_guided_velocity(omega, kappa):
    """Of u = a(label)·x + b(label)·t, whose derivative along w is a·w + b: the target against the formula by hand."""
    slopes = torch.tensor([0.5, -1.5, 2.0, 0.7], dtype=torch.float64)
    rates = torch.tensor([1.0, 0.3, -2.0, 0.4], dtype=torch.float64)

    def wide(values):
        return values.reshape(-1, 1, 1, 1)

    class Linear:
        null_label = 3

        def __call__(self, x, t, y=None, end=None):
            return wide(slopes[y]) * x + wide(rates[y]) * wide(t)

    source = torch.Generator().manual_seed(0)
    x1, x0 = torch.randn(2, 3, 1, 2, 2, generator=source, dtype=torch.float64)
    t, end = torch.tensor([0.1, 0.3, 0.6]).double(), torch.tensor([0.9, 0.3, 0.7]).double()
    y, null = torch.tensor([0, 1, 2]), torch.full((3,), 3)
    x = wide(t) * x1 + wide(1 - t) * x0
    along = omega * (x1 - x0) + kappa * Linear()(x, t, y) + (1 - omega - kappa) * Linear()(x, t, null)
    target = along + wide(end - t) * (wide(slopes[y]) * along + wide(rates[y]))
    meanflow = MeanFlow(transport(), share=1.0, omega=omega, kappa=kappa)
    dropped = torch.zeros(3, dtype=torch.bool)
    found = meanflow.squared_error(Linear(), x1, t, end, x0, y=y, null_labels=null, dropped=dropped)
    torch.testing.assert_close(found, (Linear()(x, t, y) - target).square().sum((1, 2, 3)))


@pytest.mark.parametrize("omega, kappa", [(1.0, 0.0), (2.5, 0.0), (1.0, 0.5), (0.2, 0.8)])
def test_guidance_in_the_target(omega, kappa):
    """ω·v + κ·u(label) + (1 − ω − κ)·u(no label), and v where the label is dropped."""
    source = torch.Generator().manual_seed(0)
    x1, x0 = torch.randn(2, 6, 2, 3, 3, generator=source)
    y, drop = torch.arange(6) % 3, torch.tensor([0.0, 0.5, 0.05, 0.9, 0.3, 0.7])
    model, meanflow = Levels(), MeanFlow(transport(), share=0.5, omega=omega, kappa=kappa)
    found = meanflow.training_error(model, x1, y, class_dropout=0.1, x0=x0, drop=drop, generator=source)
    v, label = x1 - x0, model.levels[y].reshape(-1, 1, 1, 1)
    dropped = (drop < 0.1).reshape(-1, 1, 1, 1)
    target = torch.where(dropped, v, omega * v + kappa * label + (1 - omega - kappa) * model.levels[3])
    out = torch.where(dropped, model.levels[3], label)
    torch.testing.assert_close(found, (out - target).square().sum((1, 2, 3)))
    assert len(model.calls) == 2 + (omega != 1 or kappa != 0) * ((kappa != 0) + (omega + kappa != 1))
    t, labels, end = model.calls[-1]
    assert labels.tolist() == [3, 1, 3, 0, 1, 2] and (end >= t).all()


def test_a_share_of_the_images_takes_a_step():
    for share in (0.25, 0.3, 1.0):
        taken = MeanFlow(transport(), share=share).takes_a_step(torch.arange(5, 1005)).double()
        running = taken.unfold(0, 40, 1).sum(1)
        assert running.max() - running.min() <= 1 and abs(taken.mean() - share) < 2e-3
    model = Levels()
    u = torch.tensor([[0.2, 0.7], [0.9, 0.4], [0.6, 0.1], [0.3, 0.5]])
    x1, y = torch.zeros(4, 1, 2, 2), torch.zeros(4).long()
    MeanFlow(transport(), share=0.25).training_loss(model, x1, y, u=u, positions=torch.arange(4))
    (of, _, _), (t, _, end) = model.calls
    assert t.tolist() == pytest.approx([0.2, 0.4, 0.1, 0.3]) and end.tolist() == pytest.approx([0.2, 0.4, 0.1, 0.5])
    assert len(of) == 1  # the derivative is taken of the image with a step alone


class Counting(MeanFlow):
    """Counts the images with a step in place of the error."""

    def squared_error(self, model, x1, t, end, x0, **_):
        return (end > t).float()


@pytest.mark.parametrize("share", [0.25, 0.3, 1.0])
def test_batches_of_every_size_take_their_share_of_the_steps(share):
    """Without positions each call begins at a number of its own, so that images of small batches take steps too."""
    meanflow, source, calls = Counting(transport(), share=share), torch.Generator().manual_seed(0), 1000
    for size in range(1, 9):
        x1 = torch.zeros(size, 1, 1, 1)
        taken = [meanflow.training_error(None, x1, generator=source).sum().item() for _ in range(calls)]
        assert {*taken} <= {math.floor(size * share), math.ceil(size * share)}
        assert sum(taken) / calls == pytest.approx(size * share, abs=4 * 0.5 / calls**0.5)


def test_the_numbers_to_begin_at_leave_all_other_draws_alone():
    seen = []

    class Seeing(MeanFlow):
        def squared_error(self, model, x1, t, end, x0, *, dropped, **_):
            seen.append((t, x0, dropped))
            return torch.zeros(len(x1))

    options = dict(null_label=3, class_dropout=0.5)
    for positions in (None, torch.arange(8)):
        source = torch.Generator().manual_seed(0)
        x1, y = torch.zeros(8, 1, 2, 2), torch.zeros(8).long()
        Seeing(transport()).training_loss(None, x1, y, positions=positions, generator=source, **options)
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))
    u, x0, drop = torch.rand(8, 2), torch.randn(8, 1, 2, 2), torch.rand(8)
    given = dict(u=u, x0=x0, drop=drop, positions=torch.arange(8), generator=source, **options)
    before = source.get_state()
    Seeing(transport()).training_loss(None, x1, y, **given)
    assert torch.equal(source.get_state(), before)


def test_the_weight():
    """1/(‖error‖² + c)^p, which is not differentiated."""
    squared = torch.tensor([0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    for power in (0.0, 0.5, 1.0):
        meanflow = MeanFlow(transport(), weight_power=power, weight_floor=0.01)
        expected = 1 / (squared.detach() + 0.01) ** power
        loss = meanflow.weighted(squared)
        torch.testing.assert_close(loss, squared.detach() * expected)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), squared)[0], expected)


def test_times_have_the_papers_distribution():
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    paper = 1 / (1 + np.exp(-scipy.stats.norm.ppf(1 - u.numpy(), loc=-0.4)))  # from data to noise
    np.testing.assert_allclose(transport(time_distribution="logit-normal-0.4").sample_times(u), 1 - paper, rtol=1e-9)


def test_mistakes():
    for make, words in (
        (lambda: MeanFlow(Transport()), "of `prediction=average-velocity`, not of velocity"),
        (lambda: MeanFlow(transport(), share=0.0), "`meanflow_share` must be above 0"),
        (lambda: MeanFlow(transport(), weight_floor=0.0), "`meanflow_weight_floor` above 0"),
        (lambda: MeanFlow(transport(), kappa=1.0), r"`meanflow_kappa` in \[0, 1\)"),
        (lambda: MeanFlow(transport(), omega=math.inf), "`meanflow_omega` must be finite"),
        (lambda: MeanFlow(transport(), weight_power=math.inf), "both finite"),
        (lambda: transport("vp"), "infinite there: use linear or gvp"),
        (lambda: transport(loss_weight="velocity"), "a velocity has none"),
        (lambda: transport().training_loss(Levels(), torch.zeros(1, 1, 1, 1)), "training_loss of a MeanFlow"),
        (lambda: MeanFlow(transport(), omega=2.0).training_loss(Levels(), torch.zeros(1, 1, 1, 1)), "there are none"),
        (lambda: SamplerConfig(sampler="meanflow", cfg_scale=2.0), "guidance is part of what MeanFlow trains"),
        (lambda: SamplerConfig(sampler="meanflow", method="euler"), "has none: leave it out"),
        (lambda: SamplerConfig(sampler="meanflow").resolve(False), "predicts no average velocity"),
        (
            lambda: sample(Exact(), transport(), torch.zeros(1, 1, 1, 1), None, SamplerConfig(), reverse=True),
            "to go back",
        ),
    ):
        with pytest.raises(UserError, match=words):
            make()


# ---------------------------------------------------------------------- the network


def network(mixer: str = "attention,atconv", average_velocity: bool = True) -> SiT:
    return SiT((6, 8), 1, 2, 16, depth=2, num_heads=2, num_classes=3, mixer=mixer, learn_sigma=False, seed=0,
               average_velocity=average_velocity)  # fmt: skip


def test_it_begins_as_the_plain_network():
    """Every parameter that both have is the same, and so is the output, whatever the duration."""
    plain, averaging = network(average_velocity=False), network()
    shared, more = dict(plain.named_parameters()), dict(averaging.named_parameters())
    assert all(torch.equal(value, more.pop(name)) for name, value in shared.items())
    assert sorted({name.split(".")[0] for name in more}) == ["duration_embedder"]
    assert more["duration_embedder.mlp.0.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    for parameter in shared.values():
        torch.nn.init.normal_(parameter, std=0.1)
    averaging.load_state_dict(plain.state_dict(), strict=False)
    x, t, y = torch.randn(3, 2, 6, 8), torch.tensor([0.1, 0.5, 0.8]), torch.tensor([0, 1, 3])
    for end in (None, torch.ones(3)):
        torch.testing.assert_close(averaging(x, t, y, end=end), plain(x, t, y), rtol=0, atol=0)
    with pytest.raises(UserError, match="predicts no average velocity"):
        plain(x, t, y, end=torch.ones(3))


@pytest.mark.parametrize("mixer", ["attention", "neighborhood", "linear_attention", "deformable", "dico", "atconv"])
def test_the_derivative_of_a_network_is_a_central_difference(mixer):
    """In float64, along a velocity and in time, the end held; the mixers' backends are theirs again afterwards."""
    torch.manual_seed(0)
    model = network(mixer).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    x, v = torch.randn(2, 2, 2, 6, 8, dtype=torch.float64)
    t, end, y = torch.tensor([0.1, 0.5]).double(), torch.tensor([0.4, 1.0]).double(), torch.tensor([0, 3])
    backends = [getattr(block.attn, "backend", None) for block in model.blocks]
    with torch.no_grad():
        found = derivative(model, x, t, end, v, y=y)
        moved = [model(x + h * v, t + h, y, end=end) for h in (1e-6, -1e-6)]
    expected = (moved[0] - moved[1]) / 2e-6
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert backends == [getattr(block.attn, "backend", None) for block in model.blocks]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_network(dtype):
    """Its loss, with guidance and the derivative, and the gradients are near to those of its weights in float32."""
    half, exact = network("attention"), network("attention")
    torch.manual_seed(0)
    for parameter in half.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    exact.load_state_dict(half.to(dtype).state_dict())
    shape = (8, half.config.in_channels, *half.config.input_size)
    x1, x0, y = torch.randn(shape), torch.randn(shape), torch.arange(8) % half.config.num_classes
    draws = dict(u=torch.rand(8, 2), positions=torch.arange(8), x0=x0, class_dropout=0.0)
    objective = MeanFlow(transport(), share=0.5, weight_power=0.0, omega=0.6, kappa=0.3)
    assert_near((half, exact), tuple(objective.training_loss(model, x1, y, **draws) for model in (half, exact)))
    t, end = draws["u"].aminmax(dim=1)
    slopes = [derivative(model, x0, t, end, x1, y=y) for model in (half, exact)]
    assert slopes[0].dtype == torch.float32 and (slopes[0] - slopes[1]).norm() <= 0.05 * slopes[1].norm()


def test_autocast_has_the_formula_to_the_bit():
    model = network("attention")
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    shape = (4, model.config.in_channels, *model.config.input_size)
    x1, x0, t, y = torch.randn(shape), torch.randn(shape), torch.rand(4), torch.arange(4) % model.config.num_classes
    end, at, v = t + (1 - t) / 2, t.reshape(-1, 1, 1, 1), x1 - x0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = MeanFlow(transport()).squared_error(model, x1, t, end, x0, y=y)
        x = at * x1 + (1 - at) * x0
        with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            moved = torch.func.jvp(lambda x, t: model(x, t, y, end=end), (x, t), (v, torch.ones_like(t)))[1]
        out = model(x, t, y, end=end)
    target = v + (end - t).reshape(-1, 1, 1, 1) * moved
    assert out.dtype == torch.bfloat16 and torch.equal(found, (out.float() - target).square().flatten(1).sum(1))
