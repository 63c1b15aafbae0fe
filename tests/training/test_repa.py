"""Alignment (REPA): the loss against loops in float64, a frozen encoder, exact resuming, nothing of it in samples."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf
from tiny_runs import tiny_run

from sit.checkpoint.load import load_for_sampling
from sit.data.factory import open_images
from sit.latents.datasets import PixelData, encode_in_memory
from sit.latents.encode import Encode, encode
from sit.latents.factory import open_latents
from sit.latents.vae import load_vae
from sit.model import SiT, create_model
from sit.training.config import TrainConfig
from sit.training.data import open_training_data
from sit.training.loader import training_batches
from sit.training.objective import TransportObjective
from sit.training.repa import Encoder, align, aligned_block, attach_projector, cosine_similarity, load_encoder
from sit.training.run_folder import read_metrics
from sit.training.trainer import train
from sit.transport.transport import Transport
from sit.utils.checksums import sealed
from sit.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
WIDTH = 24


def tiny_vit(**changes) -> torch.nn.Module:
    """A vision transformer of two blocks with a class token, for 16x16 pixels in patches of 4, with random weights."""
    torch.manual_seed(1)
    size = dict(img_size=16, patch_size=4, embed_dim=WIDTH, depth=2, num_heads=2, num_classes=0)
    return timm.create_model("vit_tiny_patch16_224", **size | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny transformer as timm saves it."""
    place = tmp_path_factory.mktemp("encoder")
    arguments = dict(img_size=16, patch_size=4, embed_dim=WIDTH, depth=2, num_heads=2)
    save_for_hf(tiny_vit(), place, model_args=arguments, safe_serialization=True)
    return place


def small(output: Path, encoder: Path | None, **changes) -> TrainConfig:
    aligned = dict(model="SiT-XS/2", mixer="attention,atconv", steps=4, checkpoint_every=4, repa_block=4)
    return tiny_run(output, **aligned | dict(repa=None if encoder is None else str(encoder)) | changes)


def losses(run: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in read_metrics(run / "metrics.jsonl")]


def state(run: Path, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:07d}" / "training" / "model.safetensors")


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, folder) -> Path:
    """A run of four steps with alignment."""
    AcceleratorState._reset_state(reset_partial_state=True)
    run = tmp_path_factory.mktemp("run") / "a"
    train(small(run, folder))
    return run


# ---------------------------------------------------------------- the encoder


def test_features_are_the_encoders_patch_tokens_of_the_normalized_image(folder):
    encoder = load_encoder(str(folder), (4, 4))
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network = tiny_vit().eval()
    mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
    pixels = torch.stack([(images[:, c] / 255.0 - mean[c]) / std[c] for c in range(3)], dim=1)
    with torch.no_grad():
        expected = network.forward_features(pixels)[:, 1:]
    torch.testing.assert_close(encoder.features(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid, side", [((8, 8), (32, 32)), ((4, 6), (16, 24)), ((2, 2), (8, 8))])
def test_the_input_is_resized_until_the_grids_match(folder, grid, side):
    encoder = load_encoder(str(folder), grid)
    assert encoder.input_size == side and encoder.network.patch_embed.grid_size == grid
    assert encoder.features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, grid[0] * grid[1], WIDTH)


def test_tokens_lie_where_the_image_has_them(folder):
    """Without position embeddings and attention between tokens, a bright corner changes that corner's feature alone."""
    network = tiny_vit(pos_embed="none")
    for block in network.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    encoder = Encoder(network, (4, 4))
    dark = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    bright = dark.clone()
    bright[..., 4:8, 12:16] = 255  # row 1, column 3
    changed = (encoder.features(bright) - encoder.features(dark)).abs().amax(-1)[0] > 1e-4
    assert changed.nonzero().tolist() == [[1 * 4 + 3]]


def test_features_of_a_convolutional_network_are_resized():
    network = timm.create_model("resnet10t", num_classes=0)
    encoder = Encoder(network, (4, 4))
    found = encoder.features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert found.shape == (1, 16, network.num_features)


# ---------------------------------------------------------------- the loss


def test_cosine_similarity_against_loops():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 5, 7, generator=generator), torch.randn(3, 5, 7, generator=generator)
    expected = []
    for image in range(3):
        total = 0.0
        for token in range(5):
            x, y = a[image, token].tolist(), b[image, token].tolist()
            dot = sum(p * q for p, q in zip(x, y, strict=True))
            total += dot / math.sqrt(sum(p * p for p in x) * sum(q * q for q in y))
        expected.append(total / 5)
    np.testing.assert_allclose(cosine_similarity(a, b).double().numpy(), expected, rtol=1e-5, atol=1e-7)


