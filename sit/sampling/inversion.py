"""From images back to noise along the ODE, and how likely the network finds them: sample.py's ``reverse``.

What comes out is one ``inversion.npz`` and, of the likelihood, its mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from sit.checkpoint.load import Loaded
from sit.data.dataset import ImageData
from sit.data.factory import open_images
from sit.latents.vae import downsampling, encode_images, sample_posterior
from sit.sampling.arguments import Arguments
from sit.sampling.guidance import GuidedModel
from sit.sampling.images import latent_shape_for
from sit.sampling.likelihood import bits_per_dimension, log_likelihood, random_signs
from sit.sampling.sampler import sample
from sit.utils.errors import UserError
from sit.utils.files import atomic_folder
from sit.utils.lock import locked
from sit.utils.random import generator

FILE = "inversion.npz"


def invert(arguments: Arguments, loaded: Loaded, folder: Path, state: PartialState) -> Path | None:
    """Write what the images of ``arguments.data`` are to the network into a new folder, all processes together.

    ``folder/inversion.npz`` has ``image`` (n,) int64 numbers in the data, ``label`` (n,) int64 and ``noise``
    (n, c, h, w) float32; with ``arguments.likelihood`` also ``nats`` and ``bits_per_dimension`` (n,) float64, both of
    the latents.

    Returns:
        The file, on the main process; None on the others.

    Raises:
        UserError: the data can't be had, or their size or classes are not the network's; or the folder exists, which is
            told before anything is computed.
    """
    assert arguments.data is not None
    _, height, width = latent_shape_for(loaded, None)
    side = height * downsampling(loaded.vae)
    if height != width:
        raise UserError(f"`data={arguments.data}` is cropped to squares, and this network's images are none")
    data = open_images(arguments.data, side)
    labels = labels_for(data, loaded.info.label_names, loaded.model.config["num_classes"])
    count = min(arguments.num_samples or len(data), len(data))
    chosen = np.linspace(0, len(data) - 1, count).round().astype(np.int64)  # evenly: data may be sorted by class
    mine = chosen[state.process_index :: state.num_processes]
    # the steps of an adaptive solver depend on the whole batch: an image alone has its own, as samples have theirs
    size = 1 if arguments.sampler.adaptive and loaded.device.type == "cpu" else arguments.batch_size
    batches = [mine[start : start + size] for start in range(0, len(mine), size)]
    rows: list[dict[str, np.ndarray]] = []
    with contextlib.ExitStack() as stack:
        if state.is_main_process:
            stack.enter_context(locked(folder, "out", beside=True))
            place = stack.enter_context(atomic_folder(folder))
        for numbers in tqdm(batches, desc="invert", dynamic_ncols=True, disable=not state.is_main_process):
            rows.append(inverted(arguments, loaded, data, numbers, labels[numbers]))
        rows = gather_object(rows)
        if not state.is_main_process:
            return None
        merged = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        order = merged["image"].argsort()
        columns: dict[str, Any] = {name: values[order] for name, values in merged.items()}
        np.savez(place / FILE, **columns)
    if arguments.likelihood:
        bits = merged["bits_per_dimension"]
        error = f" ± {bits.std(ddof=1) / len(bits) ** 0.5:.4f}" if len(bits) > 1 else ""
        print(f"{bits.mean():.4f}{error} bits per dimension of the latents, {len(bits)} images")
    return folder / FILE


def inverted(
    arguments: Arguments, loaded: Loaded, data: ImageData, numbers: np.ndarray, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """The rows of the images ``numbers`` (b,) with their labels (b,), as :func:`invert` names them.

    An image's draws (of the VAE's posterior, and of the likelihood's probes) are keyed by the seed and its number.
    """
    pixels = torch.stack([data[int(number)][0] for number in numbers])
    vae: Any = loaded.vae
    mean, std = encode_images(vae, pixels)
    drawn = [torch.randn(mean.shape[1:], generator=generator(arguments.seed, "posterior", int(n))) for n in numbers]
    latents = sample_posterior(mean, std, torch.stack(drawn).to(mean.device), vae.config).to(loaded.device)
    wanted = torch.from_numpy(labels).to(loaded.device)
    found: dict[str, np.ndarray] = {"image": numbers, "label": labels}
    if arguments.likelihood:
        seeds = [generator(arguments.seed, "probes", int(number)) for number in numbers]
        probes = torch.stack([random_signs(arguments.probes, x, seed) for x, seed in zip(latents, seeds, strict=True)])
        guided = GuidedModel(loaded.model, wanted, arguments.sampler, loaded.guide_network)
        nats, noise = log_likelihood(guided, loaded.transport, latents, arguments.sampler, probes.transpose(0, 1))
        found["nats"] = nats.double().cpu().numpy()
        found["bits_per_dimension"] = bits_per_dimension(nats.double(), latents[0].numel()).cpu().numpy()
    else:
        options: dict[str, Any] = dict(reverse=True, guide=loaded.guide_network)
        noise = sample(loaded.model, loaded.transport, latents, wanted, arguments.sampler, **options)
    return found | {"noise": noise.float().cpu().numpy()}


def labels_for(data: ImageData, names: Sequence[str], classes: int) -> np.ndarray:
    """The network's labels (n,) int64 of a data set's images: by the classes' names, or as they are without names.

    Raises:
        UserError: a class of the data is none of the network's.
    """
    labels = np.asarray(data.labels, dtype=np.int64)
    if names:
        unknown = [name for name in data.classes if name not in names]
        if unknown:
            raise UserError(f"`data={data.name}` has the class {unknown[0]!r}, which the network was not trained on")
        return np.array([list(names).index(name) for name in data.classes], dtype=np.int64)[labels]
    if len(data.classes) > classes:
        raise UserError(f"`data={data.name}` has {len(data.classes)} classes, and the network {classes}")
    return labels
