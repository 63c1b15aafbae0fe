"""What the moving average, logging and checkpoints cost beside a training step.

    python benchmarks/overhead.py --model SiT-B/2 --batch-size 8

Paired in one process: each round times a bare step (forward, backward, optimizer), then what the loop adds to it. A
checkpoint is written whole, as the loop does, and its time is spread over the steps between two of them.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from checks import at_least_one

from sit.checkpoint.info import CheckpointInfo
from sit.checkpoint.save import save_checkpoint
from sit.latents.vae import DIGITS_VAE
from sit.model import create_model
from sit.training.ema import averaged_parameters, moving_average
from sit.training.state import TrainingState
from sit.transport.transport import Transport
from sit.utils.cli import one_line_errors
from sit.utils.errors import entry_point
from sit.utils.record import machine, write_record
from sit.utils.tables import text_table
from sit.utils.timing import once


@dataclass
class Arguments:
    """Time what the loop adds to a step."""

    model: str = "SiT-B/2"
    mixer: str = "atconv"
    batch_size: int = 8
    rounds: int = 4
    """rounds after one that warms up"""
    checkpoint_every: int = 5000
    """as in the recipes of the 400k comparison"""
    log_every: int = 100
    json: Path | None = None
    """file for all numbers"""

    def __post_init__(self) -> None:
        at_least_one(self, "batch_size", "rounds", "checkpoint_every", "log_every")


def measure(arguments: Arguments) -> dict[str, float]:
    """Median seconds of a step and of each thing that the loop adds to it."""
    torch.manual_seed(0)
    network = create_model(arguments.model, mixer=arguments.mixer)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    averaged = averaged_parameters(network)
    ema = moving_average(averaged, decay=0.9999, warmup=True)
    state, transport = TrainingState(network, optimizer, ema), Transport()
    x = torch.randn(arguments.batch_size, 4, 32, 32)
    labels = torch.randint(0, 1000, (arguments.batch_size,))
    seconds: dict[str, list[float]] = {"step": [], "moving average": [], "logging": [], "checkpoint": []}

    def timed(name: str, run) -> None:
        seconds[name].append(once(run, torch.device("cpu")))

    def step() -> None:
        loss = transport.loss(network, x, torch.rand(len(x)), torch.randn_like(x), y=labels).mean()
        loss.backward()
        torch.nn.utils.get_total_norm([p.grad for p in network.parameters()]).item()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as place, open(Path(place) / "metrics.jsonl", "a", buffering=1) as metrics:

        def checkpoint() -> None:
            averaged, raw, moments = state.gather()
            save_checkpoint(
                Path(place) / f"step-{len(seconds['checkpoint'])}",
                model=network,
                weights=averaged,
                transport=transport,
                vae_source=DIGITS_VAE,
                info=CheckpointInfo(classes=1000),
                training_state=lambda folder: state.save(folder, raw, moments, {}),
            )

        for number in range(arguments.rounds + 1):
            timed("step", step)
            timed("moving average", lambda: ema.step(averaged))
            timed("logging", lambda: metrics.write(json.dumps({"step": 1, "loss": 0.5}) + "\n"))
            if number in (1, arguments.rounds):
                timed("checkpoint", checkpoint)

    return {name: statistics.median(values[1:] or values) for name, values in seconds.items()}


@entry_point
def main() -> None:
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="benchmarks/overhead.py")
    medians = measure(arguments)
    every = {"moving average": 1, "logging": arguments.log_every, "checkpoint": arguments.checkpoint_every}
    print(f"{arguments.model}, {arguments.mixer}, batch {arguments.batch_size}; {machine('cpu')}")
    shares = {name: medians[name] / steps / medians["step"] for name, steps in every.items()}
    rows = [("step", f"{medians['step']:.3f} s")]
    for name, share in shares.items():
        rows.append((name, f"{medians[name]:.3f} s", f"every {every[name]} steps", f"{share:.2%} of a step"))
    rows.append(("together", "", "", f"{sum(shares.values()):.2%} of a step"))
    print(text_table(rows, align="lrlr"))
    if arguments.json:
        write_record(arguments.json, "cpu", {"seconds": medians, "shares": shares})


if __name__ == "__main__":
    main()
