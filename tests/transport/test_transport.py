"""The objective, its intervals, and drift and score, against float64 formulas and a table of the published values."""

from __future__ import annotations

import formulas
import numpy as np
import pytest
import torch

from sit.transport.transport import Transport
from sit.utils.errors import UserError

COMBINATIONS = [
    (interpolant, prediction, weight)
    for interpolant in formulas.INTERPOLANTS
    for prediction in formulas.PREDICTIONS
    for weight in (("none",) if prediction == "velocity" else ("none", "velocity", "likelihood"))
]
TIMES = torch.tensor([0.002, 0.05, 0.3, 0.5, 0.77, 0.96, 0.998])


def network(x, t, y=None):
    """A stand-in for a network, for tensors and arrays alike."""
    t = t.reshape(-1, 1, 1, 1)
    return 0.7 * x - 0.3 * t * x**2 + t + (0 if y is None else 0.1 * y.reshape(-1, 1, 1, 1))


def draws():
    x1, x0 = torch.randn(2, len(TIMES), 4, 3, 5, generator=torch.Generator().manual_seed(3))
    return x1, x0, torch.arange(len(TIMES))


@pytest.mark.parametrize("interpolant, prediction, weight", COMBINATIONS)
def test_loss(interpolant, prediction, weight):
    x1, x0, y = draws()
    ours = Transport(interpolant, prediction, weight).loss(network, x1, TIMES, x0, y=y)
    assert ours.dtype == torch.float32 and ours.shape == (len(TIMES),)
    for i, t in enumerate(TIMES.double().tolist()):
        data, noise = x1[i].double().numpy(), x0[i].double().numpy()
        alpha, sigma, d_alpha, d_sigma = formulas.coefficients(interpolant, t)
        out = network((alpha * data + sigma * noise)[None], np.array([t]), np.array([i]))[0]
        rate = sigma * (d_alpha * sigma - d_sigma * alpha) / alpha
        factor = {"none": 1, "velocity": (rate / sigma) ** 2, "likelihood": rate / sigma**2}[weight]
        if prediction == "velocity":
            expected = np.mean((out - d_alpha * data - d_sigma * noise) ** 2)
        elif prediction == "noise":
            expected = factor * np.mean((out - noise) ** 2)
        else:
            expected = factor * np.mean((sigma * out + noise) ** 2)
        assert ours[i].item() == pytest.approx(expected, rel=1e-5), (t, factor)


def test_velocity_weight_is_the_loss_of_the_velocity():
    """Weighted so, noise and score losses are the squared error of the velocity that the output means."""
    x1, x0, _ = (part.double() for part in draws())
    t = TIMES.double()
    for interpolant in formulas.INTERPOLANTS:
        for prediction in ("score", "noise"):
            transport = Transport(interpolant, prediction, "velocity")
            path = transport.interpolant
            x = path.interpolate(x1, x0, t)
            implied = transport.to_velocity(network(x, t), x, t)
            expected = (implied - path.velocity(x1, x0, t)).square().flatten(1).mean(1).float()
            torch.testing.assert_close(transport.loss(network, x1, t, x0).float(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("interpolant", formulas.INTERPOLANTS)
@pytest.mark.parametrize("prediction", formulas.PREDICTIONS)
def test_drift_and_score(interpolant, prediction):
    transport = Transport(interpolant, prediction)
    x, _, y = draws()
    velocity, score = (means(network(x, TIMES, y), x, TIMES) for means in (transport.to_velocity, transport.to_score))
    for i, t in enumerate(TIMES.double().tolist()):
        state = x[i : i + 1].double().numpy()
        out = network(state, np.array([t]), np.array([i]))
        expected = formulas.velocity_and_score(interpolant, prediction, out, state, t)
        for ours, value in zip((velocity[i], score[i]), expected, strict=True):
            error = np.abs(ours.numpy() - value[0]).max()
            assert error <= 1e-5 * max(1, np.abs(value).max()), (t, error)


def test_published_intervals():
    """(train), (ODE), (SDE to the last step of 0.04, diffusion sigma), (the same, SBDM), as published."""
    table = {
        ("linear", "velocity"): [(0, 1), (0, 1), (0, 0.96), (0, 0.96)],
        ("linear", "score"): [(1e-3, 0.999), (1e-3, 0.999), (1e-3, 0.96), (1e-3, 0.96)],
        ("linear", "noise"): [(1e-3, 0.999), (1e-3, 0.999), (1e-3, 0.96), (1e-3, 0.96)],
        ("vp", "velocity"): [(0, 1 - 1e-5), (0, 0.999), (0, 0.96), (0, 0.96)],
        ("vp", "score"): [(0, 1 - 1e-5), (0, 0.999), (0, 0.96), (0, 0.96)],
        ("vp", "noise"): [(0, 1 - 1e-5), (0, 0.999), (0, 0.96), (0, 0.96)],
    }
    table |= {("gvp", prediction): table["linear", prediction] for prediction in formulas.PREDICTIONS}
    for (interpolant, prediction), expected in table.items():
        transport = Transport(interpolant, prediction)
        ours = [transport.train_interval(), transport.ode_interval()]
        ours += [transport.sde_interval(form, 0.04) for form in ("sigma", "sbdm")]
        assert ours == [pytest.approx(pair) for pair in expected], (interpolant, prediction)
    assert Transport("vp").sde_interval("sigma", 0.0) == (0, 0.999)  # without a last step
    assert Transport("linear", "noise").sde_interval("sigma", 0.0) == (1e-3, 0.999)
    given = Transport("vp", "noise", train_eps=0.01, sample_eps=0.02)
    assert (given.train_interval(), given.ode_interval()) == ((0, 0.99), (0, 0.98))
    ignored = Transport("gvp", train_eps=0.01, sample_eps=0.02)
    assert (ignored.train_interval(), ignored.sde_interval("sbdm", 0.0)) == ((0, 1), (0, 1))


def test_round_trip_through_files(tmp_path):
    Transport("gvp", "noise", "likelihood", sample_eps=0.01).save_pretrained(tmp_path)
    assert (tmp_path / "transport_config.json").exists()
    loaded = Transport.from_pretrained(tmp_path)
    assert (loaded.config.interpolant, loaded.config.prediction, loaded.config.loss_weight) == (
        "gvp", "noise", "likelihood",
    )  # fmt: skip
    assert (loaded.train_eps, loaded.sample_eps) == (1e-3, 0.01)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(interpolant="cosine"), "linear, gvp, vp"),
        (dict(interpolant="VP"), "linear, gvp, vp"),
        (dict(prediction="data"), "`prediction=data` is none of velocity, score, noise"),
        (dict(prediction="noise", loss_weight="snr"), "`loss_weight=snr` is none of none, velocity, likelihood"),
        (dict(loss_weight="likelihood"), "`loss_weight=likelihood` .* velocity has none"),
        (dict(time_distribution="beta"), "`time_distribution=beta` is none of uniform, logit-normal"),
        (dict(train_eps=-1e-3), "`train_eps` must be"),
        (dict(sample_eps=0.5), "`sample_eps` must be"),
        (dict(sample_eps=float("nan")), "`sample_eps` must be"),
        (dict(prediction="noise", sample_eps=0.0), "`sample_eps=0`"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        Transport(**arguments)
