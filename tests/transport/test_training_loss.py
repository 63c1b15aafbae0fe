"""The objective alone: what it draws, which draws it takes, how it drops labels; and the plain loop of the docs."""

from __future__ import annotations

import re
from pathlib import Path

import formulas
import numpy as np
import pytest
import scipy.stats
import torch
from half_precision import assert_near

from sit.model import SiT
from sit.sampling.config import SamplerConfig
from sit.sampling.sampler import sample
from sit.transport.transport import Transport
from sit.utils.errors import UserError

DOCS = Path(__file__).parents[2] / "docs"
NULL = 5


class Recorder:
    """A stand-in for a network that keeps what it is called with."""

    null_label = NULL

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, **conditions):
        self.calls.append((x, t, conditions))
        return 0.7 * x - 0.3 * t.reshape(-1, 1, 1, 1)


def data(count=6):
    source = torch.Generator().manual_seed(0)
    x1, x0 = torch.randn(2, count, 2, 3, 3, generator=source)
    return x1, x0, torch.rand(count, generator=source), torch.arange(count) % 5


# ---------------------------------------------------------------------- times


def test_uniform_times_fill_the_interval():
    u = torch.tensor([0.0, 0.25, 0.5, 1 - 2**-24])
    assert torch.equal(Transport().sample_times(u), u)
    start, end = 1e-3, 1 - 1e-3
    expected = start + (end - start) * u.double()
    torch.testing.assert_close(Transport("linear", "noise").sample_times(u).double(), expected, rtol=1e-6, atol=0)


def test_logit_normal_times():
    """Against SciPy's logistic of the normal quantile, in and out of the unit interval's corners."""
    u = torch.cat([torch.tensor([0.0, 1e-30, 1e-7]), torch.linspace(1e-4, 1 - 2**-24, 1001)])
    expected = 1 / (1 + np.exp(-scipy.stats.norm.ppf(u.double().numpy())))
    found = Transport(time_distribution="logit-normal").sample_times(u)
    assert found.dtype == torch.float32 and found[0] == 0
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    inside = Transport("linear", "score", time_distribution="logit-normal").sample_times(u)
    np.testing.assert_allclose(inside.numpy(), 1e-3 + 0.998 * expected, rtol=1e-5)
    assert inside.min() >= 1e-3 and inside.max() <= 1 - 1e-3


def test_drawn_times_have_their_distribution():
    """Kolmogorov-Smirnov, for the draws that the objective makes itself."""
    x1, model = torch.zeros(4000, 1, 1, 1), Recorder()
    source = torch.Generator().manual_seed(1)
    for name, logit in (("uniform", scipy.stats.logistic), ("logit-normal", scipy.stats.norm)):
        Transport(time_distribution=name).training_loss(model, x1, generator=source)
        t = model.calls[-1][1].double().numpy()
        assert scipy.stats.kstest(np.log(t / (1 - t)), logit.cdf).pvalue > 0.01


def test_the_distribution_is_kept_in_files(tmp_path):
    Transport(time_distribution="logit-normal").save_pretrained(tmp_path)
    assert Transport.from_pretrained(tmp_path).config.time_distribution == "logit-normal"
    (tmp_path / "transport_config.json").write_text('{"interpolant": "gvp", "prediction": "velocity"}')  # an older one
    assert Transport.from_pretrained(tmp_path).config.time_distribution == "uniform"


# ---------------------------------------------------------------------- draws


@pytest.mark.parametrize("interpolant, prediction", [("linear", "velocity"), ("gvp", "noise"), ("vp", "velocity")])
def test_given_draws_are_used_as_given(interpolant, prediction):
    x1, x0, u, y = data()
    transport, model = Transport(interpolant, prediction), Recorder()
    drop = torch.tensor([0.0, 0.25, 0.249, 0.9, 0.1, 0.5])
    found = transport.training_loss(model, x1, y, class_dropout=0.25, u=u, x0=x0, drop=drop, mask="any")
    ((x_t, t, conditions),) = model.calls
    eps = {"linear": (0, 0), "gvp": (1e-3, 1e-3), "vp": (0, 1e-5)}[interpolant]
    times = eps[0] + (1 - eps[1] - eps[0]) * u.double().numpy()
    np.testing.assert_allclose(t.numpy(), times, rtol=1e-6)
    alpha, sigma, _, _ = (value.reshape(-1, 1, 1, 1) for value in formulas.coefficients(interpolant, times))
    np.testing.assert_allclose(x_t.numpy(), alpha * x1.numpy() + sigma * x0.numpy(), atol=1e-5)
    assert conditions["y"].tolist() == [NULL, 1, NULL, 3, NULL, 0] and conditions["mask"] == "any"
    expected = transport.loss(Recorder(), x1, torch.from_numpy(times).float(), x0)
    assert found.shape == (6,) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_without_labels():
    x1, x0, u, y = data()
    model = Recorder()
    Transport().training_loss(model, x1, u=u, x0=x0)
    Transport().training_loss(model, x1, y, class_dropout=0.0, u=u, x0=x0)
    assert model.calls[0][2] == {} and torch.equal(model.calls[1][2]["y"], y)


def test_the_share_of_dropped_labels():
    x1, y, model = torch.zeros(20_000, 1, 1, 1), torch.arange(20_000) % 5, Recorder()
    source = torch.Generator().manual_seed(2)
    for share in (0.1, 0.35):
        Transport().training_loss(model, x1, y, class_dropout=share, generator=source)
        labels = model.calls[-1][2]["y"]
        dropped = labels == NULL
        assert abs(dropped.float().mean().item() - share) < 4 * (share * (1 - share) / 20_000) ** 0.5
        assert torch.equal(labels[~dropped], y[~dropped])


