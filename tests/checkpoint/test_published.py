"""The published layouts: told from keys and shapes, read safely, and written back bitwise the same.

The files are written here key by key from the published systems' descriptions, not by our own export.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
import shutil
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from sit.checkpoint.arguments import Convert, Inspect
from sit.checkpoint.cli import main
from sit.checkpoint.convert import convert, inspect
from sit.checkpoint.hints import Hints
from sit.checkpoint.load import load_for_sampling
from sit.checkpoint.published import grid_of_table, read_published
from sit.latents.train_vae import build
from sit.latents.vae import DIGITS_VAE, load_vae
from sit.mixers import known_mixers, parse_mixers
from sit.mixers.registry import _factory
from sit.model import SiT, sincos_table
from sit.sampling.config import SamplerConfig
from sit.sampling.sampler import sample
from sit.utils.errors import UserError

XL2 = dict(hidden=1152, depth=28, grid=(16, 16), patch=2, rows=1001)


def published_state(
    mixers: list[str],
    hidden: int = 32,
    depth: int = 4,
    grid: tuple[int, int] = (4, 4),
    patch: int = 2,
    rows: int = 11,
    channels: int = 4,
    learn_sigma: bool = True,
    table: bool | None = None,
    taps: int = 9,
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """A state dict with random values as the published code writes it; ``mixers`` is repeated over the depth.

    The mixers are ``attention``, ``atconv`` (linear layers) and ``repa`` (ATConv with 1×1 convolutions).
    """
    source = torch.Generator(device="cpu").manual_seed(len(mixers) + depth)
    state: dict[str, torch.Tensor] = {}

    def put(name: str, *shape: int) -> None:
        state[name] = torch.empty(shape, device=device)
        if device == "cpu":
            state[name].normal_(std=0.15, generator=source)

    def linear(name: str, out: int, inp: int, *kernel: int) -> None:
        put(f"{name}.weight", out, inp, *kernel)
        put(f"{name}.bias", out)

    if table if table is not None else (mixers != ["atconv"]):
        rows_columns = (torch.arange(side) for side in grid)
        state["pos_embed"] = sincos_table(hidden, *rows_columns).to(device)
    linear("x_embedder.proj", hidden, channels, patch, patch)
    linear("t_embedder.mlp.0", hidden, 256)
    linear("t_embedder.mlp.2", hidden, hidden)
    put("y_embedder.embedding_table.weight", rows, hidden)
    for index in range(depth):
        block, mixer = f"blocks.{index}", mixers[index % len(mixers)]
        if mixer == "attention":
            linear(f"{block}.attn.qkv", 3 * hidden, hidden)
            linear(f"{block}.attn.proj", hidden, hidden)
        else:
            kernel = (1, 1) if mixer == "repa" else ()
            put(f"{block}.attn.difference_control", hidden)
            linear(f"{block}.attn.kernel_proj", hidden, hidden, *kernel)
            linear(f"{block}.attn.kernel_gen", taps, taps)
            linear(f"{block}.attn.x_proj", hidden, hidden, *kernel)
            linear(f"{block}.attn.proj", hidden, hidden, *kernel)
        linear(f"{block}.mlp.fc1", 4 * hidden, hidden)
        linear(f"{block}.mlp.fc2", hidden, 4 * hidden)
        linear(f"{block}.adaLN_modulation.1", 6 * hidden, hidden)
    linear("final_layer.linear", patch * patch * channels * (2 if learn_sigma else 1), hidden)
    linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return state


LAYOUTS = {
    "sit": (["attention"], "published", "attention"),
    "atconv": (["atconv"], "published", "atconv"),
    "hybrid": (["attention", "atconv"], "published", "attention,atconv"),
    "repa": (["repa"], "repa", "atconv:activation=silu"),
}
HINTS = Hints(num_heads=4, image_size=64)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_there_and_back_is_bitwise(kind, suffix, tmp_path):
    mixers, layout, pattern = LAYOUTS[kind]
    original = published_state(mixers, learn_sigma=kind != "repa")
    source = tmp_path / f"in{suffix}"
    torch.save(original, source) if suffix == ".pt" else save_file(original, source)
    ours = convert(Convert(source, tmp_path / "ours", hints=HINTS))
    loaded = load_for_sampling(ours)
    config = loaded.model.config
    assert config.mixer == pattern
    assert (config.hidden_size, config.depth, config.patch_size, config.in_channels) == (32, 4, 2, 4)
    assert (config.num_classes, config.num_heads, config.mlp_ratio) == (10, 4, 4)
    assert config.learn_sigma == (kind != "repa") and config.time_reversed == (kind == "repa")
    assert tuple(config.input_size) == (8, 8) and loaded.info.image_size == (64, 64)
    assert config.positional_embedding == (kind != "atconv")
    assert loaded.vae_source == "stabilityai/sd-vae-ft-ema"
    assert (loaded.transport.config.interpolant, loaded.transport.config.prediction) == ("linear", "velocity")

    back = convert(Convert(ours, tmp_path / f"back{suffix}", layout=layout))
    again = torch.load(back, weights_only=True) if suffix == ".pt" else load_file(back)
    assert again.keys() == original.keys()
    if suffix == ".pt":
        assert list(again)[:5] == list(original)[:5]
    for name, tensor in original.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name


def test_half_precision_files_keep_their_bits(tmp_path):
    original = {name: tensor.bfloat16() for name, tensor in published_state(["attention"]).items()}
    torch.save(original, tmp_path / "in.pt")
    convert(Convert(tmp_path / "in.pt", tmp_path / "ours", hints=HINTS))
    convert(Convert(tmp_path / "ours", tmp_path / "back.safetensors", layout="published"))
    again = load_file(tmp_path / "back.safetensors")
    assert all(again[name].dtype == torch.bfloat16 and torch.equal(again[name], t) for name, t in original.items())


@pytest.mark.parametrize("kind", LAYOUTS)
def test_xl2_is_recognized_and_fits(kind):
    mixers, layout, pattern = LAYOUTS[kind]
    from sit.checkpoint.published import infer
    from sit.checkpoint.weights_file import WeightsFile

    state = published_state(mixers, **XL2, device="meta")
    if "pos_embed" in state:
        state["pos_embed"] = sincos_table(1152, torch.arange(16), torch.arange(16))
    found = infer(WeightsFile(state, "bare", {}, 0), pathlib.Path("xl.pt"), Hints(image_size=256))
    network = found.network()
    assert (found.layout, network.config.mixer, network.config.num_heads) == (layout, pattern, 16)
    assert tuple(network.config.input_size) == (32, 32) and network.config.num_classes == 1000
    if kind == "sit":
        assert sum(tensor.numel() for tensor in found.state.values()) == 675_129_632
    if kind == "hybrid":
        assert sum(tensor.numel() for tensor in found.state.values()) == 656_551_436


def write_training(path, state, prefix="", **more):
    content = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    ema = {name: 2 * tensor for name, tensor in state.items()}
    torch.save({"model": content, "ema": ema, "opt": {"state": {}}, **more}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_training_checkpoints(prefix, tmp_path):
    state = published_state(["attention"])
    arguments = argparse.Namespace(
        model="SiT-B/2", image_size=64, num_classes=10, vae="mse", path_type="GVP", prediction="noise",
        loss_weight="velocity", train_eps=None, sample_eps=0.01, data_path="/data/imagenet/train",
    )  # fmt: skip
    path = write_training(tmp_path / "0050000.pt", state, prefix, args=arguments, steps=50_000)
    ema = load_for_sampling(path, num_heads=2)
    assert torch.equal(ema.model.blocks[3].attn.qkv.weight, 2 * state["blocks.3.attn.qkv.weight"])
    assert ema.info.step == 50_000 and ema.info.data == "/data/imagenet/train"
    assert ema.vae_source == "stabilityai/sd-vae-ft-mse"
    config = ema.transport.config
    assert (config.interpolant, config.prediction, config.loss_weight) == ("gvp", "noise", "velocity")
    assert (config.train_eps, config.sample_eps) == (None, 0.01)
    raw = load_for_sampling(path, num_heads=2, weights="model")
    assert torch.equal(raw.model.blocks[3].attn.qkv.weight, state["blocks.3.attn.qkv.weight"])


def test_training_layout_is_written_and_read(tmp_path):
    state = published_state(["atconv"], rows=10)
    torch.save(state, tmp_path / "in.pt")
    hints = Hints(image_size=(64, 96), num_classes=10, interpolant="vp", prediction="score")
    convert(Convert(tmp_path / "in.pt", tmp_path / "ours", hints=hints))
    convert(Convert(tmp_path / "ours", tmp_path / "training.pt", layout="training"))
    found = read_published(tmp_path / "training.pt")
    assert found.container == "ema" and found.config["null_class"] is False
    assert found.transport_config["interpolant"] == "vp" and found.transport_config["prediction"] == "score"
    assert found.config["input_size"] == (8, 12)
    assert all(torch.equal(found.state[name], tensor) for name, tensor in state.items())


def repa_atconv(state, index: int, x: torch.Tensor, side: int) -> torch.Tensor:
    """ATConv's REPA variant as published: project by 1×1 convolutions, then pool, SiLU, a kernel for each image."""
    get = lambda name: state[f"blocks.{index}.attn.{name}"]  # noqa: E731
    image = x.transpose(1, 2).unflatten(2, (side, side))
    logits = F.conv2d(image, get("kernel_proj.weight"), get("kernel_proj.bias")).flatten(2)
    logits = F.silu(F.adaptive_avg_pool1d(logits, 9))
    kernels = F.linear(logits, get("kernel_gen.weight"), get("kernel_gen.bias"))
    kernels = kernels - get("difference_control").sigmoid()[None, :, None] * kernels.mean(2, keepdim=True)
    value = F.conv2d(image, get("x_proj.weight"), get("x_proj.bias"))
    mixed = [
        F.conv2d(v[None], k.view(-1, 1, 3, 3), padding=1, groups=len(v)) for v, k in zip(value, kernels, strict=True)
    ]
    return F.conv2d(torch.cat(mixed), get("proj.weight"), get("proj.bias")).flatten(2).transpose(1, 2)


