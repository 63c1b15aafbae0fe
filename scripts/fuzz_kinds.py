"""The files that ``fuzz.py`` damages: how a small one of each kind is made, and what is read of it.

A reader answers with everything that the file says, so that another answer shows.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass
class Kind:
    """Files of one kind: those that are damaged, what they lie in, and the reader, which answers with what it read."""

    place: Path
    files: list[Path]
    read: Callable[[Path], Any]


def digest(*parts: Any) -> str:
    """A hash of tensors, arrays and plain values, to compare what was read."""
    sums = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, torch.nn.Module):
            part = part.state_dict()
        if isinstance(part, dict):
            part = sorted(part.items())
        if isinstance(part, (list, tuple)):
            part = digest(*part)
        if isinstance(part, torch.Tensor):
            part = part.detach().float().numpy()
        sums.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return sums.hexdigest()


def tiny_network() -> Any:
    from sit.model import SiT

    network = SiT(8, hidden_size=16, depth=1, num_heads=2, num_classes=3, mixer="atconv", seed=0)
    for number, parameter in enumerate(network.parameters()):
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    return network


def tiny_vae(folder: Path) -> Path:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(latent_channels=4, block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, sample_size=8)  # fmt: skip
    vae.save_pretrained(folder)
    return folder


def images(count: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def image_folder(place: Path) -> Path:
    from PIL import Image

    for number, pixels in enumerate(images()):
        path = place / "ab"[number % 2] / f"{number}.{('png', 'jpg')[number // 2 % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return place


def make_checkpoint(place: Path) -> Kind:
    from sit.checkpoint.info import CheckpointInfo
    from sit.checkpoint.load import load_for_sampling
    from sit.checkpoint.save import save_checkpoint
    from sit.transport.transport import Transport

    info = CheckpointInfo(7, 70, (16, 16), 3, ["a", "b", "c"], "digits", "atconv")
    folder = save_checkpoint(
        place / "step-0000007",
        model=tiny_network(),
        transport=Transport("gvp"),
        vae_source=tiny_vae(place / "vae"),
        info=info,
        training_state=lambda inside: torch.save({"step": 7}, inside / "optimizer.pt"),
    )

    def read(folder: Path) -> Any:
        loaded = load_for_sampling(folder / "step-0000007")
        return loaded.model, dict(loaded.model.config), dict(loaded.transport.config), loaded.info, loaded.vae

    return Kind(place, [path for path in folder.rglob("*") if path.is_file()], read)


def make_network_folder(place: Path) -> Kind:
    """A network alone, as diffusers writes it: a foreign format without checksums."""
    from sit.checkpoint.load import load_for_sampling

    tiny_network().save_pretrained(place / "net")

    def read(place: Path) -> Any:
        loaded = load_for_sampling(place / "net")
        return loaded.model, dict(loaded.model.config)

    return Kind(place, list((place / "net").iterdir()), read)


def make_run(place: Path) -> Kind:
    from sit.training.config import TrainConfig
    from sit.training.recipes import load_recipe
    from sit.training.run_folder import read_metrics

    (place / "config.yaml").write_text(TrainConfig().to_yaml())
    rows = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 20)]
    (place / "metrics.jsonl").write_text("\n".join(rows) + "\n")

    def read(place: Path) -> Any:
        rows = read_metrics(place / "metrics.jsonl")
        return load_recipe(str(place / "config.yaml")), [row["step"] for row in rows]

    return Kind(place, list(place.iterdir()), read)


def make_recipe(place: Path) -> Kind:
    from sit.training.recipes import RECIPES, load_recipe

    shutil.copy(RECIPES / "digits.yaml", place / "mine.yaml")
    return Kind(place, [place / "mine.yaml"], lambda place: load_recipe(str(place / "mine.yaml")))


def make_cache(place: Path) -> Kind:
    from sit.latents.cache import CachedLatents
    from sit.latents.encode import Encode, encode

    tiny_vae(place / "vae")
    image_folder(place / "images")
    out = place / "cache"
    encode(Encode(out, str(place / "images"), str(place / "vae"), 8, workers=0, batch_size=2))

    def read(place: Path) -> Any:
        cache = CachedLatents(place / "cache", flip=True)
        cache.check_entries()  # as all who use a cache of a few gigabytes do
        everything = np.arange(len(cache))
        return cache.manifest, cache.labels, cache.moments(everything, everything % 2 == 1)

    return Kind(place, [path for path in out.iterdir() if path.is_file()], read)


def _make_published(place: Path, name: str) -> Kind:
    import argparse

    from safetensors.torch import save_file

    from sit.checkpoint.hints import Hints
    from sit.checkpoint.published import read_published

    state, arguments = tiny_network().state_dict(), argparse.Namespace(model="SiT-S/2", image_size=64, num_classes=3)
    if name.endswith(".pt"):
        torch.save({"model": state, "ema": state, "args": arguments, "steps": 5}, place / name)
    else:
        save_file(state, place / name)

    def read(place: Path) -> Any:
        found = read_published(place / name, Hints(num_heads=2, image_size=64))
        return found.build(), found.config, found.info, found.transport_config

    return Kind(place, [place / name], read)


def make_pt(place: Path) -> Kind:
    return _make_published(place, "published.pt")


def make_safetensors(place: Path) -> Kind:
    return _make_published(place, "published.safetensors")


def make_vae(place: Path) -> Kind:
    from sit.latents.vae import empty_vae, load_vae, scaling

    def read(place: Path) -> Any:
        vae = load_vae(place / "vae")
        return vae, scaling(vae.config), empty_vae(place / "vae").config["block_out_channels"]

    return Kind(place, list(tiny_vae(place / "vae").iterdir()), read)


def make_classifier(place: Path) -> Kind:
    from sit.metrics.classifier import Classifier, ClassifierConfig, load_classifier, save_classifier

    save_classifier(Classifier(ClassifierConfig("test_resnet", {}, 32, ["a", "b", "c"])), place)

    def read(place: Path) -> Any:
        classifier = load_classifier(str(place))
        return classifier, classifier.config

    return Kind(place, list(place.iterdir()), read)


def _pixels(spec: Path) -> Any:
    from sit.data.factory import open_images

    data = open_images(str(spec), 8)
    return data.classes, [(item.numpy(), label) for item, label in (data[index] for index in range(len(data)))]


def make_images(place: Path) -> Kind:
    folder = image_folder(place / "images")
    return Kind(place, [path for path in folder.rglob("*.*")], lambda place: _pixels(place / "images"))


def make_tar(place: Path) -> Kind:
    import tarfile

    folder = image_folder(place / "images")
    with tarfile.open(place / "set.tar", "w") as archive:
        archive.add(folder, arcname=".")
    shutil.rmtree(folder)
    return Kind(place, [place / "set.tar"], lambda place: _pixels(place / "set.tar"))


def _opened(path: Path) -> Any:
    from sit.metrics.image_sets import Images
    from sit.metrics.statistics_files import open_reference

    opened = open_reference(str(path))
    if isinstance(opened, Images):
        return opened.batch(np.arange(len(opened))).numpy(), opened.labels
    (part,) = opened.parts
    return part.features.mu, part.features.sigma, opened.images.array


def make_samples(place: Path) -> Kind:
    np.savez(place / "samples.npz", arr_0=images(), arr_1=np.arange(6))
    return Kind(place, [place / "samples.npz"], lambda place: _opened(place / "samples.npz"))


def make_packed_samples(place: Path) -> Kind:
    np.savez_compressed(place / "samples.npz", arr_0=images(), arr_1=np.arange(6))
    return Kind(place, [place / "samples.npz"], lambda place: _opened(place / "samples.npz"))


def make_statistics(place: Path) -> Kind:
    np.savez(place / "stats.npz", mu=np.arange(4.0), sigma=np.eye(4), arr_0=images())
    return Kind(place, [place / "stats.npz"], lambda place: _opened(place / "stats.npz"))


def make_work(place: Path) -> Kind:
    """The work folder of an evaluation, from which it goes on: what is damaged is made anew."""
    from accelerate.state import AcceleratorState

    from sit.metrics.extraction import Wanted, extract
    from sit.metrics.image_sets import ArrayImages

    np.savez(place / "samples.npz", arr_0=images(), arr_1=np.arange(6))

    class Mean:
        name, about = "mean", {"features": "mean"}

        def __call__(self, pixels: torch.Tensor) -> dict[str, np.ndarray]:
            return {"features": pixels.float().mean((2, 3)).numpy()}

    def read(place: Path) -> Any:
        samples = ArrayImages(place / "samples.npz", images(), np.arange(6))
        (place / "work").mkdir(exist_ok=True)
        found = extract(samples, [Wanted(Mean())], place / "work", device=torch.device("cpu"), batch_size=3)["mean"]
        return found.rows()["features"], found.sums["features"].sums

    AcceleratorState._reset_state(reset_partial_state=True)
    read(place)
    return Kind(place, [path for path in (place / "work").rglob("*") if path.is_file()], read)


KINDS: dict[str, Callable[[Path], Kind]] = {
    "checkpoint": make_checkpoint,
    "network folder": make_network_folder,
    "run": make_run,
    "recipe": make_recipe,
    "latent cache": make_cache,
    "published .pt": make_pt,
    "published .safetensors": make_safetensors,
    "VAE": make_vae,
    "classifier": make_classifier,
    "image folder": make_images,
    "tar": make_tar,
    "samples npz": make_samples,
    "packed npz": make_packed_samples,
    "statistics npz": make_statistics,
    "work folder": make_work,
}
