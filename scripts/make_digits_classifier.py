"""Train the classifier whose features distances of digits are measured on, and write it with its README.

    python scripts/make_digits_classifier.py

Trained on the 1,437 digits of ``digits:train``, turned, scaled and shifted a little, and measured on the other 360.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from replacing import refuse_others
from safetensors.torch import save_file
from tqdm import trange

from sit.data.digits import digits_arrays, digits_split
from sit.metrics.digits import WEIGHTS, DigitsClassifier
from sit.utils.errors import entry_point
from sit.utils.files import replaced_folder
from sit.utils.random import generator

TITLE = "# The digits' classifier"


@dataclass
class Config:
    """Everything that decides the weights."""

    output_dir: Path = WEIGHTS.parent
    """a new folder, or a digits' classifier made before, which the new one replaces"""
    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 3e-3
    seed: int = 0


def warp(images: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Each image (B, 1, 32, 32) turned by up to 0.2 rad, scaled by up to 10 % and shifted by up to 2 pixels."""
    angle, scale, *shift = ((torch.rand(4, len(images), generator=source) - 0.5) * 2).unbind()
    angle, scale = 0.2 * angle, 1 + 0.1 * scale
    rows = [
        torch.stack([scale * angle.cos(), -scale * angle.sin(), shift[0] / 8], 1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), shift[1] / 8], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def main(config: Config) -> None:
    refuse_others(config.output_dir, TITLE, ("README.md", WEIGHTS.name))
    images, labels = digits_arrays()
    images = torch.from_numpy(images)[:, None].float() / 127.5 - 1
    labels = torch.from_numpy(labels)
    fitted, held_out = (torch.from_numpy(part) for part in digits_split())

    torch.manual_seed(config.seed)
    source = generator(config.seed, "classifier")
    network = DigitsClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps)
    for _ in trange(config.steps, desc="classifier"):
        chosen = fitted[torch.randint(len(fitted), (config.batch_size,), generator=source)]
        _, logits = network(warp(images[chosen], source))
        F.cross_entropy(logits, labels[chosen], label_smoothing=0.05).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    with torch.no_grad():
        accuracy = (network(images[held_out])[1].argmax(1) == labels[held_out]).float().mean().item()
    parameters = sum(p.numel() for p in network.parameters())
    with replaced_folder(config.output_dir) as place:
        save_file(network.state_dict(), place / WEIGHTS.name)
        (place / WEIGHTS.name).chmod(0o644)
        (place / "README.md").write_text(
            f"{TITLE}\n\n"
            f"`sit.metrics.digits.DigitsClassifier`, {parameters:,} parameters. Its 64 penultimate features are what\n"
            "the digits' Fréchet distance is measured on. Trained on the 1,437 digits of `digits:train` only, by\n\n"
            "    python scripts/make_digits_classifier.py\n\n"
            f"Accuracy on the 360 held-out digits: {accuracy:.1%}.\n"
        )
    print(f"held-out accuracy {accuracy:.4f}; written to {config.output_dir}")


if __name__ == "__main__":
    entry_point(lambda: main(tyro.cli(Config)))()
