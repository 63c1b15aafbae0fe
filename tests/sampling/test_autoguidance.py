"""Guidance away from a second checkpoint, of another mixer and without a null class."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from sit.checkpoint.convert import Convert, convert
from sit.checkpoint.info import CheckpointInfo
from sit.checkpoint.load import load_for_sampling
from sit.checkpoint.save import save_checkpoint
from sit.latents.vae import DIGITS_VAE, load_vae
from sit.metrics.arguments import Arguments as EvaluationArguments
from sit.metrics.generated import GeneratedImages
from sit.model import SiT
from sit.sampling.arguments import Arguments
from sit.sampling.config import SamplerConfig
from sit.sampling.guidance import GuidedModel
from sit.sampling.images import latent_shape_for
from sit.sampling.run import sample as make
from sit.sampling.sampler import KeyedNoise, generate, guided_model, sample
from sit.transport.transport import Transport
from sit.utils.errors import UserError


def other(
    folder: Path,
    transport: Transport | None = None,
    classes: int = 10,
    vae: str | Path = DIGITS_VAE,
    latents: tuple[int, int] = (4, 8),
    patch_size: int = 4,
) -> Path:
    """A second checkpoint with random weights, of ``latents`` (channels, side)."""
    torch.manual_seed(1)
    channels, side = latents
    model = SiT(side, patch_size=patch_size, in_channels=channels, hidden_size=16, depth=1, num_heads=2,
                num_classes=classes, mixer="attention", null_class=False)  # fmt: skip
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    info = CheckpointInfo(1, 1, (32, 32), classes, [str(d) for d in range(classes)], "digits", "attention")
    return save_checkpoint(folder, model=model, transport=transport or Transport(), vae_source=vae, info=info)


def test_the_formula():
    """weak + scale·(strong − weak) on the chosen channels, within the interval; both get the label."""
    seen = []

    def network(factor):
        return lambda x, t, y: (seen.append(y.tolist()), factor * x + t.reshape(-1, 1, 1, 1))[1]

    x, labels = torch.randn(2, 4, 3, 3), torch.tensor([3, 1])
    config = SamplerConfig(cfg_scale=2.5, cfg_channels=3, cfg_interval=(0.2, 0.9))
    guided = GuidedModel(network(2.0), labels, config, network(0.5))
    found = guided(x, 0.4)
    torch.testing.assert_close(found[:, :3], (0.5 + 2.5 * 1.5) * x[:, :3] + 0.4)
    torch.testing.assert_close(found[:, 3:], 2 * x[:, 3:] + 0.4)
    assert seen == [[3, 1], [3, 1]]
    torch.testing.assert_close(guided(x, 0.9), 2 * x + 0.9)
    assert len(seen) == 3


@pytest.mark.parametrize("whole", [True, False])
def test_a_scale_that_is_changed_on_the_way_guides_from_there_on(checkpoint, whole):
    """From none, where the null label is not yet looked for; as a whole and in groups."""
    model, labels, x = load_for_sampling(checkpoint).model, torch.tensor([3, 1]), torch.randn(2, 4, 8, 8)

    def guided(scale):
        config = SamplerConfig(cfg_scale=scale)
        return GuidedModel(model, labels, config) if whole else guided_model(model, labels, config, x)

    changed = guided(1.0)
    assert isinstance(changed, GuidedModel) == whole
    with torch.no_grad():
        without = changed(x, 0.5)
        changed.set_scale(2.5)
        torch.testing.assert_close(changed(x, 0.5), guided(2.5)(x, 0.5))
        changed.set_scale(1.0)
        torch.testing.assert_close(changed(x, 0.5), without)


def test_samples_are_guided_by_the_second_checkpoint(checkpoint, tmp_path):
    guide = other(tmp_path / "guide")
    loaded = load_for_sampling(checkpoint, guide=guide)
    config = SamplerConfig(sampler="ode", method="euler", steps=2, cfg_scale=3.0, cfg_channels=0)
    indices, labels = torch.arange(3), torch.tensor([4, 0, 9])
    options = dict(seed=5, config=config, latent_shape=(4, 8, 8), device="cpu", batch_size=3)
    ((_, made),) = generate(loaded.model, loaded.transport, indices, labels, guide=loaded.guide_network, **options)
    x, weak = KeyedNoise(5, [0, 1, 2], (4, 8, 8), "cpu")(), load_for_sampling(guide).model
    with torch.no_grad():
        for t in (0.0, 0.5):
            times = torch.full((3,), t)
            strong_velocity, weak_velocity = (one(x, times, labels) for one in (loaded.model, weak))
            x = x + 0.5 * (weak_velocity + 3 * (strong_velocity - weak_velocity))
    torch.testing.assert_close(made, x, rtol=1e-4, atol=1e-4)
    noise = KeyedNoise(5, [0, 1, 2], (4, 8, 8), "cpu")()
    at_once = sample(loaded.model, loaded.transport, noise, labels, config, guide=loaded.guide_network)
    torch.testing.assert_close(at_once, x, rtol=1e-4, atol=1e-4)
    guided = GeneratedImages(loaded, 4, config=config)
    plain = GeneratedImages(load_for_sampling(checkpoint), 4, config=config)
    assert guided.about != plain.about and str(guide) in guided.name and "guide" not in plain.about
    assert (guided.batch(indices.numpy()) != plain.batch(indices.numpy())).any()


def test_what_one_file_leaves_open_its_like_does_too_and_a_folder_does_not(tmp_path):
    """Here the number of heads, as the width is of no published size."""
    network = SiT(8, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=10)
    network.save_pretrained(tmp_path / "ours")
    file = convert(Convert(tmp_path / "ours", tmp_path / "net.pt", layout="published"))
    for guide, width in ((file, 32), (other(tmp_path / "guide"), 16)):
        loaded = load_for_sampling(file, guide=guide, num_heads=2)
        assert loaded.guide is not None and loaded.guide.model.config["hidden_size"] == width


def test_a_guide_of_other_latents_is_refused(checkpoint, tmp_path):
    """Unless both are given their VAE, or nothing here tells; another decoder is no matter."""
    gray, stretched = "none:channels=1", "none:channels=1:scale=1.42"
    run, same, stranger = (
        other(tmp_path / name, vae=vae, latents=(1, 16))
        for name, vae in (("run", gray), ("same", f"{gray}:scale=2"), ("stranger", stretched))
    )
    assert load_for_sampling(run, guide=same).guide is not None
    with pytest.raises(
        UserError, match="`guide=.*stranger` can't guide .*shift and scale 0.0 and 1.42, not 0.0 and 2.0"
    ):
        load_for_sampling(run, guide=stranger)
    assert load_for_sampling(run, guide=stranger, vae=gray).guide is not None
    for part, refused in (("decoder", False), ("encoder", True)):
        vae = load_vae("digits")
        getattr(vae, part).conv_in.weight.data.mul_(1.5)
        vae.save_pretrained(tmp_path / f"{part}-vae")
        guide = other(tmp_path / part, vae=tmp_path / f"{part}-vae")
        with pytest.raises(UserError, match="made by the encoder in .*vae") if refused else nullcontext():
            load_for_sampling(checkpoint, guide=guide)
    assert load_for_sampling(checkpoint, guide=other(tmp_path / "hub", vae="who/knows")).guide is not None


def test_a_guide_whose_patches_do_not_divide_the_latents_is_refused(checkpoint, tmp_path):
    """Before anything is sampled; those of the network are of 2, and the VAE divides sides by 4."""
    guided = load_for_sampling(checkpoint, guide=other(tmp_path / "fours"))
    for size, latents in ((None, (4, 8, 8)), ((48, 64), (4, 12, 16))):
        assert latent_shape_for(guided, size) == latents
    with pytest.raises(UserError, match="`guide=.*fours` has patches of 4, and the latents are of 8 x 10"):
        latent_shape_for(guided, (32, 40))
    guided = load_for_sampling(checkpoint, guide=other(tmp_path / "threes", latents=(4, 12), patch_size=3))
    arguments = Arguments(str(checkpoint), guide=str(guided.guide.path), sampler=SamplerConfig(cfg_scale=2.0))
    for refused in (
        lambda: GeneratedImages(guided, 4, config=arguments.sampler),
        lambda: make(dataclasses.replace(arguments, out=str(tmp_path / "out"))),
    ):
        with pytest.raises(UserError, match="has patches of 3, and the latents are of 8 x 8"):
            refused()
    assert not (tmp_path / "out").exists()


def test_mistakes(checkpoint, tmp_path):
    for place, options, words in (
        ("a", dict(transport=Transport("gvp")), "the interpolant gvp, not linear"),
        ("b", dict(transport=Transport(prediction="noise")), "the prediction noise, not velocity"),
        ("c", dict(classes=7), "classes: 7, not 10"),
    ):
        with pytest.raises(UserError, match=f"`guide=.*{place}` can't guide .*{words}"):
            load_for_sampling(checkpoint, guide=other(tmp_path / place, **options))
    with pytest.raises(UserError, match="`guide=x` guides by `cfg_scale`, and 1 is none"):
        Arguments(ckpt="y", guide="x")
    with pytest.raises(UserError, match="`guide=x` is for `ckpt`"):
        EvaluationArguments(reference="digits", samples="y", guide="x", sampler=SamplerConfig(cfg_scale=2.0))
    config = SamplerConfig(cfg_scale=2.0)
    assert dataclasses.replace(Arguments(ckpt="y", guide="x", sampler=config)).guide == "x"
