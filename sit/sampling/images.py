"""From a checkpoint to images: labels, sizes, and samples decoded by the VAE."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sit.checkpoint.load import Loaded
from sit.latents.vae import NotFinite, decode, downsampling
from sit.model import SiT
from sit.sampling.config import OnStep, SamplerConfig
from sit.sampling.sampler import generate
from sit.utils.errors import UserError
from sit.utils.random import generator


def balanced_labels(indices: Sequence[int], classes: Sequence[int]) -> torch.Tensor:
    """Sample i gets class i modulo the number of classes: (len(indices),) int64."""
    return torch.tensor([classes[i % len(classes)] for i in indices], dtype=torch.int64)


def uniform_labels(indices: Sequence[int], classes: Sequence[int], seed: int) -> torch.Tensor:
    """Sample i gets a class drawn uniformly, keyed by (seed, i), as the published systems draw them."""
    draws = [int(torch.randint(len(classes), (), generator=generator(seed, "label", i))) for i in indices]
    return torch.tensor([classes[draw] for draw in draws], dtype=torch.int64)


def check_labels(labels: Sequence[int], classes: int) -> list[int]:
    """The labels as a list. Raise UserError unless each is one of the network's ``classes`` classes."""
    for label in labels:
        if not 0 <= label < classes:
            raise UserError(f"`labels={label}` is out of range: this network has the classes 0 to {classes - 1}")
    return list(labels)


def labels_named(words: Sequence[str], names: Sequence[str], classes: int) -> list[int]:
    """The labels that words of a command line mean: numbers, or names of classes, whatever their capitals.

    A numeral that is a class's name is that class, whatever its label: of the classes 3 and 7, 3 is the first.

    Args:
        words: commas separate as spaces do; a name of several words may be given as one word or as several.
        names: of the labels 0, 1, …; none if they are not known.
        classes: how many there are.

    Raises:
        UserError: a word is neither a label nor the name of one, or names several.
    """
    known: dict[str, list[int]] = {}
    for label, name in enumerate(names):
        known.setdefault(_plain(name), []).append(label)
    parts = [part for word in words for part in ([word] if _plain(word) in known else word.replace(",", " ").split())]
    longest = max((name.count(" ") + 1 for name in known), default=1)
    labels: list[int] = []
    while parts:
        for length in range(min(longest, len(parts)), 0, -1):
            name = _plain(" ".join(parts[:length]))
            if length == 1 and name not in known and name.lstrip("-").isdecimal():
                labels += check_labels([int(name)], classes)
            elif name in known:
                as_given = [label for label in known[name] if names[label] == " ".join(parts[:length])]
                meant = as_given or known[name]
                if len(meant) > 1:
                    several = ", ".join(map(str, meant))
                    raise UserError(f"`labels={name}` names several classes of this network: give one of {several}")
                labels += meant
            else:
                continue
            parts = parts[length:]
            break
        else:
            near = difflib.get_close_matches(_plain(parts[0]), known, n=1)
            hint = f"; did you mean {names[known[near[0]][0]]}?" if near else f": it has the labels 0 to {classes - 1}"
            raise UserError(f"`labels={parts[0]}` is no class of this network{hint}")
    return labels


def word_for(label: int, names: Sequence[str]) -> str:
    """What a command line calls a label so that :func:`labels_named` takes it for that one: its number, or its name."""
    number = str(label)
    return names[label] if number in names and names[label] != number else number


def _plain(name: str) -> str:
    """A class's name without capitals, underscores and more than one space."""
    return " ".join(name.casefold().replace("_", " ").split())