def by_layers(projector, tokens: torch.Tensor) -> torch.Tensor:
    for number in (0, 2, 4):
        layer = projector[number]
        tokens = tokens @ layer.weight.T + layer.bias
        if number < 4:
            tokens = tokens / (1 + torch.exp(-tokens))
    return tokens


def by_taps(projector, tokens: torch.Tensor) -> torch.Tensor:
    """A 3x3 convolution of 4x4 tokens with zeros around them, as a sum over its nine taps."""
    weight, bias = projector.convolution.weight, projector.convolution.bias
    padded = torch.zeros(len(tokens), 6, 6, tokens.shape[2], dtype=tokens.dtype)
    padded[:, 1:5, 1:5] = tokens.view(-1, 4, 4, tokens.shape[2])
    taps = (padded[:, i : i + 4, j : j + 4] @ weight[:, :, i, j].T for i in range(3) for j in range(3))
    return sum(taps).flatten(1, 2) + bias


@pytest.mark.parametrize("projector, norm", [("mlp", None), ("conv", 0.6)])
def test_the_training_loss_against_float64(tmp_path, folder, projector, norm):
    """One step's loss, of a network with random weights, computed anew from its blocks' tokens in float64."""
    options = dict(repa_projector=projector, repa_spatial_norm=norm)
    config = small(tmp_path / "a", folder, repa_weight=0.7, flip=True, class_dropout=0.5, **options)
    data = open_training_data(config, torch.device("cpu"), progress=False).data
    network = create_model(config.model, **config.network_options(data.latent_shape, 10))
    base = TransportObjective(Transport(), config.class_dropout, null_label=10)
    objective = align(base, network, config, device=torch.device("cpu"), autocast=contextlib.nullcontext)
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    batch = next(training_batches(data, seed=config.seed, global_batch=config.batch_size))
    loss, metrics = objective(network, batch)

    network = network.double()
    taken = []
    network.blocks[3].register_forward_hook(lambda module, inputs, output: taken.append(output))
    t = batch["t_uniform"].double()
    data, noise = batch["latents"].double(), batch["noise"].double()
    labels = torch.where(batch["drop"] < 0.5, 10, batch["labels"])
    along = t.view(-1, 1, 1, 1)
    with torch.no_grad():
        out = network(along * data + (1 - along) * noise, t, labels)
        projected = (by_layers if projector == "mlp" else by_taps)(network.projector, taken[0])
        features = objective.encoder.features(batch["images"]).double()
    if norm is not None:  # iREPA: less a part of the mean over tokens, over the unbiased standard deviation
        center = sum(features.unbind(1)) / 16
        middle = sum((token - center) ** 2 for token in features.unbind(1)) / 15
        features = torch.stack([(token - norm * center) / (middle**0.5 + 1e-6) for token in features.unbind(1)], 1)
    cosine = (projected * features).sum(-1) / (projected.norm(dim=-1) * features.norm(dim=-1))
    expected = (out - (data - noise)).square().mean((1, 2, 3)) - 0.7 * cosine.mean(1)
    assert metrics.keys() == {"alignment"}
    torch.testing.assert_close(metrics["alignment"].double(), cosine.mean(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-4)


def test_without_repa_the_network_and_its_first_loss_are_the_same_to_the_bit(tmp_path, folder, aligned, monkeypatch):
    """Weight 0 on images encoded on the fly, and no projector there: the same run, beginning with the same draws."""
    train(small(tmp_path / "zero", folder, repa_weight=0.0))
    AcceleratorState._reset_state(reset_partial_state=True)

    monkeypatch.setattr("sit.latents.factory.MEMORY_LIMIT", 0)
    train(small(tmp_path / "none", None, repa_block=None))
    with_zero, without = state(tmp_path / "zero"), state(tmp_path / "none")
    assert losses(tmp_path / "zero") == losses(tmp_path / "none")
    assert all(torch.equal(with_zero[name], without[name]) for name in without)
    assert {name for name in with_zero if name not in without} == {name for name in with_zero if "projector" in name}
    assert losses(aligned) != losses(tmp_path / "none")  # the test can fail


def test_the_images_come_with_the_draws_that_latents_in_memory_get():
    images, vae = open_images("digits", 32), load_vae("digits")
    pixels = next(training_batches(PixelData(images, vae, flip=True, keep_images=True), seed=5, global_batch=6))
    plain = next(training_batches(encode_in_memory(images, vae, flip=True, progress=False), seed=5, global_batch=6))
    for name in ("labels", "t_uniform", "noise", "drop", "indices"):
        assert torch.equal(pixels[name], plain[name]), name
    torch.testing.assert_close(pixels["latents"], plain["latents"], atol=1e-2, rtol=1e-2)  # moments kept in float16
    originals = torch.stack([images[int(index)][0] for index in pixels["indices"]])
    flipped = [not torch.equal(shown, own) for shown, own in zip(pixels["images"], originals, strict=True)]
    assert 0 < sum(flipped) < 6
    for flip, shown, own in zip(flipped, pixels["images"], originals, strict=True):
        assert torch.equal(shown, own.flip(-1) if flip else own)


# ---------------------------------------------------------------- training


def test_the_similarity_rises_and_the_encoder_stays(tmp_path, folder, monkeypatch):
    used = []
    monkeypatch.setattr("sit.training.repa.load_encoder", lambda *args: used.append(load_encoder(*args)) or used[0])
    train(small(tmp_path / "a", folder, steps=12, checkpoint_every=12, learning_rate=1e-3))
    alignment = losses(tmp_path / "a", "alignment")
    assert np.mean(alignment[-3:]) > np.mean(alignment[:3]) + 0.2
    fresh = load_encoder(str(folder), (4, 4)).network.state_dict()
    (encoder,) = used
    now = encoder.network.state_dict()
    assert all(torch.equal(fresh[name], now[name]) for name in fresh)
    assert not encoder.network.training
    assert not any(p.requires_grad or p.grad is not None for p in encoder.network.parameters())


def test_resuming_is_exact(tmp_path, folder, aligned, monkeypatch):
    calls, features = [], Encoder.features

    def signalled(encoder, images):
        calls.append(len(images))
        if len(calls) == 3:  # in the second step: the first call is a trial
            os.kill(os.getpid(), signal.SIGTERM)
        return features(encoder, images)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Encoder, "features", signalled)
        train(small(tmp_path / "b", folder))
    assert calls == [1, 8, 8]
    AcceleratorState._reset_state(reset_partial_state=True)
    train(small(tmp_path / "b", folder, resume="auto"))
    whole, resumed = state(aligned), state(tmp_path / "b")
    assert whole.keys() == resumed.keys() and any(name.startswith("projector.") for name in whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert losses(aligned) == losses(tmp_path / "b")
    sampled = "checkpoints/step-0000004/transformer/diffusion_pytorch_model.safetensors"
    once, again = load_file(aligned / sampled), load_file(tmp_path / "b" / sampled)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_nothing_of_it_is_left_for_sampling(aligned):
    weights = load_file(aligned / "checkpoints/step-0000004/transformer/diffusion_pytorch_model.safetensors")
    loaded = load_for_sampling(aligned)
    assert weights.keys() == loaded.model.state_dict().keys()
    assert not any("projector" in name for name in weights)
    assert loaded.model.projector is None


def test_the_gradient_reaches_the_aligned_block_and_those_before_it_alone():
    network = SiT(8, hidden_size=32, depth=3, num_heads=2, num_classes=5, mixer="attention")
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    attach_projector(network, 2, WIDTH)
    inputs = torch.randn(2, 4, 8, 8), torch.rand(2), torch.arange(2)
    out, projected = network(*inputs, project=True)
    assert torch.equal(out, network(*inputs)) and projected.shape == (2, 16, WIDTH)
    projected.sum().backward()
    assert network.blocks[1].mlp.fc1.weight.grad.abs().sum() > 0
    assert network.blocks[2].mlp.fc1.weight.grad is None
    network.enable_gradient_checkpointing()
    assert torch.equal(network(*inputs, project=True)[1], projected)


# ---------------------------------------------------------------- as its authors run it


@pytest.mark.parametrize("model, block", [("B/2", 4), ("L/4", 8), ("XL/2", 8), ("S/2", 4), ("XS/2", 2), ("XS12/2", 4)])
def test_the_block_of_each_size(model, block):
    assert aligned_block(TrainConfig(model=f"SiT-{model}")) == block
    assert aligned_block(TrainConfig(model=f"SiT-{model}", repa_block=3)) == 3


def test_initial_values_of_the_convolutional_projector():
    """PyTorch's for a convolution: uniform within 1 over the root of what a value sums up."""
    network = SiT(8, hidden_size=64, depth=2, num_heads=2, num_classes=5, mixer="attention")
    attach_projector(network, 1, 48, "conv")
    bound = (9 * 64) ** -0.5
    weight, bias = network.projector.convolution.weight, network.projector.convolution.bias
    assert weight.shape == (48, 64, 3, 3) and 0.99 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02) and 0 < bias.abs().max() <= bound
    assert network.projector(torch.randn(2, 16, 64)).shape == (2, 16, 48)


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> tuple[Path, Path]:
    """Twelve images, and a latent cache of them and of the flipped ones."""
    root = tmp_path_factory.mktemp("cached")
    for number in range(12):
        place = root / "images" / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.RandomState(number).randint(0, 255, (32, 32, 3), dtype=np.uint8)).save(place)
    encode(Encode(root / "cache", data=str(root / "images"), image_size=32, workers=0))
    return root / "images", root / "cache"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_gives_the_images_that_its_latents_are_of(cached, workers):
    images, cache = cached
    vae = load_vae("digits")
    beside = open_latents(str(cache), vae, "digits", flip=True, keep_images=True)
    lazy = PixelData(open_images(str(images), 32), vae, flip=True, keep_images=True)
    ways = [training_batches(data, seed=5, global_batch=6, workers=workers) for data in (beside, lazy)]
    for one, other in itertools.islice(zip(*ways, strict=True), 3):
        assert one.keys() == other.keys()
        for name in ("images", "labels", "t_uniform", "noise", "drop", "indices"):
            assert torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one["latents"], other["latents"], atol=1e-2, rtol=1e-2)
    for way in ways:
        way.close()


