"""NaN and infinity never become images."""

from __future__ import annotations

import pytest
import torch

from sit.checkpoint.load import load_for_sampling
from sit.checkpoint.save import save_checkpoint
from sit.latents.vae import NotFinite, decode, load_vae
from sit.sampling import cli as sample
from sit.sampling.config import SamplerConfig
from sit.sampling.images import sample_images


def test_a_network_that_overflows_is_named_with_sample_and_step(checkpoint):
    loaded = load_for_sampling(checkpoint)
    label = 3
    loaded.model.y_embedder.embedding_table.weight[label] = float("nan")  # only this class is lost
    labels = torch.tensor([1, 2, label, 4])
    with pytest.raises(
        NotFinite, match=f"sample 2 under seed 5 is not finite from step 1 on, as the network in {checkpoint}"
    ):
        list(sample_images(loaded, torch.arange(4), labels, seed=5, config=SamplerConfig(steps=3)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_not_decoded(value):
    vae, latents = load_vae("digits"), torch.zeros(2, 4, 8, 8)
    assert decode(vae, latents).shape == (2, 32, 32, 3)
    latents[1, 0, 0, 0] = value
    with pytest.raises(NotFinite, match="the sampler gives numbers that are not finite"):
        decode(vae, latents)


def test_a_vae_that_overflows_is_told_from_a_sampler_that_does():
    vae = load_vae("digits")
    vae.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(NotFinite, match="the VAE gives numbers that are not finite"):
        decode(vae, torch.zeros(1, 4, 8, 8))


def test_the_command_ends_in_one_line_and_writes_nothing(checkpoint, tmp_path, monkeypatch, capsys):
    loaded = load_for_sampling(checkpoint)
    loaded.model.final_layer.linear.weight.fill_(float("inf"))
    broken = tmp_path / "broken"
    save_checkpoint(broken, model=loaded.model, transport=loaded.transport, vae_source="digits", info=loaded.info)
    words = ["--ckpt", broken, "--steps", "2", "--num-samples", "2", "--out", tmp_path / "out"]
    monkeypatch.setattr("sys.argv", ["sample.py", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        sample.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: sample 0 under seed 0 is not finite from step ")
    assert list(tmp_path.iterdir()) == [broken]