def repa_velocity(state, x: torch.Tensor, s: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The REPA network written out from its weights: dx/ds at time s, 0 data and 1 noise."""
    layer = lambda name, z: F.linear(z, state[f"{name}.weight"], state[f"{name}.bias"])  # noqa: E731
    norm = lambda z: F.layer_norm(z, z.shape[-1:], eps=1e-6)  # noqa: E731
    tokens = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=2)
    side = tokens.shape[-1]
    tokens = tokens.flatten(2).transpose(1, 2) + state["pos_embed"]
    angles = s[:, None] * 10000.0 ** (-torch.arange(128, dtype=s.dtype) / 128)
    embedding = layer("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))
    condition = layer("t_embedder.mlp.2", F.silu(embedding)) + state["y_embedder.embedding_table.weight"][y]
    for index in range(4):
        modulation = layer(f"blocks.{index}.adaLN_modulation.1", F.silu(condition))[:, None].chunk(6, dim=2)
        shift, scale, gate, shift2, scale2, gate2 = modulation
        tokens = tokens + gate * repa_atconv(state, index, norm(tokens) * (1 + scale) + shift, side)
        hidden = F.gelu(layer(f"blocks.{index}.mlp.fc1", norm(tokens) * (1 + scale2) + shift2), approximate="tanh")
        tokens = tokens + gate2 * layer(f"blocks.{index}.mlp.fc2", hidden)
    shift, scale = layer("final_layer.adaLN_modulation.1", F.silu(condition))[:, None].chunk(2, dim=2)
    out = layer("final_layer.linear", norm(tokens) * (1 + scale) + shift)
    return torch.einsum("nhwpqc->nchpwq", out.reshape(-1, side, side, 2, 2, 4)).reshape(-1, 4, 2 * side, 2 * side)


def test_repa_gives_the_velocity_of_our_time(tmp_path, caplog):
    """Ours at t is dx/dt: the negative of REPA's dx/ds at s = 1 − t. Projector heads are dropped, and it is said."""
    state = published_state(["repa"], learn_sigma=False)
    projectors = {f"projectors.0.{i}.{kind}": torch.zeros(3) for i in (0, 2, 4) for kind in ("weight", "bias")}
    path = write_training(tmp_path / "repa.pt", state | projectors, args=argparse.Namespace(resolution=64))
    loaded = load_for_sampling(path, num_classes=10, weights="model")
    assert "projector" in caplog.text
    model = loaded.model.double()
    state = {name: tensor.double() for name, tensor in state.items()}
    source = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, 8, generator=source, dtype=torch.float64)
    t, y = torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64), torch.tensor([0, 3, 10])
    torch.testing.assert_close(model(x, t, y), -repa_velocity(state, x, 1 - t, y), atol=1e-5, rtol=1e-5)