def latent_shape_for(loaded: Loaded, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
    """Shape (c, h, w) of the latents for images of ``image_size`` (height, width); None means as it was trained.

    Raises:
        UserError: the VAE or the patches, of the network or of its guide, don't divide that size; or a mixer of theirs
            has no use for so few tokens.
    """
    config = loaded.model.config
    height, width = config["input_size"]
    if image_size is not None:
        factor = downsampling(loaded.vae)
        side = factor * config["patch_size"]
        if any(length < side or length % side for length in image_size):
            told = f"`image_size={image_size[0]} {image_size[1]}`"
            raise UserError(f"{told}: both must be multiples of {side} for this network and VAE")
        height, width = (length // factor for length in image_size)
    if loaded.guide is not None:
        patch = loaded.guide.model.config["patch_size"]
        if height % patch or width % patch:
            raise UserError(
                f"`guide={loaded.guide.path}` has patches of {patch}, and the latents are of {height} x {width}, which "
                "that doesn't divide: give another guide, or another `image_size`"
            )
    if image_size is not None:
        for network in (loaded.model, loaded.guide_network):
            if network is not None:
                _check_mixers(network, (height, width), image_size)
    return config["in_channels"], height, width


def _check_mixers(network: SiT, latents: tuple[int, int], image_size: tuple[int, int]) -> None:
    """Raise UserError unless all mixers take the grid of ``latents`` (h, w), of images of ``image_size``."""
    patch, mixers = network.config["patch_size"], network.config["mixer"]
    for block in network.blocks:
        if check_grid := getattr(block.attn, "check_grid", None):
            try:
                check_grid((latents[0] // patch, latents[1] // patch))
            except ValueError as error:
                told = f"`image_size={image_size[0]} {image_size[1]}` is too small for {mixers}"
                why = str(error).partition(": use ")[0]  # what follows is for whoever makes a network
                raise UserError(f"{told}: {why}; take a larger one") from error


def check_finite(
    loaded: Loaded,
    latents: torch.Tensor,
    indices: torch.Tensor,
    labels: torch.Tensor,
    *,
    seed: int,
    config: SamplerConfig,
) -> None:
    """Raise NotFinite unless all samples are finite; the first that is not is sampled again, to name the step.

    Args:
        loaded: the checkpoint that they are of.
        latents: (b, C, h, w).
        indices, labels: (b,) int64, theirs.
        seed: theirs.
        config: the sampler.
    """
    finite = latents.isfinite().flatten(1).all(1).cpu()
    if finite.all():
        return
    lost = slice(first := int((~finite).nonzero()[0]), first + 1)
    steps: list[int] = []

    def watch(step: int, total: int | None, x: torch.Tensor, t: float | torch.Tensor) -> None:
        if not steps and not bool(x.isfinite().all()):
            steps.append(step)

    again = generate(
        loaded.model,
        loaded.transport,
        indices[lost],
        labels[lost],
        seed=seed,
        config=config,
        latent_shape=tuple(latents.shape[1:]),
        guide=loaded.guide_network,
        device=loaded.device,
        batch_size=1,
        on_step=watch,
    )
    for _ in again:
        pass
    when = f"from step {steps[0]} on" if steps else "at its end"
    raise NotFinite(
        f"sample {int(indices[first])} under seed {seed} is not finite {when}, as the network in {loaded.path} makes "
        "it: take another checkpoint, more steps or less guidance"
    )


@dataclass
class ImageBatch:
    """Some samples: ``indices`` (b,), ``labels`` (b,) int64 and ``images`` (b, H, W, 3) uint8, on the CPU."""

    indices: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor


def sample_images(
    loaded: Loaded,
    indices: torch.Tensor,
    labels: torch.Tensor,
    *,
    seed: int,
    config: SamplerConfig,
    image_size: tuple[int, int] | None = None,
    batch_size: int = 64,
    on_step: OnStep | None = None,
    on_first: OnStep | None = None,
) -> Iterator[ImageBatch]:
    """Sample the images numbered ``indices`` under ``seed``; an image depends on its number, label and seed alone.

    Args:
        loaded: the checkpoint.
        indices: (n,) numbers of the samples.
        labels: (n,) int64.
        config: the sampler and its guidance.
        image_size: (height, width); None as trained.
        batch_size: samples held at a time.
        on_step, on_first: passed on to :func:`sit.sampling.sampler.generate`.

    Raises:
        NotFinite: a sample is NaN or infinite.
        UserError: the VAE can't be had or is another network's, which is told before anything is sampled.
    """
    vae = loaded.vae
    place = {int(index): position for position, index in enumerate(indices.tolist())}
    for done, latents in generate(
        loaded.model,
        loaded.transport,
        indices,
        labels,
        seed=seed,
        config=config,
        latent_shape=latent_shape_for(loaded, image_size),
        guide=loaded.guide_network,
        device=loaded.device,
        batch_size=batch_size,
        on_step=on_step,
        on_first=on_first,
    ):
        chosen = labels[[place[int(index)] for index in done]]
        check_finite(loaded, latents, done, chosen, seed=seed, config=config)
        yield ImageBatch(done, chosen, decode(vae, latents).cpu())
