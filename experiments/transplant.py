"""What share of the steps from scratch a transplant needs: a trained attention network gets ATConv in its slots.

python experiments/transplant.py --data data --seeds 3 --out runs/transplant --json docs/transplant.json

Fashion-MNIST in pixels, 256 tokens, at the size of experiments/fashion-pixels-short.yaml. For every seed: a network
with attention, the donor; one with ATConv from scratch; and for several shares of their steps one with ATConv that
begins with the donor's weights, with and without distillation. Each has a learning-rate schedule of its own length, so
that no share is read off a schedule that was meant for more. The answer is the least share whose held-out loss is at
most that from scratch. What the donor took is not counted: it is what others have trained.

What is finished is not trained again. Runs that were made with other settings are refused.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate.state import AcceleratorState

from sit.training.config import TrainConfig
from sit.training.recipes import load_recipe, load_run_settings
from sit.training.run_folder import read_metrics
from sit.training.trainer import train
from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.record import write_record
from sit.utils.tables import markdown_table

ARMS = {"transplant": False, "transplant, distilled": True}
"""ways to begin with the donor's weights → whether they are distilled from it too"""


@dataclass(frozen=True)
class Arguments:
    """Train donors, networks from scratch and transplants, and tell the share of steps that these need."""

    data: str = "data"
    """torchvision's folder, with FashionMNIST/raw in it"""
    out: Path = Path("runs/transplant")
    """folder of the runs"""
    json: Path | None = None
    """file for all numbers"""
    seeds: int = 3
    """the seeds 0, 1, …"""
    steps: int = 240
    """of the donor and of the network from scratch"""
    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5)
    """of these steps that transplants get"""
    image_size: int = 32
    """side of the images, which are cut into patches of 2×2"""
    batch_size: int = 32
    """images a step"""
    heldout_images: int = 256
    """of the test set, on which the loss is measured"""
    mixer: str = "atconv"
    """what takes attention's place; it gets the positional table that the donor was trained with"""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"`seeds` must be at least 1, not {self.seeds}")
        if not self.shares or not all(0 < share <= 1 and round(share * self.steps) for share in self.shares):
            raise UserError(
                f"`shares`: each must be above 0 and at most 1, and a step at least of `steps={self.steps}`"
            )

    def config(self, seed: int, **changes: Any) -> TrainConfig:
        """The settings that all runs of a seed share, and these."""
        shared = dict(
            data=f"fashion-mnist:{self.data}",
            heldout=f"fashion-mnist-test:{self.data}",
            heldout_images=self.heldout_images,
            image_size=self.image_size,
            steps=self.steps,
            batch_size=self.batch_size,
            mixed_precision="no",
            preview_every=0,
            checkpoint_every=max(1, self.steps // 4),
            keep_last=1,
            trackers=(),
            seed=seed,
        )
        return dataclasses.replace(load_recipe("fashion-mnist-pixels"), **shared | changes)


def heldout_loss(config: TrainConfig, folder: Path) -> float:
    """The held-out loss of a run after its last step; it is trained if it is not there, or goes on.

    Raises:
        UserError: the folder has a run of other settings.
    """
    if (folder / "config.yaml").is_file():
        begun = dataclasses.replace(load_run_settings(folder), output_dir=None, resume=None)
        for name, then in dataclasses.asdict(begun).items():
            if (now := getattr(config, name)) != then:
                raise UserError(f"{folder} was made with {name} {then}, not {now}; choose another `out`")
    if not (found := _measured(folder, config.steps)):
        AcceleratorState._reset_state(reset_partial_state=True)  # each run of this process begins without the last's
        try:
            train(dataclasses.replace(config, output_dir=str(folder), resume="auto"))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        found = _measured(folder, config.steps)
    return found[-1]


def _measured(folder: Path, step: int) -> list[float]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [row["heldout_loss"] for row in rows if row["step"] == step and "heldout_loss" in row]


def of_seed(arguments: Arguments, seed: int) -> dict[str, Any]:
    """The held-out losses of one seed: the donor's, from scratch, and of each arm by share."""
    out = arguments.out / f"seed{seed}"
    slots = dict(mixer=arguments.mixer, positional_embedding="on")
    donor = out / "donor"
    found: dict[str, Any] = {
        "donor": heldout_loss(arguments.config(seed, mixer="attention"), donor),
        "scratch": heldout_loss(arguments.config(seed, **slots), out / "scratch"),
    }
    for arm, is_distilled in ARMS.items():
        found[arm] = {}
        for share in arguments.shares:
            steps = round(share * arguments.steps)
            teacher = dict(distill_from=str(donor), distill_steps=max(1, steps // 2)) if is_distilled else {}
            config = arguments.config(seed, init_from=str(donor), steps=steps, **slots, **teacher)
            folder = out / f"{arm.replace(', ', '-')}-{share:g}"
            found[arm][f"{share:g}"] = heldout_loss(config, folder)
    return found


def share_needed(losses: dict[str, float], target: float) -> float | None:
    """The least share whose loss is at most ``target``; None if none is."""
    return min((float(share) for share, loss in losses.items() if loss <= target), default=None)


def run(arguments: Arguments) -> None:
    """Train what is missing, print the tables, and keep all numbers as JSON."""
    found = {seed: of_seed(arguments, seed) for seed in range(arguments.seeds)}
    needed = {
        arm: {seed: share_needed(losses[arm], losses["scratch"]) for seed, losses in found.items()} for arm in ARMS
    }
    shares = [f"{share:g}" for share in arguments.shares]
    rows = [["donor (attention)", "1", *(f"{losses['donor']:.4f}" for losses in found.values())]]
    rows += [[f"{arguments.mixer} from scratch", "1", *(f"{losses['scratch']:.4f}" for losses in found.values())]]
    rows += [
        [arm, share, *(f"{losses[arm][share]:.4f}" for losses in found.values())] for arm in ARMS for share in shares
    ]
    print("Held-out loss after training:\n")
    print(markdown_table(["network", "share of the steps", *(f"seed {seed}" for seed in found)], rows, align="lr"))
    print("\nThe least share of the steps with at most the loss from scratch:\n")
    said = [[arm, *("none" if share is None else f"{share:g}" for share in needed[arm].values())] for arm in ARMS]
    print(markdown_table(["network", *(f"seed {seed}" for seed in found)], said))
    if arguments.json is not None:
        settings = dataclasses.asdict(arguments) | {"out": str(arguments.out), "json": str(arguments.json)}
        write_record(arguments.json, torch.device("cpu"), {"settings": settings, "losses": found, "needed": needed})


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="experiments/transplant.py")
    run(arguments)


if __name__ == "__main__":
    main()
