"""The mixers side by side: what they cost, whether they have a forward derivative, and what they learned in a study.

    python benchmarks/mixers.py --json docs/performance/mixers.json
    python benchmarks/mixers.py --measured docs/performance/mixers.json \
        --study docs/fashion-pixels/report/numbers.json --json docs/performance/mixers.json

The second times nothing: it tells what was measured, with what a study has found since.

Parameters and multiply-accumulates are those of whole networks, counted. Milliseconds are of one layer, forward and
backward, at each number of tokens; and a MeanFlow step is a training step of a whole network by the plain one's: its
time, and the memory that it takes at most. Every round runs each mixer once, in turn, in one process; medians, and
ratios of medians.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import tyro
from checks import at_least_one
from peak import peak_bytes
from torch import nn

from sit.mixers import build_mixer, parse_mixers
from sit.mixers.forward_mode import plain_operations
from sit.model import MODELS, check_model_name, create_model
from sit.study.values import LOSS
from sit.training.plan import multiply_accumulates
from sit.transport.meanflow import MeanFlow
from sit.transport.transport import Transport
from sit.utils.cli import one_line_errors
from sit.utils.device import pick_device
from sit.utils.errors import UserError, entry_point
from sit.utils.files import atomic_write
from sit.utils.json_text import json_text
from sit.utils.record import record
from sit.utils.tables import markdown_table
from sit.utils.timing import interleaved

PATTERNS = (
    "attention", "attention:qk_norm=true", "neighborhood", "linear_attention",
    "linear_attention:feature_map=relu:heads=2:conv=5", "deformable", "depthwise", "dico", "atconv",
    "atconv:scope=window", "atconv:scope=token", "attention,atconv",
)  # fmt: skip


@dataclass
class Arguments:
    """Compare the mixers."""

    patterns: tuple[str, ...] = PATTERNS
    model: str = "SiT-B/2"
    """the size of what is counted and timed"""
    sides: tuple[int, ...] = (16, 32, 64)
    """of the square grids: 256, 1024 and 4096 tokens"""
    batch_size: int = 4
    step_model: str = "SiT-XS/2"
    """the network whose training steps are timed, on the first of the grids"""
    step_batch_size: int = 64
    repeats: int = 7
    study: tuple[Path, ...] = ()
    """reports of studies (numbers.json), whose held-out losses and FIDs are told"""
    measured: Path | None = None
    """a JSON that this program wrote, whose counts and times are told instead of new ones"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    json: Path | None = None
    """file for all numbers"""

    def __post_init__(self) -> None:
        at_least_one(self, "batch_size", "step_batch_size", "repeats")
        for name in (self.model, self.step_model):
            check_model_name(name)
        if not self.patterns or not self.sides:
            raise UserError("`patterns` and `sides` must name one or more")
        for pattern in self.patterns:
            parse_mixers(pattern)


@dataclass
class Row:
    """A mixer's numbers; lists have one of each grid.

    Attributes:
        pattern: the mixers.
        parameters: of the network.
        macs: of the network's forward pass for an image.
        milliseconds: of a layer, forward and backward; of several mixers in the pattern, on average.
        forward_derivative: yes; slow path, if kernels have to be set aside for it; or no.
        meanflow_step: the time of a training step of MeanFlow by that of the plain objective.
        peak_memory: bytes that the two steps take above the weights', the plain one's first; None where no one tells.
        found: held-out loss and FID, None where there is none, by study.
    """

    pattern: str
    parameters: int
    macs: list[int]
    milliseconds: list[float]
    forward_derivative: str
    meanflow_step: float
    peak_memory: list[int] | None
    found: dict[str, tuple[float | None, float | None]]


def layers(pattern: str, arguments: Arguments, side: int) -> list[nn.Module]:
    """A layer of each mixer in the pattern."""
    shape = MODELS[arguments.model]
    with torch.device(arguments.device):
        return [
            build_mixer(spec, shape["hidden_size"], shape["num_heads"], (side, side)) for spec in parse_mixers(pattern)
        ]


def forward_derivative(pattern: str, arguments: Arguments) -> str:
    """Whether the layers have one as they are, by way of plain operations, or not at all; by trying."""
    side = arguments.sides[0]
    made = layers(pattern, arguments, side)
    x = torch.randn(1, side**2, MODELS[arguments.model]["hidden_size"], device=arguments.device)

    def try_it() -> bool:
        try:
            for layer in made:
                torch.func.jvp(lambda tokens, layer=layer: layer(tokens, (side, side)), (x,), (x,))
        except (RuntimeError, NotImplementedError):  # PyTorch's, of an operation that has none
            return False
        return True

    if try_it():
        return "yes"
    with plain_operations(nn.ModuleList(made), x.device):
        return "slow path" if try_it() else "no"


def layer_seconds(arguments: Arguments, side: int) -> dict[str, float]:
    """Seconds of a layer's forward and backward pass, by pattern."""
    x = torch.randn(arguments.batch_size, side**2, MODELS[arguments.model]["hidden_size"], device=arguments.device)

    def both(made: list[nn.Module]) -> None:
        for layer in made:
            layer(x.clone().requires_grad_(), (side, side)).square().sum().backward()

    made = {pattern: layers(pattern, arguments, side) for pattern in arguments.patterns}
    runs: dict[str, Callable[[], object]] = {name: lambda of=of: both(of) for name, of in made.items()}
    seconds = interleaved(runs, torch.device(arguments.device), arguments.repeats)
    return {pattern: seconds[pattern] / len(of) for pattern, of in made.items()}


