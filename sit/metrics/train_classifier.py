"""Train a small classifier: its features stand in for Inception's, or it predicts samples' classes.

    python -m sit.train_classifier --data fashion-mnist:FOLDER --heldout fashion-mnist-test:FOLDER --image-size 32 \
        --out classifiers/fashion-mnist

``eval_fid.py --features classifier:FOLDER`` measures distances on its features; ``--classifier FOLDER`` lets it predict
the samples' classes. Take two of different architectures, so that these predictions do not rest on those features.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from sit.data.dataset import ImageData
from sit.data.factory import open_images
from sit.metrics.arguments import ClassifierArguments, ClassifierSettings
from sit.metrics.classifier import Classifier, ClassifierConfig, save_classifier
from sit.utils.device import pick_device
from sit.utils.errors import UserError
from sit.utils.files import atomic_folder, refuse_used
from sit.utils.random import generator

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("resnet10t", {"channels": [24, 48, 96, 128], "stem_width": 16, "replace_stem_pool": True}),
    "convnext": ("convnext_atto", {"depths": [1, 1, 3, 1], "dims": [24, 48, 96, 192], "patch_size": 2}),
}
"""timm's names, with arguments that suit images of about 32 pixels"""


def load_pixels(data: ImageData) -> tuple[torch.Tensor, torch.Tensor]:
    """All images (n, 3, H, W) uint8 and labels (n,) int64."""
    return torch.stack([data[index][0] for index in range(len(data))]), torch.from_numpy(data.labels)


def augment(images: torch.Tensor, settings: ClassifierSettings, source: torch.Generator) -> torch.Tensor:
    """Images (B, 3, H, W), flipped and shifted at random, the border repeated."""
    count, side = len(images), images.shape[-1]
    if settings.shift:
        reach = settings.shift
        padded = F.pad(images.float(), (reach,) * 4, mode="replicate").to(images.dtype)
        offset = torch.randint(2 * reach + 1, (2, count, 1), generator=source)
        rows, columns = offset + torch.arange(side)
        images = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
    if settings.flip:
        flipped = torch.rand(count, 1, 1, 1, generator=source) < 0.5
        images = torch.where(flipped, images.flip(-1), images)
    return images


def fit(classifier: Classifier, images: torch.Tensor, labels: torch.Tensor, settings: ClassifierSettings) -> None:
    """Train ``classifier``, on its device, on images (n, 3, H, W) uint8 and labels (n,)."""
    device = next(classifier.parameters()).device
    source = generator(settings.seed, "classifier")
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=5e-2)
    total = settings.epochs * (len(images) // settings.batch_size)
    if total == 0:
        raise UserError(f"`batch_size={settings.batch_size}` is more than the {len(images)} images there are")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=total)
    classifier.train()
    bar = tqdm(total=total, desc=settings.architecture, dynamic_ncols=True)
    for _ in range(settings.epochs):
        for chosen in torch.randperm(len(images), generator=source).split(settings.batch_size):
            if len(chosen) < settings.batch_size:
                continue
            _, logits = classifier(augment(images[chosen], settings, source).to(device))
            loss = F.cross_entropy(logits, labels[chosen].to(device), label_smoothing=0.05)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if bar.n % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
    bar.close()
    classifier.eval()


@torch.no_grad()
def accuracy(classifier: Classifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images (n, 3, H, W) uint8 whose labels (n,) it predicts."""
    device = next(classifier.parameters()).device
    predicted = torch.cat([classifier(batch.to(device))[1].argmax(1).cpu() for batch in images.split(256)])
    return (predicted == labels).double().mean().item()


def train(arguments: ClassifierArguments) -> None:
    """Train and measure the classifier, and write its folder.

    Raises:
        UserError: the folder is in use or can't be made, the two data sets can't be had or differ in their classes, or
            the classifier diverged.
    """
    refuse_used(arguments.out, "out", but=None)
    with atomic_folder(arguments.out) as folder:  # before the training, which a folder that can't be made would lose
        score = _train(arguments, folder)
    print(f"held-out accuracy {score:.4f}; written to {arguments.out}")


def _train(arguments: ClassifierArguments, folder: Path) -> float:
    """What :func:`train` does, into a folder that is there; the accuracy on held-out images."""
    data = open_images(arguments.data, arguments.image_size)
    heldout = open_images(arguments.heldout, data.image_size)
    if heldout.classes != data.classes:
        raise UserError(f"`heldout={arguments.heldout}` has other classes than `data={arguments.data}`")
    device = pick_device(arguments.device)
    torch.manual_seed(arguments.seed)
    name, options = ARCHITECTURES[arguments.architecture]
    decisive = ClassifierSettings.__dataclass_fields__
    settings = {field: value for field, value in asdict(arguments).items() if field in decisive}
    config = ClassifierConfig(
        name, options, data.image_size, data.classes, arguments.data, arguments.heldout, settings=settings
    )
    classifier = Classifier(config).to(device)
    fit(classifier, *load_pixels(data), arguments)
    if not all(tensor.isfinite().all() for tensor in classifier.state_dict().values()):
        raise UserError(f"the classifier diverged at `learning_rate={arguments.learning_rate:g}`: take a lower one")
    score = accuracy(classifier, *load_pixels(heldout))
    classifier.config = replace(config, accuracy=score)
    parameters = sum(p.numel() for p in classifier.parameters())
    save_classifier(classifier.cpu(), folder)
    (folder / "README.md").write_text(
        f"# A classifier of {arguments.data}\n\n"
        f"timm's `{name}`, made small: {parameters:,} parameters, {data.image_size}×{data.image_size} RGB. "
        f"Trained by\n\n    python -m sit.train_classifier {' '.join(sys.argv[1:])}\n\n"
        f"Accuracy on the {len(heldout):,} images of {arguments.heldout}: {score:.2%}.\n"
    )
    return score