def test_draws_of_a_generator():
    """The same again from the same seed; noise, times and dropout are independent of each other."""
    x1, y = torch.zeros(20_000, 1, 1, 1), torch.zeros(20_000, dtype=torch.int64)
    model = Recorder()
    for _ in range(2):
        Transport().training_loss(model, x1, y, class_dropout=0.5, generator=torch.Generator().manual_seed(3))
    Transport().training_loss(model, x1, y, class_dropout=0.5)
    (x, t, labels), (again, times, same), (other, _, _) = model.calls
    assert torch.equal(x, again) and torch.equal(t, times) and torch.equal(labels["y"], same["y"])
    assert not torch.equal(x, other)
    noise = (x / (1 - t.reshape(-1, 1, 1, 1))).flatten()
    drawn = np.corrcoef([t.numpy(), noise.numpy(), labels["y"].numpy()])
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert np.abs(drawn - np.eye(3)).max() < 0.03


def test_the_null_label():
    x1, x0, u, y = data()
    bare = lambda x, t, y: y.reshape(-1, 1, 1, 1) + 0 * x  # noqa: E731
    with pytest.raises(UserError, match="no null label"):
        Transport().training_loss(bare, x1, y)
    everywhere = dict(class_dropout=1.0, u=u, x0=x0)
    found = Transport().training_loss(bare, x1, y, null_label=9, **everywhere)
    expected = Transport().loss(bare, x1, u, x0, y=torch.full_like(y, 9))
    torch.testing.assert_close(found, expected)
    model = Recorder()
    Transport().training_loss(model, x1, y, null_label=9, **everywhere)
    assert set(model.calls[0][2]["y"].tolist()) == {9}
    with pytest.raises(UserError, match="`class_dropout` must be"):
        Transport().training_loss(bare, x1, y, class_dropout=-0.1)


# ---------------------------------------------------------------------- the loop of the docs


# ---------------------------------------------------------------------- precision


def network() -> SiT:
    """A small network with random weights everywhere."""
    made = SiT(4, 2, 2, 16, depth=1, num_heads=2, num_classes=NULL, learn_sigma=False)
    torch.manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def batch() -> tuple[torch.Tensor, ...]:
    """x1 (8, 2, 4, 4), t (8,), x0 and labels."""
    source = torch.Generator().manual_seed(1)
    x1, x0 = torch.randn(2, 8, 2, 4, 4, generator=source)
    return x1, torch.rand(8, generator=source), x0, torch.arange(8) % NULL


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
def test_the_loss_in_float64_has_its_numerical_gradients(prediction):
    (x1, x0, t, _), weight = data(2), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x1, x0, t = x1.double(), x0.double(), t.double()

    def loss(weight: torch.Tensor) -> torch.Tensor:
        found = Transport("linear", prediction).loss(lambda x, t: (weight * x).sin(), x1, t, x0)
        assert found.dtype == torch.float64
        return found

    assert torch.autograd.gradcheck(loss, (weight,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_a_half_precision_network(dtype):
    """float32, and near to that of the same weights in float32; so are its gradients."""
    half, (x1, t, x0, y) = network().to(dtype), batch()
    exact = network()
    exact.load_state_dict(half.state_dict())
    drawn = dict(u=t, x0=x0, class_dropout=0.0)
    assert_near((half, exact), tuple(Transport().training_loss(model, x1, y, **drawn) for model in (half, exact)))


def test_autocast_has_the_published_loss_to_the_bit():
    model, (x1, t, x0, y) = network(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Transport().loss(model, x1, t, x0, y=y)
        at = t.reshape(-1, 1, 1, 1)
        out = model(at * x1 + (1 - at) * x0, t, y)
    assert out.dtype == torch.bfloat16
    assert torch.equal(found, (out.float() - (x1 - x0)).square().flatten(1).mean(1))


# ---------------------------------------------------------------------- the docs


def code_blocks(page, section):
    """The Python blocks of a section of a page, in order."""
    text = (DOCS / page).read_text()
    (found,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"```python\n(.*?)```", found, flags=re.DOTALL)


def test_the_plain_loop_of_the_docs():
    """It trains a network, null label included, that then samples with guidance."""
    loop, sampling = code_blocks("training.md", "The objective alone")
    torch.manual_seed(0)
    names = {"latents": torch.randn(256, 4, 6, 8), "labels": torch.arange(256) % 10}
    exec(compile(loop, "docs/training.md", "exec"), names)
    model, transport = names["model"], names["transport"]
    gradient = model.y_embedder.embedding_table.weight.grad
    assert names["loss"].isfinite() and gradient is not None and len(gradient) == 11
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    moments = names["optimizer"].state[model.y_embedder.embedding_table.weight]["exp_avg_sq"]
    assert (moments.sum(1) > 0).all()  # every class was seen, and so was the null label

    torch.manual_seed(1)
    exec(compile(sampling, "docs/training.md", "exec"), names)
    guided = names["samples"]
    assert guided.shape == (4, 4, 6, 8) and guided.isfinite().all()
    torch.manual_seed(1)
    noise = torch.randn(4, 4, 6, 8)
    plain = sample(model, transport, noise, torch.arange(4), SamplerConfig(steps=50))
    assert not torch.allclose(guided, plain)
