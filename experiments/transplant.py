"""What share of the steps from scratch a transplant needs: a trained attention network gets ATConv in its slots.

python experiments/transplant.py --data data --seeds 3 --out runs/transplant --json docs/transplant.json

Fashion-MNIST in pixels, 256 tokens, at the size of experiments/fashion-pixels-short.yaml. For every seed: a network
with attention, the donor; one with ATConv from scratch; and for several shares of their steps one with ATConv that
begins with the donor's weights, with and without distillation. Each has a learning-rate schedule of its own length,
warm-up included, so that no share is read off a schedule that was meant for more. The answer is the least share whose
held-out loss, and whose FID, is at most that from scratch. What the donor took is not counted: it is what others have
trained.

What is finished is not trained again, nor sampled. Runs that were made with other settings are refused. The classifier
is that of docs/results.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from training_runs import ensure_trained

from sit.checkpoint.load import load_for_sampling
from sit.metrics.estimate import half_width
from sit.metrics.evaluate import evaluate
from sit.metrics.features import Extractor, get_extractor
from sit.metrics.generated import GeneratedImages
from sit.metrics.image_sets import Images
from sit.metrics.paired import over_seeds
from sit.metrics.statistics_files import Statistics, open_reference
from sit.mixers.registry import parse_mixers
from sit.sampling.config import SamplerConfig
from sit.training.config import TrainConfig
from sit.training.recipes import load_recipe
from sit.utils.choices import Precision
from sit.utils.cli import one_line_errors
from sit.utils.errors import UserError, entry_point
from sit.utils.precision import for_sampling
from sit.utils.random import key
from sit.utils.record import write_record
from sit.utils.tables import markdown_table

SAMPLER = SamplerConfig(sampler="ode", method="heun2", steps=8)
SAMPLING_PRECISION: Precision = "bfloat16"
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
    """of the network from scratch"""
    donor_steps: int = 480
    """of the donor"""
    shares: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)
    """of these steps that transplants get"""
    image_size: int = 32
    """side of the images, which are cut into patches of 2×2"""
    batch_size: int = 32
    """images a step"""
    heldout_images: int = 256
    """of the test set, on which the loss is measured"""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """of the networks, when they are trained"""
    num_samples: int = 1000
    """of which FID is measured, Heun's method in 8 steps, against the test set; 0 measures none"""
    features: str = "classifier:classifiers/fashion-mnist-convnext"
    """what FID is on"""
    mixer: str = "atconv"
    """what takes attention's place; it gets the positional table that the donor was trained with"""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"`seeds` must be at least 1, not {self.seeds}")
        if self.donor_steps < 1:
            raise UserError(f"`donor_steps` must be at least 1, not {self.donor_steps}")
        if self.num_samples < 0 or self.num_samples == 1:
            raise UserError(f"`num_samples` must be 0, for no FID, or at least 2, not {self.num_samples}")
        if not self.shares or not all(0 < share <= 1 and round(share * self.steps) for share in self.shares):
            raise UserError(
                f"`shares`: each must be above 0 and at most 1, and a step at least of `steps={self.steps}`"
            )

    def config(self, seed: int, steps: int, **changes: Any) -> TrainConfig:
        """The settings of a run of so many steps that all runs of a seed share, and these."""
        recipe = load_recipe("fashion-mnist-pixels")
        shared = dict(
            data=f"fashion-mnist:{self.data}",
            heldout=f"fashion-mnist-test:{self.data}",
            heldout_images=self.heldout_images,
            image_size=self.image_size,
            steps=steps,
            warmup_steps=max(1, round(recipe.warmup_steps * steps / recipe.steps)),
            batch_size=self.batch_size,
            mixed_precision=self.mixed_precision,
            preview_every=0,
            checkpoint_every=max(1, steps // 4),
            keep_last=1,
            trackers=(),
            seed=seed,
        )
        return dataclasses.replace(recipe, **shared | changes)


@dataclass(frozen=True)
class Measures:
    """What is measured of a run after its last step; FID is None where none is asked for."""

    heldout_loss: float
    fid: float | None


def measured(arguments: Arguments, config: TrainConfig, folder: Path) -> Measures:
    """The measures of a run; it is trained if it is not there, or goes on, and sampled if it was not.

    Raises:
        UserError: the folder has a run of other settings.
    """
    loss = [row["heldout_loss"] for row in ensure_trained(config, folder) if "heldout_loss" in row][-1]
    return Measures(loss, fid(arguments, config.seed, folder) if arguments.num_samples else None)


def fid(arguments: Arguments, seed: int, folder: Path) -> float:
    """FID of a run's samples, whose noise and labels all runs of the seed share; kept in the run's folder."""
    device = torch.device("cpu")
    loaded = load_for_sampling(folder, device=device, dtype=for_sampling(SAMPLING_PRECISION, device))
    samples = GeneratedImages(loaded, arguments.num_samples, seed=key(seed, "transplant") % 2**31, config=SAMPLER)
    report = evaluate(samples, *yardstick(arguments, device), device=device, work_dir=str(folder / "evaluation"))
    if report is None:
        raise RuntimeError("this is not the main process")
    return next(number.value for number in report.numbers if number.name.startswith("FID"))


def yardstick(arguments: Arguments, device: torch.device) -> tuple[Images | Statistics, Extractor]:
    """What FID is measured against, and on."""
    reference = open_reference(f"fashion-mnist-test:{arguments.data}", arguments.image_size, device=device)
    return reference, get_extractor(arguments.features, device)


def of_seed(arguments: Arguments, seed: int) -> dict[str, Any]:
    """The measures of one seed: the donor's, from scratch, and of each arm by share."""
    out = arguments.out / f"seed{seed}"
    slots = dict(mixer=arguments.mixer, positional_embedding="on")
    donor = out / "donor"
    found: dict[str, Any] = {
        "donor": measured(arguments, arguments.config(seed, arguments.donor_steps, mixer="attention"), donor),
        "scratch": measured(arguments, arguments.config(seed, arguments.steps, **slots), out / "scratch"),
    }
    for arm, is_distilled in ARMS.items():
        found[arm] = {}
        for share in arguments.shares:
            steps = round(share * arguments.steps)
            teacher = dict(distill_from=str(donor), distill_steps=max(1, steps // 2)) if is_distilled else {}
            config = arguments.config(seed, steps, init_from=str(donor), **slots, **teacher)
            folder = out / f"{arm.replace(', ', '-')}-{share:g}"
            found[arm][f"{share:g}"] = measured(arguments, config, folder)
    return found


def share_needed(values: Mapping[str, float], target: float) -> float | None:
    """The least share whose value is at most ``target``; None if none is."""
    return min((float(share) for share, value in values.items() if value <= target), default=None)


def table(found: Mapping[int, Mapping[str, Any]], arguments: Arguments, measure: str) -> str:
    """A measure of each network by seed, their mean, and the difference to scratch, paired by seed.

    ± is half the width of the 95 % interval over the seeds.
    """
    shares = [f"{share:g}" for share in arguments.shares]
    scratch = {seed: getattr(of["scratch"], measure) for seed, of in found.items()}
    first = next(iter(found.values()))
    lines: list[tuple[str, str, list[Measures]]] = [
        ("donor (attention)", f"{arguments.donor_steps / arguments.steps:g}", [of["donor"] for of in found.values()]),
        (f"{arguments.mixer} from scratch", "1", [of["scratch"] for of in found.values()]),
        *((arm, share, [of[arm][share] for of in found.values()]) for arm in ARMS for share in shares),
    ]
    rows = []
    for network, share, of_seeds in lines:
        values = {seed: getattr(one, measure) for seed, one in zip(found, of_seeds, strict=True)}
        told = ""
        if len(values) > 1 and of_seeds[0] is not first["scratch"]:
            difference = over_seeds(scratch, values)
            told = f"{difference.value:+.4f} ± {difference.error:.4f}"
        mean = f"{sum(values.values()) / len(values):.4f}"
        if len(values) > 1:
            mean += f" ± {half_width(list(values.values())):.4f}"
        rows.append([network, share, *(f"{value:.4f}" for value in values.values()), mean, told])
    seeds = [f"seed {seed}" for seed in found]
    return markdown_table(["network", "share of the steps", *seeds, "mean", "less scratch's, paired"], rows, align="lr")


def distilling(found: Mapping[int, Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """What distilling changes by share: with it less without it, paired by seed, ± as in :func:`table`."""
    rows = []
    for share in next(iter(found.values()))[next(iter(ARMS))]:
        differences = []
        for measure in names:
            values = [{seed: getattr(of[arm][share], measure) for seed, of in found.items()} for arm in ARMS]
            difference = over_seeds(*values)
            differences.append(f"{difference.value:+.4f} ± {difference.error:.4f}")
        rows.append([share, *differences])
    return markdown_table(["share of the steps", *names.values()], rows)


def run(arguments: Arguments) -> None:
    """Train what is missing, print the tables, and keep all numbers as JSON."""
    parse_mixers(arguments.mixer)  # what is wrong or missing is told before hours of training
    if arguments.num_samples:
        yardstick(arguments, torch.device("cpu"))
    found = {seed: of_seed(arguments, seed) for seed in range(arguments.seeds)}
    needed: dict[str, Any] = {}
    names = {"heldout_loss": "Held-out loss"} | ({"fid": "FID"} if arguments.num_samples else {})
    for measure, name in names.items():
        print(f"{name} after training:\n\n{table(found, arguments, measure)}\n")
        needed[measure] = {
            arm: {
                seed: share_needed(
                    {share: getattr(one, measure) for share, one in of[arm].items()}, getattr(of["scratch"], measure)
                )
                for seed, of in found.items()
            }
            for arm in ARMS
        }
    if arguments.seeds > 1:
        print(f"Distilled less not distilled, paired by seed:\n\n{distilling(found, names)}\n")
    print("The least share of the steps with at most the value from scratch:\n")
    said = [
        [names[measure], arm, *("none" if share is None else f"{share:g}" for share in by_seed.values())]
        for measure, arms in needed.items()
        for arm, by_seed in arms.items()
    ]
    print(markdown_table(["", "network", *(f"seed {seed}" for seed in found)], said))
    if arguments.json is not None:
        settings = dataclasses.asdict(arguments) | {"out": str(arguments.out), "json": str(arguments.json)}
        figures = {"settings": settings, "found": told(found), "needed": needed}
        write_record(arguments.json, torch.device("cpu"), figures)


def told(found: Any) -> Any:
    """The same with measures as plain values."""
    if isinstance(found, Measures):
        return dataclasses.asdict(found)
    return {name: told(of) for name, of in found.items()}


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="experiments/transplant.py")
    run(arguments)


if __name__ == "__main__":
    main()
