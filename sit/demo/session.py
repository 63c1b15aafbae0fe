"""What the page of :mod:`sit.demo` shows, without the page: timed samples, their way from noise, their kernels."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from sit.checkpoint.load import Loaded, load_for_sampling
from sit.demo.kernels import describe_kernels, draw_kernels, kernels_at
from sit.latents.vae import decode
from sit.sampling.config import OnStep, SamplerConfig
from sit.sampling.images import check_labels, latent_shape_for, sample_images, word_for
from sit.sampling.sampler import KeyedNoise
from sit.utils.errors import UserError
from sit.utils.image_grid import enlarge, labeled_grid, tile
from sit.utils.precision import allow_tf32

CELL = 128
"""side in pixels that small images are enlarged to, and that all have in a strip"""


COLUMNS = 4


GAP = 4


STRIP = 8
"""states in the strip of a trajectory"""


@dataclass
class Player:
    """A checkpoint to play with: what the user calls it, and the size of its images (None: as trained)."""

    path: str
    loaded: Loaded
    image_size: tuple[int, int] | None = None
    vae: str | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w)."""
        return latent_shape_for(self.loaded, self.image_size)

    @property
    def heading(self) -> str:
        """What it is, in one line of Markdown."""
        model, step = self.loaded.model, self.loaded.info.step
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        modern = "modern " if model.config.block == "modern" else ""
        parts = [
            f"{len(model.blocks)} {modern}blocks of width {model.config.hidden_size}",
            f"{millions:.3g} M parameters",
        ]
        return f"### {model.config.mixer}\n`{self.path}`: {', '.join(parts)}" + (f", step {step:,}" if step else "")


@dataclass
class Trajectory:
    """The way of sample 0: its states (S, c, h, w) float32 on the CPU, their times from noise (0) to data (1)."""

    label: int
    times: list[float]
    states: torch.Tensor

    def nearest(self, t: float) -> int:
        """The number of the state whose time is nearest to t."""
        return int(np.abs(np.array(self.times) - t).argmin())

    def spread(self, count: int) -> list[int]:
        """The numbers of at most ``count`` states, spread evenly over time, the first and the last among them."""
        return sorted({self.nearest(t) for t in np.linspace(self.times[0], self.times[-1], count)})


@dataclass
class Played:
    """Images (n, H, W, 3) uint8, the seconds that an image took with its decoding, and the way of the first one."""

    images: np.ndarray
    seconds: float
    trajectory: Trajectory


def open_players(
    paths: Sequence[str], device: torch.device, image_size: tuple[int, int] | None = None, vae: str | None = None
) -> list[Player]:
    """Read the checkpoints, fetch their VAEs and let each make an image, so that the first press is not slow.

    Raises:
        UserError: none or more than two are given, one can't be read, or two have nothing in common to compare.
    """
    if not 1 <= len(paths) <= 2:
        raise UserError(f"give one run or two, not {len(paths)}: python -m sit.demo RUN [RUN2]")
    players = []
    allow_tf32(torch.device(device))
    for path in paths:
        loaded = load_for_sampling(path, vae=vae, device=device, image_size=image_size)
        players.append(Player(path, loaded, image_size, vae))
    for what, of in (
        ("classes", lambda player: player.loaded.model.config.num_classes),
        ("names of the classes", lambda player: player.loaded.info.label_names or names_of(players)),
        ("latents of shape", lambda player: player.latent_shape),
    ):
        if of(players[0]) != of(players[-1]):
            first, last = (f"{player.path} has {what} {of(player)}" for player in (players[0], players[-1]))
            raise UserError(f"{first} and {last}: they can't be given the same class and noise")
    for player in players:
        play(player, 0, 0, 1, SamplerConfig(sampler="ode", method="euler", steps=2))
    return players


def names_of(players: Sequence[Player]) -> list[str]:
    """The names of the classes, as one of the players knows them; empty if none does."""
    return next((player.loaded.info.label_names for player in players if player.loaded.info.label_names), [])