def test_repa_trajectory_runs_the_other_way(tmp_path):
    """Euler steps with REPA's own convention, from s = 1 down to 0, end where ours from t = 0 up to 1 do."""
    state = published_state(["repa"], learn_sigma=False)
    torch.save(state, tmp_path / "repa.pt")
    model = load_for_sampling(tmp_path / "repa.pt").model.double()
    state = {name: tensor.double() for name, tensor in state.items()}
    theirs = ours = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, steps = torch.tensor([4]), 5
    for step in range(steps):
        s = torch.full((1,), 1 - step / steps, dtype=torch.float64)
        theirs = theirs - repa_velocity(state, theirs, s, y) / steps
        ours = ours + model(ours, 1 - s, y) / steps
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_repa_sde_is_our_default_sde(tmp_path):
    """REPA's Euler–Maruyama, from s = 1 to 0.04 and then without noise, written out beside our sampler's defaults."""
    state = published_state(["repa"], learn_sigma=False)
    torch.save(state, tmp_path / "repa.pt")
    loaded = load_for_sampling(tmp_path / "repa.pt")
    state = {name: tensor.double() for name, tensor in state.items()}
    steps, y = 8, torch.tensor([4, 1])
    noises = torch.randn(steps, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = start = noises[-1]
    times = [1 - 0.96 * k / (steps - 1) for k in range(steps)] + [0.0]
    for step, (now, after) in enumerate(pairwise(times)):
        velocity = repa_velocity(state, x, torch.full((2,), now, dtype=torch.float64), y)
        score = -(x + (1 - now) * velocity) / now  # as x = (1 − s)·data + s·noise and velocity = noise − data
        x = x + (velocity - now * score) * (after - now)
        if step < steps - 1:
            x = x + (2 * now * (now - after)) ** 0.5 * noises[step]
    ours = sample(
        loaded.model.double(), loaded.transport, start, y, SamplerConfig(steps=steps), step_noise=lambda k: noises[k]
    )
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def test_a_repa_network_with_attention_needs_its_projectors_or_the_flag(tmp_path):
    state = published_state(["attention"], learn_sigma=False)
    torch.save(state, tmp_path / "bare.pt")
    assert not read_published(tmp_path / "bare.pt", HINTS).config["time_reversed"]
    assert read_published(tmp_path / "bare.pt", Hints(num_heads=4, time_reversed=True)).config["time_reversed"]
    torch.save(state | {"projectors.0.0.weight": torch.zeros(2)}, tmp_path / "whole.pt")
    assert read_published(tmp_path / "whole.pt", HINTS).config["time_reversed"]
    arguments = argparse.Namespace(resolution=64, enc_type="dinov2-vit-b", proj_coeff=0.5, prediction="v")
    write_training(tmp_path / "training.pt", state, args=arguments)
    found = read_published(tmp_path / "training.pt", HINTS)
    assert found.config["time_reversed"] and found.transport_config == {"prediction": "velocity"}


@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (8, 2), (1, 16), (16, 1), (3, 5)])
def test_the_grid_is_told_from_the_table(grid):
    table = sincos_table(32, *(torch.arange(side) for side in grid))
    assert grid_of_table(table) == grid
    assert grid_of_table(table.half()) == grid
    assert grid_of_table(torch.randn(1, 16, 32)) is None


