"""Post-hoc EMA's mathematics against numerical integration, and averages of any length from a run's snapshots."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.integrate import quad

from sit.checkpoint.info import CheckpointInfo
from sit.checkpoint.load import load_for_sampling
from sit.checkpoint.posthoc_ema import (
    LIMIT,
    LONGEST,
    coefficients,
    decay_at,
    find_reconstruction,
    gamma_of,
    inner_products,
    sigma_of,
)
from sit.checkpoint.save import save_checkpoint
from sit.checkpoint.snapshots import find_snapshots, save_snapshot
from sit.latents.vae import DIGITS_VAE
from sit.metrics.arguments import Arguments
from sit.metrics.generated import GeneratedImages
from sit.metrics.run import evaluate_samples
from sit.model import SiT
from sit.sampling import cli as sample
from sit.sampling.config import SamplerConfig
from sit.transport.transport import Transport
from sit.utils.errors import UserError


def profile(tau: np.ndarray | float, gamma: float, t: float) -> np.ndarray:
    """The weight of the time τ in the average at t."""
    return np.where(np.asarray(tau) <= t, (gamma + 1) * (np.asarray(tau) / t) ** gamma / t, 0.0)


def deviation(gamma: float) -> float:
    """The standard deviation of the profile at t = 1, integrated numerically."""
    mean, square = (quad(lambda tau, k=k: tau**k * profile(tau, gamma, 1.0), 0, 1, epsabs=1e-13)[0] for k in (1, 2))
    return float(np.sqrt(square - mean**2))


def integrated(trajectory: np.ndarray, gamma: float) -> np.ndarray:
    """The average of weights (T, n) that hold the value i from τ = i to i + 1, by the midpoint rule in float64."""
    parts, t = 2000, len(trajectory)
    tau = (np.arange(t * parts) + 0.5) / parts
    return profile(tau, gamma, t).reshape(t, parts).mean(1) @ trajectory


def tracked(trajectory: np.ndarray, gamma: float) -> np.ndarray:
    """The averages at steps 1 … T, by the update that training makes."""
    averages, average = [], np.zeros_like(trajectory[0])
    for step, weights in enumerate(trajectory, start=1):
        decay = decay_at(step, gamma)
        average = decay * average + (1 - decay) * weights
        averages.append(average)
    return np.array(averages)


def walk(steps: int, size: int = 50) -> np.ndarray:
    """Weights that drift and tremble: (steps, size) float64."""
    rng = np.random.default_rng(0)
    drift = np.sin(np.linspace(0, 3, steps)[:, None] * rng.uniform(0.5, 2, size))
    return drift + np.cumsum(rng.normal(0, 0.5 / np.sqrt(steps), (steps, size)), axis=0)


# ---------------------------------------------------------------- the mathematics


@pytest.mark.parametrize("gamma", [0.01, 0.5, 3.0, 6.937, 16.97, 100.0])
def test_relative_length_and_exponent(gamma):
    length = deviation(gamma)
    assert sigma_of(gamma) == pytest.approx(length, rel=1e-8)
    assert gamma_of(length) == pytest.approx(gamma, rel=1e-5)


def test_the_lengths_of_the_paper():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005) and gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert pytest.approx(deviation(0.0)) == LONGEST
    for length in (0.0, -0.1, LONGEST, 0.5, float("nan")):
        with pytest.raises(ValueError, match="must lie between 0 and 0.2887"):
            gamma_of(length)


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.25])
def test_the_updates_average_a_trajectory_as_the_integral_does(sigma):
    trajectory, gamma = walk(40), gamma_of(sigma)
    averages = tracked(trajectory, gamma)
    for steps in (1, 7, 40):
        np.testing.assert_allclose(averages[steps - 1], integrated(trajectory[:steps], gamma), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("times", [(3.0, 5.0), (5.0, 3.0), (4.0, 4.0), (1.0, 400.0)])
def test_inner_products_of_profiles(times):
    (a, b), (gamma_a, gamma_b) = times, (16.97, 2.5)
    expected = quad(lambda tau: profile(tau, gamma_a, a) * profile(tau, gamma_b, b), 0, min(a, b), epsabs=0)[0]
    assert inner_products(gamma_a, a, gamma_b, b) == pytest.approx(expected, rel=1e-7)


def test_coefficients_are_the_least_squares_ones():
    """Against a fit of the profiles themselves on a fine grid of times."""
    stored, t = [(sigma, at) for at in (3, 6, 9, 12) for sigma in (0.05, 0.1)], 12
    tau = (np.arange(60_000) + 0.5) / 60_000 * t
    columns = np.stack([profile(tau, gamma_of(sigma), at) for sigma, at in stored], axis=1)
    wanted = profile(tau, gamma_of(0.15), t)
    fitted = np.linalg.lstsq(columns, wanted, rcond=None)[0]
    fitted /= fitted.sum()
    found, error = coefficients(stored, 0.15, t)
    np.testing.assert_allclose(found, fitted, atol=1e-4)
    missed = np.linalg.norm(columns @ fitted - wanted) / np.linalg.norm(wanted)
    assert error == pytest.approx(missed, rel=1e-3) and 0.01 < error < 0.2


@pytest.mark.parametrize(
    "snapshots, sigma, tolerance",
    [(40, 0.04, 2e-4), (40, 0.07, 5e-5), (40, 0.15, 1e-4), (40, 0.2, 1e-3), (10, 0.07, 3e-3)],
)
def test_a_reconstructed_average_is_the_one_that_was_tracked(snapshots, sigma, tolerance):
    """To a fraction of what lies between the average and the last weights: the tolerance."""
    steps = 400
    trajectory = walk(steps)
    stored = [(s, steps * n // snapshots) for n in range(1, snapshots + 1) for s in (0.05, 0.1)]
    kept = {s: tracked(trajectory, gamma_of(s)) for s in (0.05, 0.1)}
    x, error = coefficients(stored, sigma, steps)
    found = x @ np.array([kept[s][at - 1] for s, at in stored])
    direct = tracked(trajectory, gamma_of(sigma))[-1]
    smoothing = np.linalg.norm(direct - trajectory[-1])
    assert np.linalg.norm(found - direct) < tolerance * smoothing
    assert error < 0.01 and x.sum() == pytest.approx(1)


# ---------------------------------------------------------------- a run's snapshots

STEPS, EVERY = 40, 4


@pytest.fixture(scope="module")
def trajectory() -> list[SiT]:
    """A tiny network at each step of a random walk."""
    torch.manual_seed(0)
    network = SiT(input_size=8, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=10)
    networks = []
    for _ in range(STEPS):
        for parameter in network.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
        networks.append(SiT.from_config(network.config))
        networks[-1].load_state_dict(network.state_dict())
    return networks


def averages_of(networks: list[SiT], sigma: float) -> list[dict[str, torch.Tensor]]:
    """At each step, float64."""
    averages: list[dict[str, torch.Tensor]] = []
    for step, network in enumerate(networks, start=1):
        decay = decay_at(step, gamma_of(sigma))
        before = averages[-1] if averages else None
        averages.append(
            {
                name: (1 - decay) * p.detach().double() + (decay * before[name] if before else 0)
                for name, p in network.named_parameters()
            }
        )
    return averages


@pytest.fixture(scope="module")
def made(trajectory, tmp_path_factory) -> Path:
    """A run with ten snapshots and the checkpoints of steps 38 and 40."""
    run = tmp_path_factory.mktemp("runs") / "run"
    kept = {sigma: averages_of(trajectory, sigma) for sigma in (0.05, 0.1)}
    for step in range(EVERY, STEPS + 1, EVERY):
        save_snapshot(run, step, {sigma: averages[step - 1] for sigma, averages in kept.items()})
    for step in (STEPS - 2, STEPS):
        info = CheckpointInfo(step, step, (32, 32), 10, [str(d) for d in range(10)], "digits", "attention")
        save_checkpoint(
            run / "checkpoints" / f"step-{step:07d}",
            model=trajectory[step - 1],
            transport=Transport(),
            vae_source=DIGITS_VAE,
            info=info,
        )
    return run


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy to change."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return torch.cat([(a[name].double() - b[name].double()).flatten() for name in a]).norm().item()


@pytest.mark.parametrize("sigma", [0.05, 0.08, 0.15])
def test_a_checkpoint_with_another_average(made, trajectory, sigma):
    """The rounding to float16 and the error of the profile are far below what the average smooths."""
    loaded = load_for_sampling(made, ema=sigma)
    found = dict(loaded.model.named_parameters())
    direct, last = averages_of(trajectory, sigma)[-1], dict(trajectory[-1].named_parameters())
    assert distance(found, direct) < 0.02 * distance(direct, last)
    assert loaded.info.step == STEPS and not any(p.requires_grad for p in found.values())
    assert torch.equal(loaded.model.pos_embed, trajectory[-1].pos_embed)
    assert f"EMA of relative length {sigma:g}" in loaded.weights_name
    stored = load_for_sampling(made)
    assert distance(dict(stored.model.named_parameters()), last) == 0 and stored.average is None


def test_snapshots_are_float16_where_it_holds_the_values(tmp_path):
    weights = {"small": torch.tensor([0.1, -3.0]), "large": torch.tensor([1e5, 0.1])}
    folder = save_snapshot(tmp_path, 3, {0.1: weights})
    stored = load_file(folder / "0.1.safetensors")
    assert torch.equal(stored["small"], weights["small"].half()) and torch.equal(stored["large"], weights["large"])
    assert find_snapshots(tmp_path) == [(3, folder)]


def test_what_can_not_be_reconstructed(run, checkpoint, tmp_path):
    last, before = (run / "checkpoints" / f"step-{step:07d}" for step in (STEPS, STEPS - 2))
    for sigma in (0.0, 0.3):
        with pytest.raises(UserError, match=f"`ema={sigma:g}`: a relative length must lie between 0 and 0.2887"):
            find_reconstruction(last, sigma)
    with pytest.raises(UserError, match=r"`ema=0.01` can't be reached at step 40 from 10 .* nearer to the stored ones"):
        find_reconstruction(last, 0.01)
    with pytest.raises(
        UserError, match="can't be reached at step 38 .* take a checkpoint whose step has a snapshot, as step 36 has"
    ):
        find_reconstruction(before, 0.1)
    with pytest.raises(UserError, match="is no checkpoint in a run's folder"):
        find_reconstruction(checkpoint, 0.1)
    shutil.rmtree(run / "posthoc-ema")
    with pytest.raises(UserError, match="has no snapshot up to step 40; .*`posthoc_ema=0.05 0.1`"):
        load_for_sampling(run, ema=0.1)


def test_a_damaged_snapshot_is_skipped_with_a_notice(run, caplog):
    last = run / "checkpoints" / f"step-{STEPS:07d}"
    whole = find_reconstruction(last, 0.15)
    damaged = run / "posthoc-ema" / f"step-{STEPS - EVERY:07d}"
    content = bytearray((damaged / "0.1.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "0.1.safetensors").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        without = find_reconstruction(last, 0.15)
    assert f"skipping the snapshot {damaged}: 0.1.safetensors has been changed or damaged" in caplog.text
    assert whole.error < without.error < LIMIT
    assert damaged in {file.parent for file, _ in whole.parts} and damaged not in {f.parent for f, _ in without.parts}


def test_snapshots_of_another_network_are_refused(run):
    newest = run / "posthoc-ema" / f"step-{STEPS:07d}"
    shutil.rmtree(run / "posthoc-ema")
    save_snapshot(run, STEPS, {sigma: {"weight": torch.ones(2)} for sigma in (0.05, 0.1)})
    with pytest.raises(UserError, match=f"the snapshot {newest} does not fit the network"):
        load_for_sampling(run, ema=0.1)


# ---------------------------------------------------------------- commands


def run_sample(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    sample.main()


def test_sample_takes_the_average_and_names_it(made, tmp_path, monkeypatch, capsys):
    common = ("--ckpt", made, "--steps", 2, "--num-samples", 4)
    run_sample(monkeypatch, *common, "--ema", 0.15, "--out", tmp_path / "average")
    assert "EMA of relative length 0.15 (profile 2.2 % off), step 40" in capsys.readouterr().out
    run_sample(monkeypatch, *common, "--out", tmp_path / "plain")
    assert "step-0000040, as stored" in capsys.readouterr().out
    texts = [Image.open(tmp_path / name / "grid.png").text["weights"] for name in ("average", "plain")]
    assert "EMA of relative length 0.15" in texts[0] and texts[1].endswith("as stored")
    images = [np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("average", "plain")]
    assert not np.array_equal(*images)
    with pytest.raises(SystemExit):
        run_sample(monkeypatch, *common, "--ema", 0.01, "--out", tmp_path / "none")
    assert capsys.readouterr().err.startswith("error: --ema 0.01 can't be reached") and not (tmp_path / "none").exists()


def test_evaluated_images_are_told_apart_by_their_average(run):
    made = [GeneratedImages(load_for_sampling(run, ema=ema), 4, config=SamplerConfig()) for ema in (None, 0.1, 0.15)]
    assert len({images.name for images in made}) == len({images.about["network"] for images in made}) == 3
    assert "EMA of relative length 0.15" in made[2].name and "EMA" not in made[0].name
    shutil.rmtree(run / "posthoc-ema" / f"step-{EVERY:07d}")
    again = GeneratedImages(load_for_sampling(run, ema=0.15), 4, config=SamplerConfig())
    assert again.about != made[2].about, "put together from other snapshots"


def test_evaluation_samples_from_the_average(made, monkeypatch):
    seen = []
    monkeypatch.setattr("sit.metrics.run.measure", lambda samples, *arguments, **options: seen.append(samples))
    common = dict(reference="digits", ckpt=str(made), num_samples=4)
    for ema in (None, 0.1):
        evaluate_samples(Arguments(**common, ema=ema))
    stored, average = (dict(samples.loaded.model.named_parameters()) for samples in seen)
    assert distance(average, dict(load_for_sampling(made, ema=0.1).model.named_parameters())) == 0
    assert distance(average, stored) > 0.1
    with pytest.raises(UserError, match="`ema=0.1` is for `ckpt`"):
        Arguments(reference="digits", samples="a.npz", ema=0.1)