def play(
    player: Player, label: int, seed: int, count: int, config: SamplerConfig, *, on_step: OnStep | None = None
) -> Played:
    """Sample the images number 0 … count − 1 of one class under a seed, as sample.py does, and time it.

    Args:
        on_step: see :data:`sit.sampling.config.OnStep`.

    Raises:
        UserError: a class that the network has not, or guidance without a null class.
    """
    loaded, seen = player.loaded, []

    def record(step: int, total: int | None, x: torch.Tensor, t: float | torch.Tensor) -> None:
        seen.append((t, x[0].clone()))  # not moved to the CPU yet, so that the device isn't waited for

    check_labels([label], loaded.model.config.num_classes)
    indices, labels = torch.arange(count), torch.full((count,), label)
    options = dict(seed=seed, config=config, image_size=player.image_size, batch_size=count)
    _ = loaded.vae  # read before the clock runs
    start = _now(loaded.device)
    made = list(sample_images(loaded, indices, labels, on_step=on_step, on_first=record, **options))
    seconds = (_now(loaded.device) - start) / count
    images = torch.cat([batch.images for batch in made]).numpy()

    noise = KeyedNoise(seed, [0], player.latent_shape, "cpu")()[0]
    times, states = [0.0], [noise]
    for t, x in seen:
        # what does not go on in time is a step that an adaptive solver rejected
        if float(t) > times[-1]:
            times.append(float(t))
            states.append(x.float().cpu())
    return Played(images, seconds, Trajectory(label, times, torch.stack(states)))


def _now(device: torch.device) -> float:
    """Seconds of a clock, read when the device has done all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def sheet(images: np.ndarray) -> Image.Image:
    """Images (n, H, W, 3) uint8 side by side, four a row; small ones are enlarged by a whole factor, not smoothed."""
    larger = enlarge(images, max(1, CELL // min(images.shape[1:3])))
    return Image.fromarray(tile(larger, min(len(images), COLUMNS), gap=GAP, fill=255))


def strip(player: Player, trajectory: Trajectory) -> Image.Image:
    """The way from noise to image: about eight states, decoded, with their times; none that is not finite."""
    finite = trajectory.states.isfinite().flatten(1).all(1)
    chosen = [number for number in trajectory.spread(STRIP) if finite[number]]
    images = decode(player.loaded.vae, trajectory.states[chosen].to(player.loaded.device)).cpu().numpy()
    height, width = images.shape[1:3]
    size = round(CELL * width / min(height, width)), round(CELL * height / min(height, width))
    how = Image.Resampling.NEAREST if min(height, width) < CELL else Image.Resampling.LANCZOS
    cells = np.stack([np.asarray(Image.fromarray(image).resize(size, how)) for image in images])
    return labeled_grid(cells, [f"t = {trajectory.times[number]:.2f}" for number in chosen], COLUMNS)


def kernel_view(player: Player, trajectory: Trajectory, block: int, t: float) -> tuple[str, Image.Image | None]:
    """The kernels of a block at the state nearest to time t: what there is to say, and the image if there is one."""
    model = player.loaded.model
    if block >= len(model.blocks):
        return f"This network has only the blocks 0 to {len(model.blocks) - 1}.", None
    number = trajectory.nearest(t)
    if not bool(torch.isfinite(trajectory.states[number]).all()):
        return f"The sampling left the finite numbers before t = {trajectory.times[number]:.2f}.", None
    found = kernels_at(model, trajectory.states[number], trajectory.times[number], trajectory.label, block)
    if isinstance(found, str):
        return found, None
    raw, inhibited = found
    fixed = "" if getattr(model.blocks[block].attn, "routing", True) else ", learned and the same for every image"
    shown = min(raw.shape[1], 64)
    title = f"Block {block} at t = {trajectory.times[number]:.2f}: channels 0 to {shown - 1} of {raw.shape[1]}{fixed}"
    return describe_kernels(raw, inhibited), draw_kernels(raw, inhibited, title)


def command(player: Player, label: int, seed: int, count: int, config: SamplerConfig) -> str:
    """The sample.py command that makes the same images."""
    named = word_for(label, player.loaded.info.label_names)
    words: list[Any] = ["python", "sample.py", "--ckpt", player.path, "--labels", named, "--num-samples", count]
    words += ["--seed", seed, "--sampler", config.sampler]
    words += [] if config.sampler == "meanflow" else ["--method", config.resolved_method]
    words += ["--steps", config.steps, "--cfg-scale", f"{config.cfg_scale:g}"]
    words += ["--image-size", *player.image_size] if player.image_size else []
    words += ["--vae", player.vae] if player.vae else []
    return shlex.join(map(str, words))