def step_seconds(arguments: Arguments, pattern: str) -> tuple[float, list[int] | None]:
    """The time of a step of MeanFlow by that of the plain objective, and the peak memory of both."""
    device, side = torch.device(arguments.device), 2 * arguments.sides[0]
    average = Transport(prediction="average-velocity")
    losses = {"plain": Transport().training_loss, "MeanFlow": MeanFlow(average, kappa=0.5).training_loss}
    x, y = torch.randn(arguments.step_batch_size, 4, side, side, device=device), torch.arange(arguments.step_batch_size)
    runs: dict[str, Callable[[], object]] = {}
    for name, loss in losses.items():
        with device:
            model = create_model(arguments.step_model, seed=0, mixer=pattern, input_size=side,
                                 average_velocity=name == "MeanFlow")  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step(model=model, loss=loss, optimizer=optimizer) -> None:
            loss(model, x, y.to(device) % 1000).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        runs[name] = step
    seconds = interleaved(runs, device, arguments.repeats)  # optimizers have their states by then
    peaks = [peak for run in runs.values() if (peak := peak_bytes(run, device)) is not None]
    return seconds["MeanFlow"] / seconds["plain"], peaks or None


def found_by_studies(files: tuple[Path, ...]) -> dict[str, dict[str, tuple[float | None, float | None]]]:
    """The means of held-out loss and FID that studies' reports tell, by pattern and study.

    Raises:
        UserError: a file is no report of a study.
    """
    found: dict[str, dict[str, tuple[float | None, float | None]]] = {}
    for file in files:
        try:
            report = json.loads(file.read_text())
            for name, variant in report["variants"].items():
                loss, fid = (variant["metrics"].get(metric, {}).get("value") for metric in (LOSS, report["fid"]))
                if loss is not None or fid is not None:
                    found.setdefault(variant["mixer"], {})[f"{file.parent.parent.name}, {name}"] = loss, fid
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"`study={file}` is no numbers.json of a study's report") from error
    return found


def told_again(arguments: Arguments, file: Path) -> tuple[dict[str, Any], list[Row]]:
    """What a JSON of this program has, with what the studies have found: all but its rows, and the rows.

    By which command and when it was told again stands under ``told_again``, beside the measurement's own.

    Raises:
        UserError: it is none.
    """
    found = found_by_studies(arguments.study)
    try:
        figures = json.loads(file.read_text())
        names = {entry.name for entry in fields(Row)} - {"found"}
        rows = [
            Row(**{name: row[name] for name in names}, found=found.get(row["pattern"], {}))
            for row in figures.pop("rows")
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"`measured={file}` is no JSON of benchmarks/mixers.py ({error!r})") from error
    now = record(pick_device(arguments.device))
    return figures | {"told_again": {name: now[name] for name in ("date", "command")}}, rows


def compare(arguments: Arguments) -> list[Row]:
    """All rows."""
    shape, found = MODELS[arguments.model], found_by_studies(arguments.study)
    seconds = [layer_seconds(arguments, side) for side in arguments.sides]
    rows = []
    for pattern in arguments.patterns:
        macs = []
        for side in arguments.sides:
            pixels = side * shape["patch_size"]
            with torch.device("meta"):
                network = create_model(arguments.model, mixer=pattern, input_size=pixels)
            macs.append(multiply_accumulates(network, (4, pixels, pixels)))
        ratio, peaks = step_seconds(arguments, pattern)
        parameters = sum(p.numel() for p in network.parameters())
        times = [1e3 * one[pattern] for one in seconds]
        derivative = forward_derivative(pattern, arguments)
        rows.append(Row(pattern, parameters, macs, times, derivative, ratio, peaks, found.get(pattern, {})))
    return rows


def table(rows: list[Row], sides: Sequence[int]) -> str:
    """Markdown; what a study found has the variant's name in brackets."""
    tokens = [side**2 for side in sides]
    header = ["pattern", "parameters", *(f"G MACs, {n} tokens" for n in tokens), *(f"ms, {n} tokens" for n in tokens)]
    header += ["forward derivative", "MeanFlow step / plain", "memory / plain", "held-out loss", "FID"]
    lines = []
    for row in rows:
        losses = (f"{loss:.4f} ({study})" for study, (loss, _) in row.found.items() if loss is not None)
        fids = (f"{fid:.3g} ({study})" for study, (_, fid) in row.found.items() if fid is not None)
        memory = f"{row.peak_memory[1] / row.peak_memory[0]:.2f}" if row.peak_memory else ""
        lines.append(
            [f"`{row.pattern}`", f"{row.parameters:,}", *(f"{n / 1e9:.2f}" for n in row.macs),
             *(f"{ms:.4g}" for ms in row.milliseconds), row.forward_derivative, f"{row.meanflow_step:.2f}", memory,
             "; ".join(losses), "; ".join(fids)]
        )  # fmt: skip
    return markdown_table(header, lines)


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/mixers.py")
    if arguments.measured is not None:
        figures, rows = told_again(arguments, arguments.measured)
    else:
        device = pick_device(arguments.device)
        figures, rows = dict[str, Any](record(device)), compare(arguments)
        figures["arguments"] = {
            name: value for name, value in asdict(arguments).items() if name not in ("json", "study", "measured")
        }
    how = figures["arguments"]
    print(f"{figures['date']}, {figures['machine']}; layers of {how['model']}, batch {how['batch_size']}; ", end="")
    print(f"steps of {how['step_model']}, batch {how['step_batch_size']}; medians of {how['repeats']}")
    print("\n" + table(rows, how["sides"]))
    if arguments.json is not None:
        with atomic_write(arguments.json) as temporary:
            text = json_text(figures | {"rows": [asdict(row) for row in rows]}, indent=2)
            temporary.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