def test_the_images_of_a_cache_may_be_moved_but_not_changed(cached, tmp_path):
    images, cache = cached
    vae = load_vae("digits")
    shutil.copytree(cache, tmp_path / "cache")
    manifest = tmp_path / "cache" / "manifest.json"
    told = {name: value for name, value in json.loads(manifest.read_text()).items() if name != "checksum"}
    manifest.write_text(sealed(told | {"data": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="needs the images .*gone.*; say by `repa_images`"):
        open_latents(str(tmp_path / "cache"), vae, "digits", keep_images=True)
    shutil.copytree(images, tmp_path / "moved")
    found = open_latents(str(tmp_path / "cache"), vae, "digits", keep_images=True, beside=str(tmp_path / "moved"))
    assert found.images.name == str(tmp_path / "moved")
    (tmp_path / "moved" / "a" / "0.png").write_bytes((images / "a" / "2.png").read_bytes())
    for other in (tmp_path / "moved", "digits"):
        with pytest.raises(UserError, match=f"`repa_images={other}` are not the images"):
            open_latents(str(tmp_path / "cache"), vae, "digits", keep_images=True, beside=str(other))


def test_until_a_step_from_a_cache_and_resumed_past_it(tmp_path, folder, cached, monkeypatch):
    """Up to the step as if it went on; after it the loss alone, without the encoder, and resuming is exact."""
    options = dict(data=str(cached[1]), vae="digits", flip=True, repa_projector="conv", repa_spatial_norm=0.6)
    calls, features = [], Encoder.features
    monkeypatch.setattr(Encoder, "features", lambda self, images: calls.append(len(images)) or features(self, images))
    train(small(tmp_path / "on", folder, steps=3, **options))
    AcceleratorState._reset_state(reset_partial_state=True)
    calls.clear()
    ends = options | dict(repa_until=2, checkpoint_every=3, keep_last=0)
    train(small(tmp_path / "ends", folder, **ends))
    assert calls == [1, 8, 8]  # a trial, and two steps
    rows = read_metrics(tmp_path / "ends" / "metrics.jsonl")
    assert ["alignment" in row for row in rows] == [True, True, False, False]
    whole = losses(tmp_path / "on")
    assert losses(tmp_path / "ends")[:2] == whole[:2]
    plain = whole[2] + 0.5 * losses(tmp_path / "on", "alignment")[2]
    assert losses(tmp_path / "ends")[2] == pytest.approx(plain, rel=1e-5)

    shutil.copytree(tmp_path / "ends", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-0000004")
    AcceleratorState._reset_state(reset_partial_state=True)
    train(small(tmp_path / "again", folder, resume="auto", **ends))
    one, two = state(tmp_path / "ends"), state(tmp_path / "again")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert losses(tmp_path / "ends") == losses(tmp_path / "again")


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(repa="no_such_vit"), "`repa=no_such_vit`: neither a folder nor a timm model"),
        (dict(repa="/no/such/folder"), "`repa=/no/such/folder`: neither a folder nor"),
        (dict(repa_block=7), "`repa_block=7`: the network has the blocks 1 to 6"),
        (dict(repa_images="digits"), "`repa_images=digits` belongs to a latent cache"),
        (dict(repa_until=0), "`repa_until` must be at least 1"),
        (dict(repa_spatial_norm=1.5), r"`repa_spatial_norm` must be in \[0, 1\]"),
    ],
)
def test_mistakes_leave_no_run_folder(tmp_path, folder, changes, words):
    with pytest.raises(UserError, match=words):
        train(small(tmp_path / "a", folder, **changes))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name, options", [("levit_128s", {}), ("vit_tiny_patch16_224", {"in_chans": 1})])
def test_an_encoder_that_gives_no_map_is_not_called_incomplete(tmp_path, name, options):
    network = timm.create_model(name, num_classes=0, **options)
    timm.models.save_for_hf(network, tmp_path, model_args=options)
    with pytest.raises(UserError, match="gives no map of features .*take a vision transformer for color images"):
        load_encoder(str(tmp_path), (4, 5))


def test_a_normalization_over_one_token_is_refused(tmp_path, folder):
    """Its standard deviation would not be a number."""
    with pytest.raises(UserError, match="`repa_spatial_norm` is over an image's tokens, and this network has one"):
        train(small(tmp_path / "a", folder, repa_spatial_norm=0.6, model="SiT-XS/8", mixer="attention"))


def test_a_folder_without_its_files_is_named(tmp_path, folder):
    with pytest.raises(UserError, match="has no config.json"):
        load_encoder(str(tmp_path), (4, 4))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="can't be loaded .* is the folder complete"):
        load_encoder(str(tmp_path), (4, 4))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="can't be loaded .* is the folder complete"):
        load_encoder(str(tmp_path), (4, 4))
