"""A small AttNet beside a ConvNeXt and a ResNet of timm with as many parameters, trained alike on Fashion-MNIST.

    python experiments/attnet_fashion.py --data data --seeds 3 --out runs/attnet-fashion

All three have three stages, at 16, 8 and 4 pixels for images padded to 32, and one recipe: AdamW, OneCycle, random
flips, label smoothing. The accuracy is that of the last epoch on the whole test part; no epoch is chosen. Finished
runs are kept in ``out``: an interrupted command, given again, goes on where it was.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import tyro
from scipy import stats
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import atconv.attnet  # noqa: F401 - registers AttNet
from sit.data.torchvision import TorchvisionSource
from sit.utils.cli import one_line_errors
from sit.utils.device import pick_device
from sit.utils.errors import UserError, entry_point
from sit.utils.files import atomic_write
from sit.utils.record import write_record
from sit.utils.tables import markdown_table
from sit.utils.timing import interleaved

SIDE = 32
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "AttNet": ("attnet_xxs", {"depths": (1, 1, 2), "dims": (16, 32, 96), "mlp_ratios": (4, 4, 4), "stem_stride": 2,
                              "drop_path_rate": 0.0}),
    # the first of timm's four ConvNeXt stages is empty, so that its stem works at half the resolution too
    "ConvNeXt": ("convnext_atto", {"depths": (0, 1, 1, 3), "dims": (8, 16, 32, 96), "patch_size": 1,
                                   "ls_init_value": None}),
    # and the last of timm's four ResNet stages is
    "ResNet": ("resnet18", {"layers": (1, 1, 2, 0), "channels": (16, 32, 88, 88), "stem_type": "deep",
                            "stem_width": 8}),
}  # fmt: skip
"""timm's names and arguments: parameters within 10 % of AttNet's, no layer scale, no drop path."""
LEAST_STEPS = 10
"""of a run, so that its learning rate can rise and fall"""


@dataclass
class Recipe:
    """What all networks are trained with."""

    epochs: int = 5
    batch_size: int = 128
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    limit: int | None = None
    """train and test on this many images only"""

    def steps_an_epoch(self, images: int) -> int:
        """How many batches there are of so many images.

        Raises:
            UserError: too few for the schedule of the learning rate.
        """
        if (found := images // self.batch_size) * self.epochs < LEAST_STEPS:
            raise UserError(
                f"{images:,} images in {self.epochs} epochs of `batch_size={self.batch_size}` are fewer than "
                f"{LEAST_STEPS} steps: take smaller batches, more `epochs` or a greater `limit`"
            )
        return found


@dataclass
class Arguments(Recipe):
    """Compare AttNet with ConvNeXt and ResNet on Fashion-MNIST."""

    data: str = "data"
    """folder of torchvision's FashionMNIST; never downloads"""
    out: Path = Path("runs/attnet-fashion")
    seeds: int = 3
    models: tuple[str, ...] = tuple(NETWORKS)
    threads: int = 1
    """CPU threads"""
    repeats: int = 15
    """interleaved rounds of the throughput; 0 leaves it out"""
    timed_batch: int = 128
    device: str | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.models if name not in NETWORKS]
        if unknown or not self.models:
            raise UserError(f"`models={' '.join(unknown)}`: choose among {', '.join(NETWORKS)}")
        if len(set(self.models)) < len(self.models):
            raise UserError(f"`models={' '.join(self.models)}` names a network twice, which would count as more seeds")
        for name in ("epochs", "batch_size", "seeds", "threads", "timed_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` must be at least 1, not {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf or not 0 <= self.weight_decay < math.inf:
            rates = f"`learning_rate={self.learning_rate}` and `weight_decay={self.weight_decay}`"
            raise UserError(f"{rates}: the first must be above 0, the second at least 0")


def build(name: str) -> nn.Module:
    """One of :data:`NETWORKS` for gray images and ten classes."""
    architecture, options = NETWORKS[name]
    model = timm.create_model(architecture, in_chans=1, num_classes=10, **options)
    if name == "ResNet":
        model.maxpool = nn.Identity()  # as usual for small images
    return model.to(memory_format=torch.channels_last)


def load(data: str, part: str, limit: int | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels uint8 (count, 1, 32, 32), zero-padded, and labels int64 (count,)."""
    source = TorchvisionSource(part, data)
    margin = (SIDE - 28) // 2
    pixels = F.pad(source.data.data[:limit, None], (margin,) * 4)
    return pixels.to(device), torch.from_numpy(source.labels[:limit]).to(device)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """To the mean 0 and deviation 1 of the training part's 28 × 28 pixels."""
    return (pixels.float() / 255 - 0.2860) / 0.3530


def test(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images that are classified right."""
    model.eval()
    with torch.no_grad():
        right = sum((model(normalize(x)).argmax(1) == y).sum().item()
                    for x, y in zip(pixels.split(500), labels.split(500), strict=True))  # fmt: skip
    return right / len(labels)


def train(name: str, seed: int, recipe: Recipe, parts: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Train one network; its accuracy after every epoch, and the core-minutes it took."""
    torch.manual_seed(seed)
    model = build(name).to(device)
    chance = torch.Generator().manual_seed(seed)
    pixels, labels = parts["train"]
    steps = recipe.steps_an_epoch(len(pixels))
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, recipe.weight_decay), lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=steps * recipe.epochs, pct_start=0.2
    )
    accuracies, started = [], time.process_time()
    for epoch in range(recipe.epochs):
        model.train()
        order = torch.randperm(len(pixels), generator=chance)[: steps * recipe.batch_size]
        flips = (torch.rand(len(order), generator=chance) < 0.5).to(device)
        total = torch.zeros((), device=device)
        batches = zip(order.to(device).split(recipe.batch_size), flips.split(recipe.batch_size), strict=True)
        for picked, flip in tqdm(batches, f"{name}, seed {seed}, epoch {epoch + 1}", steps, leave=False):
            x = pixels[picked]
            x = normalize(torch.where(flip[:, None, None, None], x.flip(3), x))
            loss = F.cross_entropy(model(x), labels[picked], label_smoothing=recipe.label_smoothing)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.detach()
        if not math.isfinite(total.item()):
            raise UserError(f"{name}, seed {seed}: the loss is not finite; lower `learning_rate`")
        accuracies.append(test(model, *parts["test"]))
    return {"accuracies": accuracies, "core_minutes": (time.process_time() - started) / 60}


def finished(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """A finished run's result, or None. Raise UserError if it was made with other settings."""
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    other = [key for key, value in settings.items() if result["settings"].get(key) != value]
    if other:
        was, now = result["settings"].get(other[0]), settings[other[0]]
        raise UserError(f"{path} was made with {other[0]} {was}, not {now}; choose another `out` or remove it")
    return result


def write(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def throughput(names: tuple[str, ...], arguments: Arguments, device: torch.device) -> dict[str, dict[str, float]]:
    """Images per second of each network in testing and in training, interleaved in this process."""
    models = {name: build(name).to(device) for name in names}
    x = torch.randn(arguments.timed_batch, 1, SIDE, SIDE, device=device)

    def testing(model: nn.Module) -> None:
        with torch.no_grad():
            model.eval()(x)

    def training(model: nn.Module) -> None:
        model.train()(x).square().mean().backward()

    def measured(run: Callable[[nn.Module], None]) -> dict[str, float]:
        candidates = {name: (lambda model=model: run(model)) for name, model in models.items()}
        seconds = interleaved(candidates, device, arguments.repeats, warm_up=2)
        return {name: len(x) / value for name, value in seconds.items()}

    return {"testing": measured(testing), "training": measured(training)}


def summary(name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies of all seeds, their mean and the half width of its 95 % interval (Student's t); size and cost."""
    with torch.random.fork_rng():
        model = build(name).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, SIDE, SIDE))
    last = [result["accuracies"][-1] for result in results]
    spread = statistics.stdev(last) / math.sqrt(len(last)) if len(last) > 1 else None
    return {
        "architecture": NETWORKS[name][0],
        "options": NETWORKS[name][1],
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply_accumulates": counter.get_total_flops() // 2,
        "accuracies": last,
        "mean": statistics.mean(last),
        "interval": None if spread is None else stats.t.ppf(0.975, len(last) - 1) * spread,
        "core_minutes": [result["core_minutes"] for result in results],
    }


def table(found: dict[str, dict[str, Any]], speeds: dict[str, dict[str, float]] | None) -> str:
    """The networks as Markdown, throughput against the first one's."""
    first = next(iter(found))
    head = ["network", "parameters", "M multiply-accumulates", "test accuracy", "seeds"]
    head += [f"images/s {kind}, against {first}" for kind in speeds or ()]
    rows = []
    for name, one in found.items():
        interval = "" if one["interval"] is None else f" ± {100 * one['interval']:.2f}"
        row = [name, f"{one['parameters']:,}", f"{one['multiply_accumulates'] / 1e6:.2f}",
               f"{100 * one['mean']:.2f}{interval} %", str(len(one["accuracies"]))]  # fmt: skip
        rows.append(row + [f"{kind[name] / kind[first]:.2f}x" for kind in (speeds or {}).values()])
    return markdown_table(head, rows)


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="experiments/attnet_fashion.py")
    run(arguments)


def run(arguments: Arguments) -> None:
    """Train what is not finished, and report."""
    device = pick_device(arguments.device)
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(**{key: getattr(arguments, key) for key in Recipe.__dataclass_fields__})

    plan = [(name, seed) for seed in range(arguments.seeds) for name in arguments.models]  # a seed of all, then more
    parts, results = None, {name: [] for name in arguments.models}
    for name, seed in plan:
        # through JSON, as the kept ones are
        settings = json.loads(json.dumps({"network": NETWORKS[name], "seed": seed, **asdict(recipe)}))
        path = arguments.out / f"{name.lower()}-seed{seed}.json"
        result = finished(path, settings)
        if result is None:
            parts = parts or {
                part: load(arguments.data, spec, recipe.limit, device)
                for part, spec in (("train", "fashion-mnist"), ("test", "fashion-mnist-test"))
            }
            result = {"settings": settings, **train(name, seed, recipe, parts, device)}
            write(path, result)
            tqdm.write(f"{path}: {result['accuracies'][-1]:.2%}, {result['core_minutes']:.1f} core-minutes")
        results[name].append(result)

    found = {name: summary(name, results[name]) for name in arguments.models}
    speeds = throughput(arguments.models, arguments, device) if arguments.repeats else None
    report = {
        "recipe": asdict(recipe),
        "threads": arguments.threads,
        "timm": timm.__version__,
        "networks": found,
        "images_per_second": speeds,
    }
    write_record(arguments.out / "report.json", device, report)
    print(table(found, speeds))


if __name__ == "__main__":
    main()
