"""Files written by version 0.1.0 still load, sample, and train on, and give what they gave then.

To the bit on the CPU and version of torch that made them, to rounding elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sit.checkpoint.convert import Convert, convert
from sit.checkpoint.load import Loaded, load_for_sampling
from sit.model import MODELS
from sit.sampling.config import SamplerConfig
from sit.sampling.images import balanced_labels, sample_images
from sit.training.recipes import load_recipe
from sit.training.run_folder import read_metrics
from sit.training.trainer import train

EARLIER = Path(__file__).parent / "fixtures" / "earlier"
EXPECTED = json.loads((EARLIER / "expected.json").read_text())
SAMPLERS = {
    "sde": SamplerConfig(steps=8, cfg_scale=1.5),
    "ode": SamplerConfig(sampler="ode", method="euler", steps=8),
    "dopri5": SamplerConfig(sampler="ode", cfg_scale=2.0, cfg_interval=(0.2, 0.8), cfg_channels=0),
}


def cpu() -> str:
    """Vendor, family and model, as Linux tells them."""
    told = Path("/proc/cpuinfo")
    lines = dict(line.split(":", 1) for line in told.read_text().splitlines() if ":" in line) if told.is_file() else {}
    lines = {name.strip(): value.strip() for name, value in lines.items()}
    return " ".join(lines.get(name, "unknown") for name in ("vendor_id", "cpu family", "model"))


def is_the_machine_of_then() -> bool:
    """Whether sums are rounded here as they were where the files were made."""
    return torch.__version__ == EXPECTED["torch"] and cpu() == EXPECTED["cpu"]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    if is_the_machine_of_then():
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(kind: str) -> Loaded:
    if kind == "own":
        return load_for_sampling(EARLIER / "run", vae=EARLIER / "vae")
    return load_for_sampling(EARLIER / "published.pt", vae=EARLIER / "vae", num_heads=2, image_size=(32, 32))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["own", "published"])
def test_samples_are_what_they_were(kind, sampler, one_thread):
    labels = balanced_labels(range(8), range(10))
    batches = sample_images(load(kind), torch.arange(8), labels, seed=3, config=SAMPLERS[sampler])
    found = torch.cat([batch.images for batch in batches]).numpy()
    with np.load(EARLIER / "samples.npz") as samples:
        expected = samples[f"{kind}_{sampler}"]
    assert expected.shape == (8, 32, 32, 3)
    if is_the_machine_of_then():
        assert np.array_equal(found, expected)
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_the_loss_of_fixed_draws_is_what_it_was(one_thread):
    loaded = load("own")
    source = torch.Generator().manual_seed(1)
    x1, x0 = torch.randn(8, 4, 8, 8, generator=source), torch.randn(8, 4, 8, 8, generator=source)
    t = torch.rand(8, generator=source)
    found = loaded.transport.loss(loaded.model, x1, t, x0, y=torch.arange(8))
    assert found.tolist() == pytest.approx(EXPECTED["fixed_draws"], rel=1e-6)


def test_the_run_goes_on_as_it_did(fresh_accelerate, tmp_path, monkeypatch, one_thread):
    for name in ("run", "vae"):
        shutil.copytree(EARLIER / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(MODELS, "SiT-XS/2", dict(depth=2, hidden_size=32, num_heads=2, patch_size=2))
    train(dataclasses.replace(load_recipe("run/config.yaml"), steps=8, resume="run"))
    losses = [row["loss"] for row in read_metrics(Path("run/metrics.jsonl"))]
    assert losses == pytest.approx(EXPECTED["losses"], rel=1e-6 if is_the_machine_of_then() else 1e-3)
    last = Path("run/checkpoints/step-0000008")
    weights = load_file(last / "training" / "model.safetensors")
    averaged = load_file(last / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, tensor in load_file(EARLIER / "resumed.safetensors").items():
        kind, key = name.split(".", 1)
        close((weights if kind == "raw" else averaged)[key], tensor)


def test_the_published_layout_and_back_is_the_same_to_the_bit(tmp_path):
    convert(Convert(EARLIER / "run", tmp_path / "again.pt", "training"))
    one, other = (torch.load(path, weights_only=False) for path in (EARLIER / "published.pt", tmp_path / "again.pt"))
    assert one["ema"].keys() == other["ema"].keys()
    assert all(torch.equal(tensor, other["ema"][key]) for key, tensor in one["ema"].items())
    named = {"model": "SiT-XS/2"}  # the size of two blocks was of the table only then
    assert vars(one["args"]) == vars(other["args"]) | named
