"""The dry run: counts against closed forms, and that nothing is started."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL

from sit.model import SiT, create_model
from sit.training.cli import main
from sit.training.config import TrainConfig
from sit.training.plan import multiply_accumulates, plan, saved_bytes
from sit.training.recipes import load_recipe
from sit.utils.errors import UserError


@pytest.mark.parametrize("mixer, blocks_g", [("attention", 76.1 + 38.0 + 4.2), ("atconv", 76.1 + 19.4)])
def test_multiply_accumulates_of_xl2(mixer, blocks_g):
    """The blocks' shares as published, and the embedders, adaLN and output from their shapes."""
    with torch.device("meta"):
        network = create_model("SiT-XL/2", mixer=mixer)
    n, c = 256, 1152
    rest = n * c * 16 + 256 * c + c * c + 28 * 6 * c * c + 2 * c * c + n * c * 32
    assert multiply_accumulates(network, (4, 32, 32)) / 1e9 == pytest.approx(blocks_g + rest / 1e9, abs=0.15)


@pytest.mark.parametrize("height, width", [(16, 16), (10, 12)])
@pytest.mark.parametrize(
    "mixer, of_layer",
    [
        ("attention", lambda n, c, d: 4 * n * c * c + 2 * n * n * c),
        ("neighborhood:kernel_size=7", lambda n, c, d: 4 * n * c * c + 2 * n * 49 * c),
        ("linear_attention", lambda n, c, d: 4 * n * c * c + 2 * n * c * (d + 1)),
        ("depthwise:kernel_size=5", lambda n, c, d: 2 * n * c * c + 25 * n * c),
        ("dico", lambda n, c, d: 2 * n * c * c + 9 * n * c + c * c),
        ("atconv", lambda n, c, d: 2 * n * c * c + 9 * c * c + 9 * n * c + 81 * c),
        ("atconv:kernel_size=5:inhibition=false", lambda n, c, d: 2 * n * c * c + 25 * c * c + 25 * n * c + 625 * c),
        ("atconv:routing=false", lambda n, c, d: 2 * n * c * c),
        ("dico,attention", lambda n, c, d: (6 * n * c * c + 9 * n * c + c * c + 2 * n * n * c) / 2),
    ],
)
def test_multiply_accumulates_of_each_mixer(mixer, of_layer, height, width):
    """To the last one, from the shapes of a small network's layers, on its own grid and on another."""
    depth, c, heads, classes = 2, 48, 4, 5
    with torch.device("meta"):
        network = SiT(32, 2, 4, c, depth, heads, num_classes=classes, mixer=mixer)
    n = height * width
    blocks = depth * (8 * n * c * c + of_layer(n, c, c // heads) + 6 * c * c)
    rest = n * c * 16 + 256 * c + c * c + 2 * c * c + n * c * 32
    assert multiply_accumulates(network, (4, 2 * height, 2 * width)) == blocks + rest


@pytest.mark.parametrize(
    "named, without",
    [
        (dict(freeze=("projector.*",)), {}),
        (dict(freeze=("projector*", "x_embedder.*")), dict(freeze=("x_embedder.*",))),
        (dict(train_only=("projector*", "blocks.*")), dict(train_only=("blocks.*",))),
    ],
)
def test_a_projector_is_neither_missed_nor_counted(named, without):
    config = replace(load_recipe("digits"), repa="dinov2-vit-b")
    plain, told = plan(config, 1, None), plan(replace(config, **without), 1, None)
    assert plan(replace(config, **named), 1, None) == told
    assert (plain == told) == (not without)


def test_saved_bytes_are_those_of_a_real_forward_pass():
    options = dict(input_size=8, patch_size=2, hidden_size=32, depth=3, num_heads=2, num_classes=5)
    network = SiT(**options)
    own = {p.data_ptr() for p in network.parameters()}
    kept = {}
    alive = []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.randn(4, 4, 8, 8), torch.rand(4), torch.zeros(4, dtype=torch.int64))
    with torch.device("meta"):
        network = SiT(**options)
    estimate = saved_bytes(network, (4, 8, 8), 4, half=False, gradient_checkpointing=False)
    assert estimate == pytest.approx(sum(kept.values()), rel=0.05)
    assert saved_bytes(network, (4, 8, 8), 4, half=False, gradient_checkpointing=True) < 0.5 * estimate


def test_the_table(tmp_path):
    text = plan(load_recipe("imagenet256-xl2-400k"), gpus=8, images_per_second=1000.0)
    assert "674,834,720" in text and "4x32x32, 256" in text and "102,400,000" in text
    assert "256 = 8 GPUs x 1 micro-batches x 32" in text and "1.19 days" in text
    assert "= 53.4 epochs of 1,797" in plan(load_recipe("digits"), 1, None)
    with pytest.raises(UserError, match="can't be divided into 3"):
        plan(TrainConfig(batch_size=64), gpus=3, images_per_second=None)


def test_the_cost_of_the_held_out_loss_is_told():
    """After steps 300, 600, 900 and 1000: 4 · 100 · 8 forward passes, of which training makes 3 · 1000 · 256."""
    config = TrainConfig(heldout="auto", heldout_every=300, heldout_images=100)
    assert "at most 100 images x 8 times x 4: 0.42 % of training" in plan(config, 1, None)
    assert "held-out" not in plan(TrainConfig(), 1, None)


def test_what_post_hoc_ema_costs_is_told():
    config = replace(load_recipe("digits"), steps=100_000, model="SiT-B/4")
    with torch.device("meta"):
        network = create_model(config.model, **config.network_options((4, 8, 8), 10))
    gib = sum(p.numel() for p in network.parameters()) / 2**30
    plain = plan(config, 1, None)
    assert f"{20 * gib:.2f} GiB, not sharded" in plain and "snapshots" not in plain
    kept = plan(replace(config, posthoc_ema=(0.05, 0.1), posthoc_ema_every=7000), 1, None)
    assert f"{28 * gib:.2f} GiB, not sharded" in kept and f"{8 * gib:.2f} GiB of that state" in kept
    assert f"15 snapshots of {4 * gib:.3g} GiB = {60 * gib:.3g} GiB of disk" in kept  # 14 and that of the last step


def test_a_vae_of_another_downsampling_is_planned_with_if_it_is_here(tmp_path):
    """Two levels halve 32 pixels once: 16 x 16 latents, 64 tokens of 2 x 2. The config alone is needed."""
    vae = AutoencoderKL(
        latent_channels=3, block_out_channels=(4, 4), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.save_config(tmp_path / "pipeline" / "vae")
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        text = plan(TrainConfig(vae=str(folder), mixer="atconv"), 1, None)
        assert "3x16x16, 64" in text and "assumed" not in text
    with pytest.raises(UserError, match=f"`vae={tmp_path}`"):
        plan(TrainConfig(vae=str(tmp_path)), 1, None)
    (tmp_path / "pipeline" / "vae" / "config.json").write_text("{")
    with pytest.raises(UserError, match="is the folder whole"):
        plan(TrainConfig(vae=str(tmp_path / "pipeline")), 1, None)


@pytest.mark.parametrize("vae", ["vaes/fashion-mnist", "/nowhere/vae", "stabilityai/sd-vae-ft-ema"])
def test_what_is_assumed_of_a_vae_that_is_not_here_is_said(vae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(load_recipe("fashion-mnist"), vae=vae)
    last = plan(config, 1, None).splitlines()[-1]
    assert last.startswith("assumed") and "1000 classes" in last and f"VAE {vae} is here" in last and "1/8" in last
    for unfit in (replace(config, mixer="atconv"), replace(config, image_size=100)):
        with pytest.raises(UserError, match=f"assumed: .*VAE {vae} is here.*1/8") as caught:
            plan(unfit, 1, None)
        assert "\n" not in str(caught.value)


def test_a_dry_run_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--dry-run", "--mixer", "atconv"])
    main()
    assert "SiT-XS/2, mixer atconv" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_what_the_options_cost():
    """Of a matrix that Muon trains one moment is kept, not two: 16 bytes a weight with its average, not 20."""
    config = replace(load_recipe("digits"), model="SiT-B/4", mixer="depthwise", block="modern", optimizer="muon")
    table = plan(config, 1, None)
    with torch.device("meta"):
        network = create_model(config.model, **config.network_options((4, 8, 8), 10))
    whole, matrices = sum(p.numel() for p in network.parameters()), 12 * (2 * 768**2 + 3 * 768 * 2048)
    assert "SiT-B/4, mixer depthwise, modern block" in table and f"{whole:,}" in table
    assert f"{(20 * whole - 4 * matrices) / 2**30:.2f} GiB, not sharded" in table


def test_frozen_parameters_need_no_gradients_moments_or_averages():
    """4 bytes of a frozen float32 weight; 20 of one that is trained, and 4 more for each average kept besides."""
    config = replace(load_recipe("digits"), model="SiT-B/4")
    table = plan(replace(config, train_only=("blocks.*.attn.*",), posthoc_ema=(0.1,)), 1, None)
    with torch.device("meta"):
        network = create_model(config.model, **config.network_options((4, 8, 8), 10))
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    trained, whole = sum(n for name, n in sizes.items() if ".attn." in name), sum(sizes.values())
    assert f"{whole:,}, of which {trained:,} are trained" in table
    assert f"{(4 * whole + 20 * trained) / 2**30:.2f} GiB, not sharded" in table