def test_two_rows_of_blocks_are_one(tmp_path):
    """REPA's older files part the blocks after the aligned one; as its ``--legacy`` has it, the second row goes on."""
    state = published_state(["attention"], depth=5, learn_sigma=False)
    renamed = {}
    for name, tensor in state.items():
        head, _, tail = name.partition(".")
        number, _, rest = tail.partition(".")
        later = head == "blocks" and int(number) >= 3
        renamed[f"decoder_blocks.{int(number) - 3}.{rest}" if later else name] = tensor
    torch.save(renamed, tmp_path / "older.pt")
    found = read_published(tmp_path / "older.pt", HINTS)
    assert found.config["depth"] == 5 and found.config["time_reversed"] and found.layout == "repa"
    assert found.state.keys() == state.keys()
    assert all(torch.equal(found.state[name], state[name]) for name in state)
    found.network()


@pytest.mark.parametrize("prefix", ["model.", "module.model.", "model._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers(prefix, tmp_path):
    state = published_state(["attention", "atconv"])
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "wrapped.safetensors")
    found = read_published(tmp_path / "wrapped.safetensors", HINTS)
    assert found.state.keys() == state.keys() and found.network().config.mixer == "attention,atconv"
    torch.save(state | {f"model.{name}": tensor for name, tensor in state.items()}, tmp_path / "both.pt")
    with pytest.raises(UserError, match="both.pt has .* twice, with and without the prefix"):
        read_published(tmp_path / "both.pt", HINTS)


def test_a_bare_file_of_one_class(tmp_path):
    """FFHQ's networks have one class and no null class: nothing about classes is asked or blamed."""
    torch.save(published_state(["atconv"], rows=1), tmp_path / "ffhq.pt")
    found = read_published(tmp_path / "ffhq.pt", HINTS).network().config
    assert (found.num_classes, found.null_class) == (1, False)
    with pytest.raises(UserError) as caught:
        read_published(tmp_path / "ffhq.pt").network()
    assert "`image_size`" in str(caught.value) and "num_classes" not in str(caught.value)


def test_sizes_are_told_from_shapes(tmp_path):
    state = published_state(["attention"], grid=(2, 6), patch=4, channels=3, learn_sigma=False, rows=4, depth=3)
    torch.save(state, tmp_path / "x.pt")
    found = read_published(tmp_path / "x.pt", HINTS)
    assert found.config["input_size"] == (8, 24) and found.info.image_size == (64, 192)
    assert (found.config["patch_size"], found.config["in_channels"], found.config["num_classes"]) == (4, 3, 3)
    assert not found.config["learn_sigma"] and found.config["depth"] == 3 and found.vae_name is None
    found.network()
    torch.save(published_state(["atconv"], taps=25), tmp_path / "five.pt")
    assert read_published(tmp_path / "five.pt", HINTS).config["mixer"] == "atconv:kernel_size=5"
    static = {k: v for k, v in published_state(["atconv"]).items() if "difference_control" not in k}
    torch.save(static, tmp_path / "plain.pt")
    assert read_published(tmp_path / "plain.pt", HINTS).network().config.mixer == "atconv:inhibition=false"
    three = published_state(["atconv", "atconv", "attention"], depth=7)
    torch.save(three, tmp_path / "three.pt")
    assert read_published(tmp_path / "three.pt", HINTS).network().config.mixer == "atconv,atconv,attention"


@pytest.mark.parametrize(
    "mixer",
    ["attention:qk_norm=true", "atconv:kernel_size=5:inhibition=false", "atconv:routing=false", "atconv,attention"],
)
def test_bare_weights_of_our_own_networks(mixer, tmp_path):
    model = SiT(16, hidden_size=48, depth=4, num_heads=3, num_classes=7, mixer=mixer, learn_sigma=False)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    hints = Hints(image_size=128, num_heads=None if "qk_norm" in mixer else 3)
    config = read_published(tmp_path / "x.safetensors", hints).network().config
    assert config.mixer == mixer and config.num_classes == 7
    assert config.num_heads == 3


def refusal(path, **hints) -> str:
    with pytest.raises(UserError) as caught:
        load_for_sampling(path, **hints)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_what_is_open_is_asked_for_by_its_flag(tmp_path):
    torch.save(published_state(["attention"]), tmp_path / "a.pt")
    assert "`num_heads`" in refusal(tmp_path / "a.pt")
    torch.save(published_state(["atconv"]), tmp_path / "b.pt")
    assert "`image_size`" in refusal(tmp_path / "b.pt")
    assert "multiples of 16" in refusal(tmp_path / "b.pt", image_size=60)
    assert "`num_classes`" in refusal(tmp_path / "b.pt", num_classes=7)
    assert "--image-size" in inspect(Inspect(tmp_path / "b.pt"))
    load_for_sampling(tmp_path / "b.pt", image_size=64)


def test_an_image_size_that_contradicts_the_table_asks_for_the_vae(tmp_path):
    """A table has the latents' size alone: that of the images is known by the VAE's downsampling."""
    state = published_state(["attention"])  # 8×8 latents
    for told in (128, [128, 128]):
        path = write_training(tmp_path / "a.pt", state, args=argparse.Namespace(image_size=told), steps=5)
        message = refusal(path, num_heads=4)
        assert "trained on images of 128" in message and "8×8 latents are images of 64×64 by a VAE of 8" in message
        assert message.endswith("as `vae`")
    vae = build((4, 4, 4, 4, 4), 32)
    vae.save_pretrained(tmp_path / "vae")
    assert load_for_sampling(path, vae=tmp_path / "vae", num_heads=4).info.image_size == (128, 128)
    for told in (64, [64, 64], None):
        path = write_training(tmp_path / "a.pt", state, args=argparse.Namespace(image_size=told), steps=5)
        assert load_for_sampling(path, num_heads=4).info.image_size == (64, 64)


def test_a_vae_of_other_channels_is_refused_before_anything_is_written(tmp_path):
    torch.save(published_state(["attention"]), tmp_path / "a.pt")
    with pytest.raises(UserError, match="`vae=none` has latents of 3 channels, and .*a.pt has 4"):
        convert(Convert(tmp_path / "a.pt", tmp_path / "ours", vae="none", hints=HINTS))
    assert not (tmp_path / "ours").exists()


class Malicious:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_unsafe_files_are_refused_with_a_sentence_on_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = published_state(["attention"])
    torch.save({"ema": state, "args": Malicious()}, "evil.pt")
    assert "can run any code" in refusal("evil.pt") and "system" in refusal("evil.pt")
    with open("raw.pt", "wb") as file:
        pickle.dump({"ema": Malicious()}, file)
    assert "can run any code" in refusal("raw.pt")
    assert not (tmp_path / "harmed").exists()
    torch.save({"ema": state, "args": argparse.Namespace(out=pathlib.Path("x"))}, "path.pt")
    assert "PosixPath" in refusal("path.pt") or "PurePosixPath" in refusal("path.pt")
    torch.save(torch.nn.Linear(2, 2), "module.pt")
    assert "Linear" in refusal("module.pt") and "state_dict()" in refusal("module.pt")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_cut_off_files(form, tmp_path):
    path = tmp_path / ("x.safetensors" if form == "safetensors" else "x.pt")
    state = published_state(["atconv"], depth=1)
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    read_published(path, HINTS)
    content = path.read_bytes()
    for cut in (0, 1, 3, 10, 100, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        assert "cut off" in refusal(path), cut


def test_foreign_files(tmp_path):
    torch.save(torch.nn.Linear(3, 4).state_dict(), tmp_path / "linear.pt")
    assert "not a SiT" in refusal(tmp_path / "linear.pt")
    (tmp_path / "text.pt").write_text("hello\n" * 50)
    assert "not a weights file" in refusal(tmp_path / "text.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds a list" in refusal(tmp_path / "list.pt")
    torch.save({"loss": 0.1, "epoch": 3}, tmp_path / "loss.pt")
    assert "loss, epoch" in refusal(tmp_path / "loss.pt")
    state = published_state(["attention"])
    torch.save({k: v for k, v in state.items() if "blocks.2.mlp.fc2" not in k}, tmp_path / "hole.pt")
    assert "blocks.2.mlp.fc2" in refusal(tmp_path / "hole.pt", num_heads=4)
    torch.save({k: v for k, v in state.items() if "blocks.2.attn" not in k}, tmp_path / "hole.pt")
    assert "block 2" in refusal(tmp_path / "hole.pt", num_heads=4)
    torch.save(state | {"extra.weight": torch.zeros(2)}, tmp_path / "more.pt")
    assert "extra.weight" in refusal(tmp_path / "more.pt", num_heads=4)


def test_layouts_are_not_mixed_up(tmp_path):
    torch.save(published_state(["repa"], learn_sigma=False), tmp_path / "repa.pt")
    with pytest.raises(UserError, match="`layout=repa`"):
        convert(Convert(tmp_path / "repa.pt", tmp_path / "x.pt", layout="published"))
    torch.save(published_state(["attention"]), tmp_path / "sit.pt")
    with pytest.raises(UserError, match="`layout=published`"):
        convert(Convert(tmp_path / "sit.pt", tmp_path / "x.pt", layout="repa", hints=HINTS))
    with pytest.raises(UserError, match="must end in .pt"):
        convert(Convert(tmp_path / "sit.pt", tmp_path / "x", layout="published"))
    with pytest.raises(UserError, match="writes a folder"):
        convert(Convert(tmp_path / "sit.pt", tmp_path / "x.pt"))
    with pytest.raises(UserError, match="exists already"):
        convert(Convert(tmp_path / "sit.pt", tmp_path / "sit.pt", layout="published"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repa.pt", "sit.pt"]


def test_what_serves_files_alone_is_refused_for_folders(tmp_path):
    torch.save(published_state(["attention"]), tmp_path / "sit.pt")
    ours = convert(Convert(tmp_path / "sit.pt", tmp_path / "ours", hints=HINTS))
    for told in (Hints(weights="model"), Hints(interpolant="gvp", prediction="score"), Hints(image_size=64)):
        for refused in (
            lambda told=told: convert(Convert(ours, tmp_path / "x.pt", layout="training", hints=told)),
            lambda told=told: inspect(Inspect(ours, hints=told)),
        ):
            with pytest.raises(UserError, match="ours says itself what it is; `.*` only serve for published weights"):
                refused()
    with pytest.raises(UserError, match="`vae=mine`: a file of `layout=training` names no VAE"):
        convert(Convert(ours, tmp_path / "x.pt", layout="training", vae="mine"))
    assert not (tmp_path / "x.pt").exists()


def test_a_pipelines_folder_serves_as_vae(tmp_path):
    torch.save(published_state(["attention"]), tmp_path / "sit.pt")
    (tmp_path / "pipeline").mkdir()
    shutil.copytree(DIGITS_VAE, tmp_path / "pipeline" / "vae")
    ours = convert(Convert(tmp_path / "sit.pt", tmp_path / "ours", vae=str(tmp_path / "pipeline"), hints=HINTS))
    expected, found = load_vae("digits").state_dict(), load_vae(ours / "vae").state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def network_of(mixer: str, layout: str) -> SiT:
    """A small network whose weights are all random, so that its output depends on every one."""
    torch.manual_seed(0)
    options = dict(hidden_size=48, depth=4, num_heads=3, num_classes=7, learn_sigma=False)
    network = SiT(16, mixer=mixer, time_reversed=layout == "repa", **options)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return network.eval()


EXPORTED = {
    "published": ["attention", "attention:qk_norm=true", "atconv", "atconv:kernel_size=5", "atconv:inhibition=false",
                  "atconv:routing=false", "atconv:activation=gelu_tanh", "attention,atconv:kernel_size=5"],
    "repa": ["attention", "atconv:activation=silu", "atconv:routing=false:activation=silu",
             "attention,atconv:kernel_size=5:inhibition=false:activation=silu"],
}  # fmt: skip
REFUSED = {
    "published": ["neighborhood", "neighborhood:kernel_size=7", "linear_attention", "depthwise", "dico",
                  "atconv:activation=gelu", "atconv:activation=silu", "attention,atconv:activation=gelu",
                  "attention,linear_attention", "deformable", "atconv:scope=window", "atconv:scope=token",
                  "attention:rope=true"],
    "repa": ["neighborhood", "linear_attention", "depthwise", "dico", "atconv", "atconv:activation=gelu",
             "attention,atconv", "atconv:activation=silu,neighborhood", "deformable",
             "atconv:activation=silu:scope=window", "attention:rope=true"],
}  # fmt: skip


@pytest.mark.parametrize("layout, mixer", [(layout, mixer) for layout in EXPORTED for mixer in EXPORTED[layout]])
def test_what_is_exported_is_read_back_as_the_same_network(layout, mixer, tmp_path):
    network = network_of(mixer, layout)
    network.save_pretrained(tmp_path / "ours")
    convert(Convert(tmp_path / "ours", tmp_path / "x.pt", layout=layout))
    reversed_attention = True if (layout, mixer) == ("repa", "attention") else None  # which nothing in the file tells
    hints = dict(image_size=128, num_heads=3, num_classes=7, time_reversed=reversed_attention)
    again = load_for_sampling(tmp_path / "x.pt", **hints).model.double()
    x, t, y = torch.randn(2, 4, 16, 16).double(), torch.tensor([0.2, 0.7]).double(), torch.tensor([1, 6])
    with torch.no_grad():
        torch.testing.assert_close(again(x, t, y), network.double()(x, t, y))


@pytest.mark.parametrize("layout, mixer", [(layout, mixer) for layout in REFUSED for mixer in REFUSED[layout]])
def test_mixers_that_a_layout_lacks_are_refused(layout, mixer, tmp_path):
    network_of(mixer, layout).save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError, match=f"`layout={layout}`") as caught:
        convert(Convert(tmp_path / "ours", tmp_path / "x.pt", layout=layout))
    assert "\n" not in str(caught.value) and not (tmp_path / "x.pt").exists()


def test_a_table_that_is_laid_over_another_grid_is_not_exported(tmp_path):
    network = SiT(8, patch_size=2, hidden_size=48, depth=2, num_heads=3, num_classes=7, positional_grid=(2, 2))
    network.save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError, match="`layout=published` lays the positional table .* over 2 x 2"):
        convert(Convert(tmp_path / "ours", tmp_path / "x.pt", layout="published"))


@pytest.mark.parametrize("layout", ["published", "training", "repa"])
def test_a_modern_block_is_not_exported(layout, tmp_path):
    network = SiT(8, 2, 4, 48, 2, 3, num_classes=7, block="modern", time_reversed=layout == "repa")
    network.save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError, match="has the published block alone, not a modern one; keep it in our layout"):
        convert(Convert(tmp_path / "ours", tmp_path / "x.pt", layout=layout))
    torch.save(network.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(UserError, match="is not a SiT"):
        load_for_sampling(tmp_path / "bare.pt")


def test_every_mixer_is_either_exported_or_refused():
    for layout in EXPORTED:
        tried = {spec.name for mixer in EXPORTED[layout] + REFUSED[layout] for spec in parse_mixers(mixer)}
        assert tried >= {name for name in known_mixers() if _factory(name).__module__.startswith(("sit.", "atconv."))}


def test_the_command_line(tmp_path, capsys):
    torch.save(published_state(["attention", "atconv"]), tmp_path / "in.pt")
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(tmp_path / "in.pt"), str(tmp_path / "ours")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "ours").exists()
    main(["convert", str(tmp_path / "in.pt"), str(tmp_path / "ours"), "--num-heads", "4", "--vae", "some/vae"])
    main(["inspect", str(tmp_path / "ours")])
    text = capsys.readouterr().out
    for expected in ("a checkpoint of ours, complete", "attention,atconv", "4 x 8 x 8", "some/vae", "10, with a null"):
        assert expected in text
    main(["inspect", str(tmp_path / "in.pt")])
    text = capsys.readouterr().out
    assert "bare state dict" in text and "--num-heads" in text and "learn_sigma" in text
